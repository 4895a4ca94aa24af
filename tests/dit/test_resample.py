"""Schedules for other timesteps: every n-th step stays every n-th, shares stay; what cannot be mapped is refused."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harmonica_dit.files import load_tensors, save_tensors
from harmonica_dit.flops import Flops
from harmonica_dit.forecaster import BranchForecaster, Rule, TrunkForecaster, taylor
from harmonica_dit.methods.trunk import whole_steps
from harmonica_dit.resample import positions, resample_branch, resample_coefficients
from harmonica_dit.sample.schedulers import make_scheduler
from harmonica_dit.schedule import Schedule

FLOPS, NAMES = Flops((3.0, 5.0), 2.0), ("a", "b")
SPACINGS = st.sampled_from(["linspace", "trailing", "cubic"])
quietly = pytest.mark.filterwarnings("ignore:schedule. made for .* steps with CUR")


def evenly(steps, spacing="linspace"):
    """Falling timesteps: rounded over 0..999; or the first of each of T parts; or such that crowd at the end."""
    if spacing == "linspace":
        return tuple(make_scheduler("ddim", steps).timesteps.tolist())
    if spacing == "trailing":
        return tuple(1000 - 1000 * s / steps for s in range(steps))
    return tuple(999 * (1 - s / steps) ** 3 for s in range(steps))


def table(*rows):
    return torch.tensor([[c == "1" for c in row] for row in rows])


def every(n, steps, **options):
    return Schedule((torch.arange(steps) % n == 0)[:, None].repeat(1, 2), NAMES, FLOPS, **options)


def random_table(rng, steps, K=6):
    return torch.tensor([[s == 0 or rng.random() < (k + 1) / (K + 1) for k in range(K)] for s in range(steps)])


def resampled(schedule, timesteps):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "schedule: made for")
        return schedule.resampled(timesteps)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), st.integers(7, 60), st.integers(1, 60), *[SPACINGS] * 2)
def test_every_nth_step_stays_every_nth(n, made, wanted, spacing, other):
    """Whatever the numbers of steps and the timesteps; with its forecasts."""
    schedule = every(n, made, extrapolation=torch.ones(made, 2), timesteps=evenly(made, spacing))
    found, direct = resampled(schedule, evenly(wanted, other)), every(n, wanted, extrapolation=torch.ones(wanted, 2))
    assert found.rows == direct.rows and found.forecast_weights == direct.forecast_weights
    assert found.timesteps == evenly(wanted, other) and found.origin == f", resampled from {made} steps"


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), SPACINGS, st.randoms(use_true_random=False))
def test_equal_timesteps_give_equal_rows(steps, spacing, rng):
    compute = random_table(rng, steps)
    a = torch.tensor([[rng.random() for _ in range(6)] for _ in range(steps)])
    schedule = Schedule(compute, tuple("abcdef"), Flops((1.0,) * 6, 1.0), a, timesteps=evenly(steps, spacing))
    found = schedule.resampled(schedule.timesteps)
    assert found.rows == schedule.rows and found.forecast_weights == schedule.forecast_weights


@settings(max_examples=100, deadline=None)
@given(st.integers(5, 40), st.integers(5, 60), st.randoms(use_true_random=False))
def test_a_branch_keeps_its_share(made, wanted, rng):
    """To less than what rounding does at both numbers of steps, and one step at the end, which is cut short."""
    compute = random_table(rng, made)
    schedule = Schedule(compute, tuple("abcdef"), Flops((1.0,) * 6, 1.0), timesteps=evenly(made, "trailing"))
    found = resampled(schedule, evenly(wanted, "trailing")).compute
    assert found[0].all()
    moved = (found.double().mean(0) - compute.double().mean(0)).abs()
    assert moved.max() <= 1 / wanted + 1 / made + 1e-9


def test_positions_by_hand():
    assert positions((9, 6, 3, 0), (9, 7.5, 0)).tolist() == [0, 0.5, 3, 4]
    assert positions((9, 6, 3, 0), (12, 3, -3)).tolist() == [-1, 2, 4, 5]  # beyond both ends
    assert positions((0, 3, 6, 9), (0, 9)).tolist() == [0, 3, 4]  # rising
    assert positions((8, 6, 6, 3, 3), (8, 3, 3, 0)).tolist() == [0, 3, 4, 5, 6]  # Heun's has two calls a step
    assert positions((5,), (9, 5, 1)).tolist() == [-4, 0, 4, 5] and positions((9, 6), (7.5,)).tolist() == [0.5, 2]
    assert positions((5, 5), (5, 5)).tolist() == [0, 1, 2]


def test_a_sum_that_passes_late_in_a_step_is_left_to_the_next():
    """Computed at 0 and 1 of 3 steps: the share is 1, then 1/2."""
    computed = (True, True, False)
    assert resample_branch(computed, np.array([0.0, 3, 4, 5])) == [True, True, False]  # 2/3 of the step, and before it
    assert resample_branch(computed, np.array([0.0, 5, 6, 7])) == [True, False, True]  # 4/5 of the first step


def test_the_share_is_that_of_where_the_step_lies():
    """Computed rarely, then at every step, or the other way round; each branch by itself."""
    compute = table("11", "01", "01", "01", "01", "11", "11", "10", "10", "10")
    schedule = Schedule(compute, NAMES, FLOPS, timesteps=evenly(10, "trailing"))
    found = resampled(schedule, evenly(20, "trailing")).compute.T.tolist()
    assert found[0] == [s in (0, 5, *range(10, 20)) for s in range(20)]
    assert found[1] == [s < 13 or s == 16 for s in range(20)]


def test_a_part_of_the_timesteps():
    """As of an image that is given: the first step is computed, and what follows is as it is there."""
    compute = table("11", "11", "11", "11", "01", "01", "11", "00", "01", "10")
    schedule = Schedule(compute, NAMES, FLOPS, timesteps=evenly(10, "trailing"))
    found = resampled(schedule, schedule.timesteps[5:]).compute.T.tolist()
    assert found[0] == [True, False, False, True, False] and found[1] == [True, True, False, True, False]
    second = every(2, 20, timesteps=evenly(20))
    assert second.resampled(evenly(20)[7:]).rows == every(2, 13).rows
    assert second.resampled((50.0, 25, 10, 5, 2, 1)).rows == every(2, 6).rows


def test_coefficients_are_those_of_the_nearest_step_that_forecasts():
    compute = table("11", "01", "10", "00", "10", "00")
    a = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 0.8], [0.9, 1.0], [1.1, 1.2]])
    found = resample_coefficients(a, compute, np.array([0.0, 2.5, 3.9, 4.1, 5, 6]))
    # branch a forecasts at 3 and 5 (at 1 it has been computed once), branch b at 2 to 5
    torch.testing.assert_close(found, torch.tensor([[0.7, 0.6], [0.7, 0.6], [0.7, 1.0], [1.1, 1.0], [1.1, 1.2]]))
    once = resample_coefficients(a, table("11", "10", "00", "00", "00", "00"), np.array([0.0, 2, 3, 6]))
    assert once[:, 1].tolist() == [a[s, 1].item() for s in (1, 2, 3)]  # where none forecasts, those that reuse
    assert not resample_coefficients(a, torch.ones(6, 2, dtype=torch.bool), np.array([0.0, 2, 3])).any()


@quietly
def test_runs_and_branch_forecasters_go_along():
    compute = table("111", "000", "001", "110", "000", "111")
    schedule = Schedule(compute, tuple("abc"), Flops((1.0,) * 3, 1.0), timesteps=evenly(6), runs=(2, 1), model="it",
                        forecaster=BranchForecaster(2), guidance=3.0)
    found = schedule.resampled(evenly(15))
    assert (found.runs, found.forecaster, found.guidance, found.model) == ((2, 1), BranchForecaster(2), 3.0, "it")
    assert found.compute[:, 0].equal(found.compute[:, 1]) and not found.compute[:, 1].equal(found.compute[:, 2])


@quietly
@pytest.mark.parametrize("order, adams", [(0, False), (1, False), (3, False), (1, True)])
def test_taylors_weights_are_made_anew(tmp_path, order, adams):
    """Through a file, and to more steps than those that lowered the order."""
    made = whole_steps(4, FLOPS, 9, every=2, order=order, adams=adams, names=NAMES)
    made = replace(made, timesteps=evenly(4))
    made.save(tmp_path / "s.safetensors")
    found = Schedule.load(tmp_path / "s.safetensors").resampled(evenly(11))
    direct = whole_steps(11, FLOPS, 9, every=2, order=order, adams=adams, names=NAMES)
    assert found.rows == direct.rows and found.forecaster.states.equal(direct.forecaster.states)
    assert found.forecaster.origin == direct.forecaster.origin and found.speedup == direct.speedup
    assert found.forecaster.rule == Rule(order, adams) and found.timesteps == evenly(11)


def test_other_weights_of_the_trunk_are_refused(tmp_path):
    """Learned ones, Taylor's that were changed, and those of a file from before `taylor` was noted."""
    computed = [True, False, True, False]
    weights = taylor(computed, 1, 9)
    good = Schedule(torch.tensor(computed)[:, None].repeat(1, 2), NAMES, FLOPS, forecaster=weights,
                    timesteps=evenly(4))
    assert good.resampled(evenly(4)).rows == good.rows
    learned = TrunkForecaster(weights.states, size=9)
    for other in (learned, replace(weights, states=1.5 * weights.states), replace(weights, states=torch.zeros(4, 1, 1)),
                  *(replace(weights, **{name: torch.zeros(*shape)}) for name, shape in (
                      ("tokens", (4, 2, 1)), ("own", (4, 1)), ("condition", (4, 5))))):
        with pytest.raises(ValueError, match="schedule: its forecaster's weights belong to its own timesteps"):
            replace(good, forecaster=other).resampled(evenly(6))
    good.save(tmp_path / "s.safetensors")
    tensors, metadata = load_tensors(tmp_path / "s.safetensors")
    del metadata["forecaster"]["taylor"]
    save_tensors(tmp_path / "s.safetensors", tensors, metadata)
    old = Schedule.load(tmp_path / "s.safetensors")
    assert old.forecast_weights[1].states.equal(good.forecast_weights[1].states)
    with pytest.raises(ValueError, match="cannot be mapped to others"):
        old.resampled(evenly(6))


def test_a_cur_that_moves_is_named():
    schedule = every(2, 20, timesteps=evenly(20))
    schedule.resampled(evenly(11))  # 0.45
    with pytest.warns(UserWarning, match="for 20 steps with CUR 0.50, which becomes 0.40 in the 5 steps") as caught:
        schedule.resampled(evenly(5))
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="CUR 0.50, which becomes 0.00 in the 1 steps"):
        schedule.resampled(evenly(1))


@pytest.mark.parametrize("own, timesteps, message", [
    (None, (9, 5), "schedule: does not say what timesteps it was made for"),
    ((9, 6, 3, 0), (), "timesteps: expected 1 numbers"), ((9, 6, 3, 0), (9, float("nan")), "timesteps: expected 2"),
    ((9, 6, 3, 0), (9, 5, 7), r"timesteps: got \(9, 5, 7\), expected numbers that only fall or only rise"),
    ((9, 6, 7, 0), (9, 5), r"schedule: its timesteps: got \(9, 6, 7, 0\), expected numbers"),
    ((9, 6, 3, 0), (0, 5, 9), r"timesteps: got \(0, 5, 9\), which move against the schedule's own, \(9, 6, 3, 0\)")])
def test_what_cannot_be_mapped_is_refused(own, timesteps, message):
    with pytest.raises(ValueError, match=message):
        every(2, 4, timesteps=own).resampled(timesteps)


def test_a_single_step_is_no_pattern():
    """Made for one step, a schedule computes all of any number."""
    assert every(2, 1, timesteps=(500,)).resampled((900, 500, 100)).compute.all()
