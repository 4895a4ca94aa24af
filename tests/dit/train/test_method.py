"""That the method is worth something: a learned schedule beats what is left of it with a part of the method taken out.

All arms compute as much as each other and are judged on noise that none was trained on, by how far their images are
from the uncached ones. The margins are about half of those that eight training seeds had (see the tests).
"""

from dataclasses import replace
from statistics import fmean

import pytest
import torch

import harmonica_dit
from harmonica_dit.evaluate.metrics import rmse
from harmonica_dit.train import train as trainer

STEPS, SPEEDUP = 6, 1.6
SETTINGS = dict(steps=STEPS, target_speedup=SPEEDUP, trajectories=16, batch=4, lr=0.3, threshold=0.5, seed=3,
                progress=False)


@pytest.fixture(scope="module")
def model():
    return harmonica_dit.load("fashion-dit")


@pytest.fixture(scope="module")
def error(model):
    """How far a schedule's images are from the uncached ones of the same noise: mean RMSE over one of each class."""

    def sample(schedule=None):
        return harmonica_dit.sample(model, torch.arange(10), steps=STEPS, schedule=schedule, seed=100)

    uncached = sample()
    return lambda schedule: rmse(sample(schedule), uncached).mean().item()


def train(model):
    schedule = trainer.train_router(model, **SETTINGS).schedule()
    assert SPEEDUP <= schedule.speedup <= 1.02 * SPEEDUP  # so that no arm wins by computing more
    return schedule


@pytest.fixture(scope="module")
def learned(model):
    return train(model)


def shuffle(schedule, seed, *, within_steps):
    """Other entries computed, as many of attention and as many of feed-forward: so at the same FLOPs.

    Row 0 stays. within_steps: each step computes as many as before, else the steps change too.
    """
    generator = torch.Generator().manual_seed(seed)
    compute = schedule.compute.clone()
    for kind in (0, 1):  # attention and feed-forward alternate; all branches of a kind cost the same
        entries = compute[1:, kind::2]
        order = torch.rand(entries.shape if within_steps else entries.numel(), generator=generator).argsort(-1)
        compute[1:, kind::2] = entries.gather(1, order) if within_steps else entries.flatten()[order].view_as(entries)
    other = replace(schedule, compute=compute)
    assert other.speedup == pytest.approx(schedule.speedup)
    return other


def test_importance_brings_the_images_nearer_to_the_uncached_ones(model, learned, error):
    """λ = 1 is SDT without IEPO: it spends on the last step, of whose error next to nothing reaches the image (λ is
    0.003 there), and saves step 2 for it. Its error was 1.7 to 2.3 times as large (eight training seeds, mean 2.05)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "measure_importance", lambda router, *_, **__: torch.ones(router.steps))
        without = train(model)
    farther, ours = error(without), error(learned)
    assert farther > 1.5 * ours


def test_a_learned_schedule_beats_every_random_one(learned, error):
    """The best of twenty was 2.7 to 2.9 times as far off, with two training seeds."""
    best, ours = min(error(shuffle(learned, seed, within_steps=False)) for seed in range(20)), error(learned)
    assert best > 1.8 * ours


def test_which_branches_a_step_computes_is_learned_too(learned, error):
    """Beside how many it computes. With others in their place the error was 1.4 to 2.2 times as large, mean 1.9."""
    mean, ours = fmean(error(shuffle(learned, seed, within_steps=True)) for seed in range(10)), error(learned)
    assert mean > 1.3 * ours
