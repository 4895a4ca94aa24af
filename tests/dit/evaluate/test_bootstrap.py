"""Bootstrap intervals against theory: a mean's is ±1.96 standard errors, a difference's that of the differences."""

import pytest
import torch

from harmonica_dit.evaluate import bootstrap, interval
from harmonica_dit.evaluate.bootstrap import draws, frechet_draws, mean_draws
from harmonica_dit.evaluate.reference import Gaussian


def test_an_interval_of_a_mean_is_as_wide_as_theory_says(monkeypatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 2000)
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = interval(mean_draws(values), values.mean().item())
    assert (low + high) / 2 == pytest.approx(values.mean().item(), abs=0.005)
    assert high - low == pytest.approx(2 * 1.96 * values.std().item() / 1000**0.5, rel=0.06)


def test_draws_are_paired_so_that_a_difference_is_known_better_than_its_parts():
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(500, generator=generator)
    other = values + 0.1 + 0.01 * torch.randn(500, generator=generator)
    apart = mean_draws(other) - mean_draws(values)
    low, high = interval(apart, (other - values).mean().item())
    assert 0.097 < low < high < 0.103
    assert interval(mean_draws(values), values.mean().item())[1] - values.mean() > 0.05
    for first, second in zip(draws(500), draws(500)):
        assert torch.equal(first, second) and 0 <= first.min() and first.max() < 500
    assert len(list(draws(7))) == bootstrap.RESAMPLES >= 100


def test_an_interval_of_a_frechet_distance_holds_the_distance(monkeypatch):
    """Draws with replacement lie too high: here all of them above the distance itself."""
    monkeypatch.setattr(bootstrap, "RESAMPLES", 30)
    features = torch.randn(400, 20, generator=torch.Generator().manual_seed(3))
    real = Gaussian(torch.zeros(20).double(), torch.eye(20).double(), 1000)
    metric = bootstrap.frechet_metric(20, real)
    metric.update(features, real=False)
    distance, drawn = metric.compute().item(), frechet_draws(features, real)
    assert drawn.shape == (30,) and drawn.min() > distance
    low, high = interval(drawn, distance)
    assert low < distance < high < drawn.max()
