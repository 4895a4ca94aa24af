"""Schedules: the table and what follows from it, FORA, files."""

import dataclasses
import os
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from harmonica_dit.files import load_tensors, save_tensors
from harmonica_dit.flops import Flops, count_flops
from harmonica_dit.forecaster import BranchForecaster, TrunkForecaster, forecast_ratios
from harmonica_dit.methods import fora, trunk_forecast, uncached
from harmonica_dit.models.dit import DiT
from harmonica_dit.sample import sample
from harmonica_dit.sample.trajectory import Trajectory, image_noise
from harmonica_dit.schedule import Schedule

FLOPS = Flops((3.0, 5.0), 2.0)
NAMES = ("a", "b")


def table(*rows):
    return torch.tensor([[c == "1" for c in row] for row in rows])


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return DiT(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=4,
               name="tiny")


def naive_ratio(column, s):
    """The ratio for step s of one branch whose decisions are `column`, by going back step for step."""
    computed = [i for i in range(s) if column[i]]
    return (s - computed[-1]) / (computed[-1] - computed[-2]) if len(computed) > 1 else 0.0


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 8), st.integers(1, 4), st.randoms(use_true_random=False))
def test_forecast_ratios_equal_a_naive_loop(s, K, rng):
    compute = torch.tensor([[rng.random() < 0.5 for _ in range(K)] for _ in range(s)], dtype=torch.bool).view(s, K)
    expected = [naive_ratio(compute[:, k].tolist(), s) for k in range(K)]
    assert forecast_ratios(compute).tolist() == torch.tensor(expected, dtype=torch.float32).tolist()


def test_numbers_by_hand():
    schedule = Schedule(table("11", "01", "10", "00"), NAMES, FLOPS)
    assert schedule.steps == 4
    assert schedule.cur == 4 / 8
    assert schedule.speedup == pytest.approx(4 * 10 / (8 + 2 + 5 + 2 + 3 + 2 + 2))
    assert schedule.rows == ((True, True), (False, True), (True, False), (False, False))
    assert schedule.forecast_weights == (None,) * 4 and schedule.history == 1


def test_forecasts_by_hand():
    a = torch.tensor([[9.0, 9], [9, 9], [1, 0], [0.5, 0.25], [0, 1]])
    schedule = Schedule(table("11", "11", "01", "00", "10"), NAMES, FLOPS, a)
    # branch a was computed at 0 and 1: two steps later the ratio is 2; branch b at 1 and 2: one step later 1
    assert schedule.forecast_weights == (None, None, (1.0, 0.0), (1.0, 0.25), (0.0, 2.0))
    assert schedule.history == 2


def test_a_coefficient_without_two_outputs_forecasts_nothing():
    schedule = Schedule(table("11", "00", "00"), NAMES, FLOPS, torch.ones(3, 2))
    assert schedule.forecast_weights == (None,) * 3 and schedule.history == 1


@pytest.mark.parametrize("change, error, message", [
    (dict(compute=table("10", "11")), ValueError, r"row 0 .* reuses \[1\]"),
    (dict(compute=torch.ones(2, 2)), TypeError, "compute: got torch.float32"),
    (dict(compute=torch.ones(4, dtype=torch.bool)), TypeError, r"expected a bool tensor \[T, K\]"),
    (dict(compute=torch.ones(0, 2, dtype=torch.bool)), TypeError, "compute"),
    (dict(branches=("a",)), ValueError, "branches: expected 2 names"),
    (dict(flops=Flops((1.0,), 2.0)), ValueError, "flops: expected 2"),
    (dict(flops=Flops((1.0, 1.0), 1e308)), ValueError, "flops: expected 2 .* at most 1e30"),
    (dict(flops=Flops((1.0, float("nan")), 2.0)), ValueError, "flops"),
    (dict(flops=Flops((1e308, 1e308), 2.0)), ValueError, "flops"),
    (dict(flops=Flops((10**400, 1.0), 2.0)), ValueError, "flops"),
    (dict(flops=3), TypeError, "flops"),
    (dict(extrapolation=torch.zeros(2, 3)), TypeError, r"extrapolation: .*\[2, 2\]"),
    (dict(extrapolation=torch.zeros(2, 2, dtype=torch.float64)), TypeError, "extrapolation"),
    (dict(extrapolation=torch.full((2, 2), float("nan"))), ValueError, "extrapolation: has entries"),
    (dict(timesteps=(1,)), ValueError, "timesteps: expected 2"),
    (dict(timesteps=(10**400, 1)), ValueError, "timesteps: expected 2"),
    (dict(timesteps=(True, 1)), ValueError, "timesteps: expected 2"),
    (dict(origin=None), TypeError, "origin"),
    (dict(architecture={"class": 1.5}), TypeError, "architecture"),
    (dict(resolution=(8.0, 8)), ValueError, "resolution"), (dict(resolution=(0, 8)), ValueError, "resolution"),
    (dict(resolution=(8, 8, 8)), ValueError, "resolution"),
    (dict(architecture={1: "class"}), TypeError, "architecture"),
    (dict(scheduler_config=[3]), TypeError, "scheduler_config: got list"),
    (dict(scheduler_config={"solver_order": 10**9}), ValueError, "scheduler_config: .* numbers up to 10,000"),
    (dict(scheduler_config={"trained_betas": [0.1] * 10_001}), ValueError, "scheduler_config"),
    (dict(scheduler_config={"beta_end": float("nan")}), ValueError, "scheduler_config"),
    (dict(scheduler_config={"_class_name": "DDIMScheduler"}), ValueError, "scheduler_config"),
    (dict(scheduler_config={"shift": {"of": 1}}), ValueError, "scheduler_config"),
    (dict(scheduler_config={"shift": 1}), ValueError, "scheduler_config: .* but scheduler is None"),
])
def test_what_is_no_schedule_is_refused(change, error, message):
    good = dict(compute=table("11", "01"), branches=NAMES, flops=FLOPS)
    Schedule(**good)
    with pytest.raises(error, match=message):
        Schedule(**good | change)


def test_a_schedule_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Schedule(table("11"), NAMES, FLOPS).origin = "other"


def test_fora_recomputes_every_nth_step(net):
    schedule = fora(net, 7, 3)
    assert [all(row) for row in schedule.rows] == [True, False, False, True, False, False, True]
    assert [any(row) for row in schedule.rows] == [True, False, False, True, False, False, True]
    assert schedule.branches == net.branch_names and schedule.history == 1
    total, fixed = schedule.flops.total, schedule.flops.fixed
    assert schedule.speedup == pytest.approx(7 * total / (3 * total + 4 * fixed))


def test_taylorseer_forecasts_linearly(net):
    schedule = fora(net, 7, 3, order=1)
    K = len(net.branch_names)
    assert schedule.forecast_weights[:4] == (None,) * 4  # one output is no line yet
    assert schedule.forecast_weights[4:6] == (pytest.approx((1 / 3,) * K), pytest.approx((2 / 3,) * K))
    assert schedule.history == 2


def test_higher_orders_forecast_polynomials_exactly(net):
    """As many computed steps as there are; then order + 1 of them."""
    schedule = fora(net, 12, 3, order=2)
    assert schedule.history == 3 and schedule.forecast_weights[:4] == (None,) * 4
    for s, degree in ((4, 1), (5, 1), (7, 2), (8, 2), (10, 2)):
        steps = [p for p in range(s) if p % 3 == 0][::-1]
        for w in schedule.forecast_weights[s]:
            for power in range(degree + 1):
                assert sum(a * p**power for a, p in zip(w, steps)) == pytest.approx(s**power)
    assert schedule.forecast_weights[6] is None


def test_a_branch_forecaster_of_the_first_order_is_the_extrapolation(net):
    one = fora(net, 7, 3, order=1)
    other = dataclasses.replace(one, extrapolation=None, forecaster=BranchForecaster(1))
    labels = [0, 1]
    torch.testing.assert_close(sample(net, labels, steps=7, schedule=other), sample(net, labels, steps=7, schedule=one))
    with pytest.raises(ValueError, match="knows"):
        other.decision_tables()


def test_a_branch_forecaster_goes_with_any_rows(net, tmp_path):
    """Branch by branch, from the steps that computed it; and through a file."""
    compute = torch.rand(8, len(net.branch_names)) < 0.5
    compute[0] = True
    made = Schedule(compute, net.branch_names, count_flops(net), forecaster=BranchForecaster(3))
    made.save(tmp_path / "s.safetensors")
    found = Schedule.load(tmp_path / "s.safetensors")
    assert found.forecaster == made.forecaster and found.forecast_weights == made.forecast_weights
    for s, row in enumerate(made.forecast_weights):
        for k in range(len(net.branch_names)):
            points = [p for p in range(s) if compute[p, k]][::-1][:4]
            w = 0.0 if row is None else row[k]
            if compute[s, k] or len(points) < 2:
                assert w == 0.0
            else:
                assert sum(a * p for a, p in zip(w, points)) == pytest.approx(s) and len(w) == len(points)
    assert len(sample(net, [0], steps=8, schedule=found)) == 1
    with pytest.raises(ValueError, match="order: got 4"):
        BranchForecaster(4)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_runs_of_branches_are_decided_together(net, tmp_path, order):
    """Through a file and the sampler, which is given the same as a loop of plain calls."""
    K = len(net.branch_names)
    compute = torch.zeros(6, K, dtype=torch.bool)
    compute[[0, 2, 3]], compute[4, :2] = True, True
    coefficients = torch.full((6, K), float(order == 1))
    made = Schedule(compute, net.branch_names, count_flops(net), coefficients, runs=(2, K - 2),
                    forecaster=BranchForecaster(2) if order == 2 else None)
    assert made.rows[4] == (True, False) and made.branch_rows[4] == (True, True, *(False,) * (K - 2))
    assert made.cur == 1 - compute.double().mean() and made.new_cache().runs == (2, K - 2)
    made.save(tmp_path / "s.safetensors")
    found = Schedule.load(tmp_path / "s.safetensors")
    assert (found.runs, found.rows, found.forecast_weights) == (made.runs, made.rows, made.forecast_weights)
    trajectory, cache = Trajectory(net, torch.tensor([0, 1]), steps=6), made.new_cache()
    noise = image_noise(0, 0, 2, net.sample_shape)
    with torch.no_grad():
        x = trajectory.start(noise)
        for s in range(6):
            output = trajectory.predict(x, s, row=made.rows[s], cache=cache, forecast_weights=made.forecast_weights[s])
            x = trajectory.advance(output, s, x)
    torch.testing.assert_close(sample(net, [0, 1], steps=6, schedule=found), x, rtol=1e-4, atol=1e-4)
    apart = sample(net, [0, 1], steps=6, schedule=dataclasses.replace(found, runs=None))
    assert (apart - x).abs().max() > 1e-3, "a run keeps the gates of the step that computed it"
    with pytest.raises(ValueError, match="runs of branches"):
        made.decision_tables()


@pytest.mark.parametrize("change, message", [
    (dict(runs=(1, 1, 1)), "runs: hold 3 branches, there are 2"), (dict(runs=(0, 2)), "runs: got"),
    (dict(runs=(2,), compute=table("11", "01")), "compute: differs within the run of the branches 0 to 1"),
    (dict(runs=(2,), extrapolation=torch.tensor([[0.0, 0.0], [1.0, 0.0]])), "extrapolation: differs within")])
def test_runs_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**dict(compute=table("11", "00"), branches=NAMES, flops=FLOPS) | change)


@pytest.mark.parametrize("arguments, name", [((0, 2), "steps"), ((5, 0), "every"), ((5, 2.0), "every"),
                                             ((True, 2), "steps"), ((5, 2, 4), "order")])
def test_fora_refuses(net, arguments, name):
    with pytest.raises(ValueError, match=name):
        fora(net, *arguments)


def test_uncached_computes_everything(net):
    schedule = uncached(net, 3)
    assert schedule.cur == 0 and schedule.speedup == 1


def test_nothing_gained_is_said(net):
    """Nothing reused, nothing forecast, or to a lower order than was asked for."""
    nothing = "reuses nothing: every branch is computed at every step"
    for schedule in (uncached(net, 3), fora(net, 1, 2), fora(net, 4, 1, order=2), trunk_forecast(net, 1, every=2),
                     trunk_forecast(net, 4, every=1), trunk_forecast(net, 1, every=1, adams=True)):
        assert schedule.nothing_gained() == nothing
    for schedule in (fora(net, 4, 2), fora(net, 9, 9), fora(net, 4, 2, 1), fora(net, 12, 3, 3), trunk_forecast(
            net, 4, every=2), trunk_forecast(net, 4, every=4, order=0), trunk_forecast(net, 4, every=1, adams=True),
            trunk_forecast(net, 3, every=2, adams=True)):
        assert schedule.nothing_gained() is None
    for schedule, reached, order in [
            (fora(net, 2, 2, 1), 0, 1), (fora(net, 9, 9, 1), 0, 1), (fora(net, 3, 2, 1), 0, 1),
            (fora(net, 9, 3, 3), 2, 3), (trunk_forecast(net, 2, every=2), 0, 1),
            (trunk_forecast(net, 6, every=2, order=3), 2, 3), (trunk_forecast(net, 2, every=2, adams=True), 0, 1),
            (trunk_forecast(net, 5, every=3, order=2, adams=True), 1, 2)]:
        assert schedule.nothing_gained() == (f"forecasts to order {reached}, not {order}: too few steps are computed "
                                             "before those that are forecast")
    mixed = Schedule(table("11", "11", "10", "01"), NAMES, FLOPS, forecaster=BranchForecaster(2))
    assert mixed.nothing_gained() is None  # branch a has been computed three times before it is forecast
    once = Schedule(table("11", "10"), NAMES, FLOPS, torch.tensor([[1.0, 1], [1, 0]]))  # no coefficient where it reuses
    assert once.nothing_gained() is None
    once = dataclasses.replace(once, extrapolation=torch.ones(2, 2))  # branch a, always computed, needs no forecast
    assert once.nothing_gained().startswith("forecasts to order 0, not 1")
    learned = dataclasses.replace(trunk_forecast(net, 2, every=2), forecaster=TrunkForecaster(torch.zeros(2, 1, 1)))
    assert learned.nothing_gained() is None


def test_check_names_what_does_not_fit(net):
    trajectory = Trajectory(net, torch.tensor([0]), steps=4)
    fora(net, 4, 2).check(net, trajectory)
    with pytest.raises(ValueError, match="5 steps, the trajectory has 4"):
        fora(net, 5, 2).check(net, trajectory)
    with pytest.raises(ValueError, match="2 branches"):
        Schedule(table("11", "01", "11", "11"), NAMES, FLOPS).check(net, trajectory)
    renamed = dataclasses.replace(fora(net, 4, 2), branches=("x", *net.branch_names[1:]))
    with pytest.raises(ValueError, match="branch 0 is 'x'"):
        renamed.check(net, trajectory)
    with pytest.warns(UserWarning, match="model 'other'"):
        dataclasses.replace(fora(net, 4, 2), model="other").check(net, trajectory)
    with pytest.warns(UserWarning, match="other timesteps"):
        dataclasses.replace(fora(net, 4, 2), timesteps=(4, 3, 2, 1)).check(net, trajectory)


def test_round_trip(tmp_path):
    rng = random.Random(0)
    compute = torch.tensor([[True] * 3] + [[rng.random() < 0.5 for _ in range(3)] for _ in range(5)])
    schedule = Schedule(compute, ("a", "b", "c"), Flops((1.0, 2.5, 3.0), 0.1), torch.randn(6, 3), "made up", "tiny",
                        (5, 4, 3, 2, 1, 0.5))
    schedule.save(tmp_path / "new" / "s.safetensors")
    loaded = Schedule.load(tmp_path / "new" / "s.safetensors")
    for field in dataclasses.fields(Schedule):
        mine, theirs = getattr(schedule, field.name), getattr(loaded, field.name)
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
    assert loaded.forecast_weights == schedule.forecast_weights and loaded.speedup == schedule.speedup


def test_hostile_files_are_refused_by_name(tmp_path):
    path = tmp_path / "s.safetensors"
    Schedule(table("11", "01"), NAMES, FLOPS).save(path)
    whole = path.read_bytes()
    tensors, metadata = load_tensors(path)

    def check_refusal(message):
        with pytest.raises(ValueError, match=message) as error:
            Schedule.load(path)
        assert str(path) in str(error.value)

    for damaged in (b"", whole[:7], whole[:-1], b"\xff" * 8 + whole[8:], b"\x00" * 100,
                    whole.replace(b"BOOL", b"BOOM")):
        path.write_bytes(damaged)
        check_refusal("not a whole safetensors file")
    save_file({"compute": tensors["compute"]}, path)
    check_refusal("expected a schedule")
    for name, value, message in (("kind", "router", "expected a schedule"), ("format", 2, "format version 1, got 2"),
                                 ("flops", 3, "flops"), ("flops", [["x", 1], 2], "flops"),
                                 ("branches", "ab", "branches"),
                                 ("timesteps", [1], "timesteps"), ("timesteps", {"a": 1}, "timesteps")):
        save_tensors(path, tensors, metadata | {name: value})
        check_refusal(message)
    save_tensors(path, tensors, {name: value for name, value in metadata.items() if name != "flops"})
    check_refusal("has to hold flops")
    save_tensors(path, {"compute": tensors["compute"]}, metadata)
    check_refusal("has to hold extrapolation")
    save_tensors(path, tensors | {"extrapolation": torch.full((2, 2), float("nan"))}, metadata)
    check_refusal("not finite")
    save_file(tensors, path, {name: "[" * 100_000 for name in metadata})
    check_refusal("not JSON")
    save_file(tensors, path, {name: "9" * 10_000 for name in metadata})
    check_refusal("not JSON")
    with pytest.raises(FileNotFoundError, match="missing"):
        Schedule.load(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_permissions_that_the_umask_allows(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        Schedule(table("11", "01"), NAMES, FLOPS).save(tmp_path / "s.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "s.safetensors").stat().st_mode & 0o777 == mode


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    Schedule(table("11", "01"), NAMES, FLOPS, origin="old").save(path)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Schedule(table("11", "11"), NAMES, FLOPS, origin="new").save(path)
    assert Schedule.load(path).origin == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
