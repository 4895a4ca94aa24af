"""The search for computed steps: its neighbours, its way, and what it searches on."""

import pytest

from harmonica_dit.flops import trunk_costs
from harmonica_dit.methods import step_search, trunk_forecast
from harmonica_dit.methods.calibration import calibration_labels
from harmonica_dit.methods.step_search import climb, neighbours
from harmonica_dit.methods.trunk import forecast_between
from harmonica_dit.sample import sample
from harmonica_dit.sample.trajectory import FIRST_IMAGE
from support.plain_blocks import four_blocks


@pytest.fixture(scope="module")
def net():
    return four_blocks()


def test_one_computed_step_or_all_from_one_on_lie_a_step_elsewhere():
    """By hand, for 3 of 5 steps; the first stays."""
    assert set(neighbours((0, 2, 3), 5)) == {(0, 1, 3), (0, 1, 2), (0, 3, 4), (0, 2, 4)}
    assert not list(neighbours((0,), 5)) and not list(neighbours((0, 1, 2), 3))


def test_it_goes_on_until_no_neighbour_is_better_and_looks_at_nothing_twice():
    looked = []

    def error(chosen):
        looked.append(chosen)
        return sum(abs(a - b) for a, b in zip(chosen, (0, 1, 2, 7)))

    assert climb((0, 3, 5, 6), 8, error) == (0, 1, 2, 7)
    assert len(set(looked)) == len(looked)


def test_it_searches_on_final_images_of_calibration_noise(net, monkeypatch):
    """No neighbour is nearer to the uncached images, evenly spaced steps are further; all as `sample` makes them."""
    numbers = set()
    monkeypatch.setitem(step_search.__globals__, "sample", lambda *args, **kwargs: numbers.add(
        kwargs["first"]) or sample(*args, **kwargs))
    made = step_search(net, 6, 3, images=4, guidance=1.5, seed=2)
    assert numbers == {FIRST_IMAGE}
    labels, (flops, size) = calibration_labels(net, 4, 2), trunk_costs(net)

    def draw(schedule):
        return sample(net, labels, steps=6, schedule=schedule, guidance=1.5, seed=2, first=FIRST_IMAGE)

    def error(chosen):
        schedule = forecast_between([s in chosen for s in range(6)], "", flops=flops, size=size, order=1,
                                    names=net.branch_names, model="four")
        return (draw(schedule) - draw(None)).square().flatten(1).mean(1).sqrt().mean().item()

    found = tuple(made.compute[:, 0].nonzero().flatten().tolist())
    least = error(found)
    assert least < error((0, 2, 4)) and all(error(chosen) >= least for chosen in neighbours(found, 6))
    assert made.origin == "trunk, Taylor of order 1, 3 of 6 steps, searched on 4 images"
    assert sorted(labels) == [0, 1, 2, 3]


def test_a_speedup_takes_as_many_steps_as_even_spacing(net):
    speedup = trunk_forecast(net, 6, every=2, order=2).speedup
    made = step_search(net, 6, speedup=speedup, order=2, images=1)
    assert int(made.compute[:, 0].sum()) == 3 and made.forecaster.rule.order == 2


@pytest.mark.parametrize("arguments, message", [
    (dict(), "computed, speedup: give exactly one"), (dict(computed=7), "computed: got 7, expected at most 6"),
    (dict(computed=0), "computed: got 0"), (dict(computed=3, steps=0), "steps: got 0"),
    (dict(computed=3, order=4), "order: got 4"), (dict(computed=3, images=0), "images: got 0")])
def test_what_is_out_of_range_is_refused(net, arguments, message):
    with pytest.raises(ValueError, match=message):
        step_search(net, **dict(steps=6) | arguments)
