"""bench/forecast_forms.py: matrices that are 0 change nothing, others do, and only at forecast steps; what has less."""

import pytest
import torch

from bench import forecast_forms as bench
from harmonica_dit import load
from harmonica_dit.methods import trunk_forecast
from harmonica_dit.sample.trajectory import Trajectory, image_noise
from harmonica_dit.train.unrolled import unroll


@pytest.mark.parametrize("form", bench.FORMS)
@torch.no_grad()
def test_matrices_change_forecasts_alone(form):
    net = load("fashion-dit")
    schedule = trunk_forecast(net, 6, every=3)
    compute = schedule.compute[:, 0].tolist()
    learned = bench.Forecaster(form, compute, schedule.forecaster, net.width)
    noise, labels = image_noise(0, 0, 2, net.sample_shape), torch.tensor([3, 8])

    def image():
        return unroll(bench.Mixed(learned, net, labels, steps=6), noise, learned)

    plain = unroll(Trajectory(net, labels, steps=6), noise, learned)
    assert torch.equal(image(), plain)
    for part in learned.matrices:
        part.add_(0.01)
    assert torch.equal(image(), plain) == (not len(learned.matrices))
    size = {"shared": 128**2, "low-rank": 4 * 2 * 128 * bench.RANK, "matrix": 4 * 128**2}.get(form, 0)
    weights = sum(p.numel() for name, p in learned.named_parameters() if "matrices" not in name)
    assert learned.numbers == weights + size
    if len(learned.matrices) and form != "shared":
        for part in learned.matrices:
            part[torch.tensor(compute)] = 9.0
        changed = image()
        for part in learned.matrices:
            part[torch.tensor(compute)] = 0.0
        assert torch.equal(image(), changed)


def test_forms_that_have_less(monkeypatch):
    """Of "states" neither tokens nor conditions are parameters; the loss of "no-features" is the images' alone."""
    monkeypatch.setattr(bench.Run, "train", lambda run: None)
    runs = {form: bench.train(load("fashion-dit"), form, iterations=1, seed=0) for form in bench.FORMS}
    assert {form for form, run in runs.items() if not any(map(len, run.learned.tokens))} == {"states"}
    assert {form for form, run in runs.items() if not any(map(len, run.learned.condition))} == {"states"}
    assert {form for form, run in runs.items() if not run.settings["perceptual"]} == {"no-features"}
