"""Forecasters of the trunk: Taylor's weights by hand, what is refused, files, the bundled ones."""

import re
from dataclasses import replace

import pytest
import torch

from harmonica_dit import load, sample
from harmonica_dit.evaluate import rmse
from harmonica_dit.fashion import FORECASTS
from harmonica_dit.files import load_tensors, save_tensors
from harmonica_dit.flops import Flops
from harmonica_dit.forecaster import Rule, TrunkForecaster, taylor
from harmonica_dit.methods import trunk_forecast
from harmonica_dit.schedule import Schedule

WHOLE = [True, False, True, False, False, True]


def make(forecaster=None, compute=WHOLE, **options):
    rows = torch.tensor(compute)[:, None].repeat(1, 2)
    return Schedule(rows, ("a", "b"), Flops((3.0, 5.0), 2.0), forecaster=forecaster or taylor(compute, 1), **options)


def test_taylor_extrapolates_polynomials_exactly():
    """Order p is exact for polynomials of degree p, also from unevenly spaced steps."""
    compute = [True, True, False, True, False, False, False, True, False]
    for order in range(4):
        forecaster = taylor(compute, order)
        for s, computed in enumerate(compute):
            points = [p for p in range(s) if compute[p]][::-1][: order + 1]
            if computed or len(points) <= order:
                continue
            for degree in range(order + 1):
                found = sum(w * p**degree for w, p in zip(forecaster.states[s, :, 0].tolist(), points))
                assert found == pytest.approx(s**degree, rel=1e-5)


def test_adams_weighs_the_mean_over_a_step():
    """Exact for the mean of a polynomial of degree p over the step; of computed steps alone, Adams and Bashforth's."""
    compute = [True, True, False, True, False, True, True]
    for order in range(3):
        w = taylor(compute, order, adams=True).states[:, :, 0].tolist()
        for s, computed in enumerate(compute):
            points = [p for p in range(s + 1) if compute[p]][::-1][: order + 1]
            if len(points) <= order:
                continue
            weights = [1 - sum(w[s]), *w[s]] if computed else w[s]
            for degree in range(order + 1):
                mean = ((s + 1) ** (degree + 1) - s ** (degree + 1)) / (degree + 1)
                assert sum(a * p**degree for a, p in zip(weights, points)) == pytest.approx(mean, rel=1e-5)
    adams = taylor([True] * 4, 2, adams=True).states[:, :, 0]
    assert adams[2, :2].tolist() == pytest.approx([-16 / 12, 5 / 12])  # beside 23/12 of its own
    assert adams[1, :2].tolist() == pytest.approx([-1 / 2, 0])


OPTIONS = dict(seed=3, guidance=1.5)


@pytest.fixture(scope="module")
def fashion():
    return load("fashion-dit")


@pytest.fixture(scope="module")
def uncached(fashion):
    return sample(fashion, torch.arange(10), steps=20, **OPTIONS)


@pytest.fixture(scope="module")
def accurate(fashion):
    return sample(fashion, torch.arange(10), steps=40, scheduler="DPMSolverMultistepScheduler", **OPTIONS)


def test_adams_is_nearer_to_the_accurate_solution_than_the_uncached_trajectory(fashion, uncached, accurate):
    """On the bundled model with every second step computed; Taylor's forecast is not."""
    errors = [rmse(images, accurate).mean() for images in (uncached, *(
        sample(fashion, torch.arange(10), schedule=trunk_forecast(fashion, 20, every=2, adams=adams), **OPTIONS)
        for adams in (False, True)))]
    assert errors[2] < 0.7 * errors[0] < errors[1]


def test_weights_in_the_kernels_form():
    """Of a corrected and of two forecast steps, with and without tokens; nothing where a step is not corrected."""
    states, own = torch.zeros(3, 1, 2), torch.zeros(3, 2)
    states[1], states[2], own[2] = torch.tensor([0.5, 2.0]), torch.tensor([0.25, 0.0]), torch.tensor([1.0, 0.0])
    first, forecast, corrected = TrunkForecaster(states, None, own).weights([True, False, True])
    assert first is None
    assert forecast.own is None and forecast.tokens is None
    assert torch.equal(forecast.states, torch.tensor([[-0.5, 1.0]]))  # beside the state itself
    assert torch.equal(corrected.states, torch.tensor([[0.25, 0.0]]))
    assert torch.equal(corrected.own, torch.tensor([0.75, 0.0]))
    tokens = torch.full((3, 1, 2), 0.5)
    _, forecast, _ = TrunkForecaster(states, tokens, own).weights([True, False, True])
    assert torch.equal(forecast.states, states[1]) and torch.equal(forecast.tokens, -tokens[1])
    assert torch.equal(forecast.own, torch.tensor([-0.5, -0.5]))  # x is the tokens, which come in with 0.5


def test_flops_of_the_forecaster_count():
    plain, counted = make(), make(replace(taylor(WHOLE, 1), size=7))
    assert plain.speedup == pytest.approx(6 * 10 / (6 * 2 + 3 * 8))
    terms = 1 + 2 + 2  # states weighed at the three forecast steps
    assert counted.speedup == pytest.approx(6 * 10 / (6 * 2 + 3 * 8 + 2 * 7 * terms))


@pytest.mark.parametrize("arguments, kind, message", [
    (dict(states=torch.zeros(6, 2)), TypeError, "states: got torch.float32 of shape"),
    (dict(states=torch.zeros(6, 5, 1)), ValueError, "weighs 5 states"),
    (dict(states=torch.zeros(6, 2, 1).double()), TypeError, "states: got torch.float64"),
    (dict(states=torch.full((6, 2, 1), float("nan"))), ValueError, "states: has entries that are not finite"),
    (dict(states=torch.zeros(6, 2, 3), tokens=torch.zeros(6, 2, 1)), TypeError, "tokens: got"),
    (dict(states=torch.zeros(6, 2, 3), own=torch.zeros(5, 3)), TypeError, "own: got"),
    (dict(states=torch.zeros(6, 2, 3), own=torch.full((6, 3), float("inf"))), ValueError, "own: has entries")])
def test_what_is_no_forecaster_is_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        TrunkForecaster(**arguments)


def test_a_schedule_that_does_not_fit_its_forecaster_is_refused():
    with pytest.raises(ValueError, match="for 5 steps, the schedule has 6"):
        make(TrunkForecaster(torch.zeros(5, 1, 1)))
    with pytest.raises(ValueError, match="keeps 4 states, the schedule computes 3 steps"):
        make(TrunkForecaster(torch.zeros(6, 4, 1)))
    with pytest.raises(TypeError, match="got str, expected a TrunkForecaster"):
        make("taylor")
    compute = torch.tensor(WHOLE)[:, None].repeat(1, 2)
    compute[2, 0] = False
    with pytest.raises(ValueError, match=r"steps \[2\] are computed in part"):
        replace(make(), compute=compute)
    with pytest.raises(ValueError, match="give one of both"):
        make(extrapolation=torch.ones(6, 2))


@pytest.mark.parametrize("compute, order, adams, origin", [
    ("1010", 2, False, "Taylor of order 1 (2 asked for)"), ("1000", 1, False, "Taylor of order 0 (1 asked for)"),
    ("1001", 1, False, "Taylor of order 0 (1 asked for)"), ("11010", 2, False, "Taylor of order 2"),
    ("1001", 1, True, "Adams of order 1"), ("1111", 3, True, "Adams of order 3"), ("1", 1, True,
     "Adams of order 0 (1 asked for)"), ("1111", 1, False, "Taylor of order 1"), ("10", 0, False, "Taylor of order 0")])
def test_the_origin_tells_the_order_that_is_reached(compute, order, adams, origin):
    assert taylor([c == "1" for c in compute], order, adams=adams).origin == origin


@pytest.mark.parametrize("kind", ["taylor", "learned"])
def test_a_file_gives_the_schedule_back(tmp_path, kind):
    forecaster = taylor(WHOLE, 2, 5) if kind == "taylor" else TrunkForecaster(
        torch.randn(6, 3, 4), torch.randn(6, 3, 4), torch.randn(6, 4), torch.randn(6, 7), 5, "learned")
    schedule = make(forecaster, timesteps=(9, 8, 7, 6, 5, 4))
    schedule.save(tmp_path / "s.safetensors")
    found = Schedule.load(tmp_path / "s.safetensors")
    assert (found.rows, found.timesteps, found.speedup) == (schedule.rows, schedule.timesteps, schedule.speedup)
    assert (found.forecaster.size, found.forecaster.origin) == (5, forecaster.origin)
    assert found.forecaster.rule == forecaster.rule == (Rule(2) if kind == "taylor" else None)
    for name in ("states", "tokens", "own", "condition"):
        mine, theirs = getattr(found.forecaster, name), getattr(forecaster, name)
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)


@pytest.mark.parametrize("change, message", [
    (dict(format=1), "expected format version 2, got 1"), (dict(forecaster={}), "its forecaster has no 'size'"),
    (dict(forecaster=dict(size=0, origin="", taylor=dict(order=4, adams=False))), "order: got 4"),
    (dict(forecaster=dict(size=0, origin="", taylor=dict(order=1, adams=1))), "rule: got Rule"),
    (dict(forecaster=dict(size=0, origin="", taylor=dict(other=1))), "other"),
    (dict(forecaster=None), "expected format version")])
def test_a_damaged_file_is_refused(tmp_path, change, message):
    make().save(tmp_path / "s.safetensors")
    tensors, metadata = load_tensors(tmp_path / "s.safetensors")
    metadata |= change
    if metadata["forecaster"] is None:
        del metadata["forecaster"]
    save_tensors(tmp_path / "s.safetensors", tensors, metadata)
    with pytest.raises(ValueError, match=message):
        Schedule.load(tmp_path / "s.safetensors")


BUNDLED = sorted(file.stem for file in FORECASTS.glob("*.safetensors"))


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_forecast_does_what_its_name_says(fashion, uncached, accurate, name):
    """Its speedup, at most 1 % of the model's parameters, and images nearer to its target than Taylor's."""
    net, schedule = fashion, Schedule.load(name)
    speedup, to_uncached = re.fullmatch(r"fashion-dit-forecast-([\d.]+)x(-uncached)?", name).groups()
    assert schedule.speedup == pytest.approx(float(speedup), 0.02)
    assert schedule.forecaster.parameters <= 0.01 * sum(p.numel() for p in net.parameters())
    target = uncached if to_uncached else accurate
    errors = [(sample(net, torch.arange(10), schedule=one, **OPTIONS) - target).square().mean() ** 0.5 for one in (
        schedule, *(replace(schedule, forecaster=taylor(schedule.compute[:, 0].tolist(), order)) for order in (1, 2)))]
    assert BUNDLED and errors[0] < 0.8 * min(errors[1:])
