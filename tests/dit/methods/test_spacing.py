"""Which steps are computed: every n-th, or as few as a speedup takes, evenly spaced."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harmonica_dit.flops import Flops
from harmonica_dit.forecaster import taylor
from harmonica_dit.methods import fora, trunk_forecast
from harmonica_dit.methods.spacing import space, spread
from harmonica_dit.methods.trunk import whole_steps
from harmonica_dit.models.dit import DiT
from harmonica_dit.schedule import Schedule

NAMES = ("a", "b")


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return DiT(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=4,
               name="tiny")


def pauses(computed):
    """Steps from each computed one to the next, or to the end."""
    return [b - a for a, b in pairwise([*(s for s, c in enumerate(computed) if c), len(computed)])]


def test_computed_steps_are_spread_evenly_and_late():
    assert spread(10, 3) == [s in (0, 4, 7) for s in range(10)] and all(spread(7, 7)) and spread(5, 1) == [True] + 4 * [
        False]
    assert spread(20, 7) == [s % 3 == 0 for s in range(20)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.floats(1, 6), st.sampled_from([0.0, 10.0, 100.0]), st.integers(0, 40),
       st.integers(0, 3), st.booleans())
def test_whole_steps_are_as_many_as_a_speedup_allows(steps, speedup, fixed, size, order, adams):
    """Evenly spaced; found by trying every number of them."""
    flops = Flops((300.0, 500.0), fixed)
    speedups = {m: Schedule(torch.tensor(spread(steps, m))[:, None].repeat(1, 2), NAMES, flops, forecaster=taylor(
        spread(steps, m), order, size, adams)).speedup for m in range(1, steps + 1)}
    fast = [m for m in speedups if speedups[m] >= speedup * (1 - 1e-9)]
    if not fast:
        with pytest.raises(ValueError, match=f"speedup: got {speedup}, expected at most {speedups[1]:.4g}".replace(
                "+", r"\+")):
            whole_steps(steps, flops, size, speedup=speedup, order=order, adams=adams, names=NAMES)
        return
    made = whole_steps(steps, flops, size, speedup=speedup, order=order, adams=adams, names=NAMES, model="it")
    computed = made.compute[:, 0].tolist()
    assert sum(computed) == max(fast) and made.speedup == speedups[max(fast)] and made.model == "it"
    assert made.compute.tolist() == [[c, c] for c in computed]
    assert computed[0] and max(pauses(computed)) - min(pauses(computed)) <= 1


@pytest.mark.parametrize("speedup, steps, expected", [(2.3, 20, {2, 3}), (2, 20, {2}), (3, 21, {3}), (1, 7, {1}),
                                                      (1.7, 12, {1, 2}), (3, 3, {3})])
def test_a_speedup_between_two_whole_numbers_mixes_their_pauses(speedup, steps, expected):
    """Where nothing but the branches costs anything, so that 2 is every second step in spite of rounding."""
    made = whole_steps(steps, Flops((0.1, 0.7), 0.0), 0, speedup=speedup, names=NAMES)
    assert set(pauses(made.compute[:, 0].tolist())) == expected and made.speedup >= speedup * (1 - 1e-9)


@pytest.mark.parametrize("speedup", [1.0, 1.5, 1.9, 2.3])
def test_branches_are_spaced_by_a_speedup_as_the_trunk_is(net, speedup):
    made = fora(net, 20, speedup=speedup, order=2)
    computed, flops = made.compute[:, 0].tolist(), made.flops
    m = sum(computed)
    assert computed == spread(20, m) and made.compute.all(1).equal(made.compute.any(1)) and made.speedup >= speedup
    assert m == 20 or 20 * flops.total / (20 * flops.fixed + (m + 1) * sum(flops.branches)) < speedup
    assert made.origin == f"TaylorSeer of order 2, {m} of 20 steps" and made.forecaster.order == 2


@pytest.mark.parametrize("every, order, origin", [
    (20, 1, "TaylorSeer of order 0 (1 asked for), every 20"), (3, 1, "TaylorSeer of order 1, every 3"),
    (3, 3, "TaylorSeer of order 2 (3 asked for), every 3"), (20, 0, "FORA, every 20")])
def test_the_origin_tells_the_order_that_is_reached(net, every, order, origin):
    assert fora(net, 8, every, order).origin == origin


@pytest.mark.parametrize("make", [fora, trunk_forecast])
@pytest.mark.parametrize("arguments, message", [
    (dict(), "every, speedup: give exactly one of them, got None and None"),
    (dict(every=2, speedup=2.0), "every, speedup: give exactly one of them, got 2 and 2.0"),
    (dict(speedup=0.5), "speedup: got 0.5, expected a number from 1 on"), (dict(speedup="2"), "speedup: got '2'"),
    (dict(speedup=99.0), "expected at most .*, which is that of 4 steps of which only the first"),
    (dict(every=0), "every: got 0"), (dict(every=2, steps=0), "steps: got 0"), (dict(speedup=2, steps=None), "steps"),
    (dict(every=2, order=4), "order: got 4")])
def test_what_is_no_spacing_is_refused(net, make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(net, **dict(steps=4) | arguments)


def test_what_is_no_model_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="flops: expected 3 branches' numbers"):
        whole_steps(4, Flops((1.0, 2.0), 0.0), 0, every=2, names=("a", "b", "c"))


def test_few_schedules_are_made_on_the_way_to_a_speedup():
    """Those of too many steps are left out without making their forecasts."""
    tried = []

    def make(computed, which):
        tried.append(sum(computed))
        return Schedule(torch.tensor(computed)[:, None].repeat(1, 2), NAMES, Flops((3.0, 5.0), 2.0))

    assert space(20, Flops((3.0, 5.0), 2.0), make, every=None, speedup=2.0).speedup >= 2 and tried == [7]


def test_a_speedup_takes_no_more_forwards_than_one(net, monkeypatch):
    """The FLOPs are counted once, however many numbers of steps are tried."""
    calls = []
    monkeypatch.setattr(net, "forward", lambda *inputs, forward=net.forward: calls.append(1) or forward(*inputs))
    trunk_forecast(net, 20, speedup=2.5)
    assert len(calls) == 1
