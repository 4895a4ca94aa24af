"""Targets: the cut, the threshold it sets, the β it steers by."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harmonica_dit.costs import Seconds
from harmonica_dit.flops import Flops
from harmonica_dit.router import Router
from harmonica_dit.train.budget import Budget, Steering

FLOPS = Flops((1.0, 2.0, 3.0), 1.5)


def router_of(scores):
    logits = torch.logit(torch.cat([torch.full_like(scores[:1], 0.5), scores]))
    return Router(logits, ("a", "b", "c"), FLOPS, tuple(range(len(logits))))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(1.01, 2.5), st.sampled_from([1, 2, 20]))
def test_the_frozen_schedule_is_the_nearest_one_above_the_target(seed, target, levels):
    """Against every threshold that could differ, ties among the scores included."""
    scores = torch.rand(5, 3, generator=torch.Generator().manual_seed(seed))
    scores = (scores * levels).round() / levels * 0.9 + 0.05
    router = router_of(scores)
    Budget(FLOPS, 6, speedup=target).set_threshold(router)
    found = router.schedule().speedup
    possible = [router.schedule(t).speedup for t in [0.0, *router.scores()[1:].flatten().tolist()]]
    assert found >= target - 1e-9
    assert found == min(p for p in possible if p >= target - 1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 0.8))
def test_cur_as_well(seed, target):
    router = router_of(torch.rand(5, 3, generator=torch.Generator().manual_seed(seed)) * 0.98 + 0.01)
    Budget(FLOPS, 6, cur=target).set_threshold(router)
    assert target - 1e-6 <= router.schedule().cur < target + 1 / 18 + 1e-6


@pytest.mark.parametrize("forecasts", [False, True])
@pytest.mark.parametrize("target", [1.2, 1.5, 2.0, 3.0])
def test_a_target_in_measured_seconds_is_met_to_two_percent(target, forecasts):
    """By a made-up table, with as many entries as a model has; in FLOPs the schedule is elsewhere."""
    flops, seconds = Flops((1.0,) * 24, 0.0), Seconds((3.0, 1.0) * 12, 2.0, 0.1, 1.0, 0.5, 48.0)
    router = Router(torch.randn(20, 24, generator=torch.Generator().manual_seed(0)), tuple(map(str, range(24))), flops,
                    tuple(range(20)), extrapolation=torch.ones(20, 24) if forecasts else None)
    budget = Budget(seconds, 20, speedup=target, forecasts=forecasts)
    budget.set_threshold(router)
    schedule = router.schedule()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        budget.check(router)
    assert target <= schedule.speedup_by(seconds) < 1.02 * target
    assert abs(schedule.speedup - target) > 0.02 * target
    lower = router.schedule(router.scores()[~schedule.compute].max().item() - 1e-6)  # the next entry is computed too
    assert lower.compute.sum() == schedule.compute.sum() + 1 and lower.speedup_by(seconds) < target


def test_beta_is_cut_from_the_budget_that_the_threshold_keeps_to():
    """In seconds too, where nothing comes beside the branches and what is fixed."""
    seconds = Seconds((3.0, 1.0, 2.0), 2.0, 0.0, 1.0, 0.0, 7.0)
    router = router_of(torch.rand(5, 3, generator=torch.Generator().manual_seed(0)) * 0.98 + 0.01)
    budget = Budget(seconds, 6, speedup=1.5)
    budget.set_threshold(router)
    assert budget.cut(router.scores()[1:]) == pytest.approx(router.threshold)


def test_rounding_costs_no_entry():
    """Of a target that a schedule meets exactly, with FLOPs of the size of a model's and no round numbers."""
    flops, values = Flops((3e9 / 7, 5e9 / 7, 8e9 / 7), 1e9 / 3), torch.linspace(0.9, 0.1, 15)
    for count in range(1, 15):
        spent = 6 * flops.fixed + sum(flops.branches) + sum((flops.branches * 5)[:count])
        cut = Budget(flops, 6, speedup=6 * flops.total / spent).cut(values.view(5, 3))
        assert (values > cut).sum() == count


def test_impossible_targets_are_refused_with_the_limit():
    most = 6 * 7.5 / (7.5 + 5 * 1.5)
    Budget(FLOPS, 6, speedup=most)
    Budget(FLOPS, 6, cur=5 / 6)
    for speedup in (most * 1.001, 1.0, 0.5, float("nan")):
        with pytest.raises(ValueError, match="target_speedup: .* up to 3,"):
            Budget(FLOPS, 6, speedup=speedup)
    for cur in (0.84, 0.0, -1, float("nan")):
        with pytest.raises(ValueError, match="target_cur: .* up to 0.8333"):
            Budget(FLOPS, 6, cur=cur)


def test_the_extremes_are_reached():
    router = router_of(torch.rand(5, 3, generator=torch.Generator().manual_seed(0)) * 0.98 + 0.01)
    Budget(FLOPS, 6, cur=5 / 6).set_threshold(router)
    assert router.schedule().cur == pytest.approx(5 / 6)
    Budget(FLOPS, 6, cur=1e-9).set_threshold(router)
    assert router.schedule().cur == pytest.approx(1 / 18)  # from above: one entry at least


def test_a_target_between_ties_is_missed_with_a_warning():
    router, budget = router_of(torch.full((5, 3), 0.3)), Budget(FLOPS, 6, cur=0.5)
    budget.set_threshold(router)
    with pytest.warns(UserWarning, match="target_cur=0.5: .* has 0.8333"):
        budget.check(router)
    router = router_of(torch.linspace(0.1, 0.9, 15).view(5, 3))
    budget.set_threshold(router)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        budget.check(router)


def test_steering_settles_where_the_values_pay_for_the_budget():
    """β lies between the value of the last entry that the budget pays for and of the first that it does not."""
    budget, values = Budget(FLOPS, 6, cur=0.5), torch.arange(1.0, 16).view(5, 3)
    steering = Steering(budget, 6, 3, torch.device("cpu"))
    for n in range(300):
        noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(n)) / 10
        beta = steering.observe(values + noise)
    assert 9 < beta < 10  # 3 + 6 of 18 entries are computed: the values 10 to 15
    assert steering.seen == 300


def test_beta_is_never_negative():
    assert Steering(Budget(FLOPS, 6, cur=0.5), 6, 3, torch.device("cpu")).observe(-torch.ones(5, 3)) == 0
