"""`train_router` against the same training written once more, in float64 (oracle.py): the method as a whole."""

import csv
import itertools

import numpy as np
import pytest
import torch
from oracle import Oracle
from safetensors.torch import load_file

from harmonica_dit.train import start, train_router

CHANNELS, K, SEED = 2, 4, 3  # of the noise; as many more are the learned variance's
# Wherever a number may be any, it is one that tells things apart: λ is measured again before trajectory 3, 2 and 4, and
# 3, once where C is no multiple of T; lr = 1.5 takes logits to ±5; τ leaves some entries below and some above it.
FACTORS = dict(
    importance=["paper", "reference", "gain"], importance_rows=["soft", "hard"], costs=["flops", "ones"],
    compare=["all", "noise"], extrapolation=[0, 0.5, "learned"], threshold=[0.4, 0.6],
    importance_scale=["normalised", "raw"],
    goal=[dict(beta=1e-3), dict(target_speedup=1.4), dict(target_cur=0.4)],
    guide=[dict(guidance=1.0, halves="both"), dict(guidance=1.5, guidance_channels=1, halves="both"),
           dict(guidance=2.0, guidance_channels=3, halves="one")],
    size=[dict(steps=4, batch=2, refresh=9, lr=0.03, eps=1e-16, reseed=False),
          dict(steps=5, batch=1, refresh=10, lr=1.5, eps=1e-16, reseed=True),
          dict(steps=6, batch=2, refresh=18, lr=0.1, eps=1e-3, reseed=False)])


def covering():
    """Cases in which every two values of different factors meet: greedily, the one with most pairs that are new."""
    rows = list(itertools.product(*(range(len(values)) for values in FACTORS.values())))
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in rows}
    missing, cases = set().union(*pairs.values()), []
    while missing:
        best = max(rows, key=lambda row: len(pairs[row] & missing))
        missing -= pairs[best]
        chosen = {name: values[i] for i, (name, values) in zip(best, FACTORS.items(), strict=True)}
        cases.append(chosen.pop("goal") | chosen.pop("guide") | chosen.pop("size") | chosen)
    return cases


@pytest.mark.filterwarnings("ignore:target_")  # so few entries cannot meet a target to 2 %
@pytest.mark.parametrize("settings", covering(), ids=lambda case: "-".join(map(str, case.values())))
def test_a_training_is_the_one_written_in_the_design(nets, tmp_path, monkeypatch, settings):
    check(nets, tmp_path, monkeypatch, trajectories=5, **settings)


USUAL = dict(batch=1, lr=0.1, eps=1e-16, threshold=0.4, importance="paper", importance_rows="soft",
             importance_scale="normalised", reseed=False, costs="flops", compare="all", halves="one", extrapolation=0,
             guidance=1.0)


@pytest.mark.filterwarnings("ignore:target_")
def test_the_running_mean_of_a_target_looks_back_on_ten_trajectories(nets, tmp_path, monkeypatch):
    check(nets, tmp_path, monkeypatch, trajectories=13, steps=4, refresh=8, target_speedup=1.5, **USUAL)


@pytest.mark.filterwarnings("ignore:target_")
def test_a_target_that_keeps_entries_of_no_worth_has_a_beta_of_zero(nets, tmp_path, monkeypatch):
    """Where computing an entry makes the error larger, its value is below 0; a cost below 0 would reward it."""
    oracle = check(nets, tmp_path, monkeypatch, trajectories=3, steps=6, refresh=18, target_cur=0.04, **USUAL)
    assert oracle.cut(oracle.mean_values) < 0 and oracle.betas == [0, 0, 0]


def check(nets, folder, monkeypatch, *, trajectories, steps, batch, compare, reseed, guidance_channels=3, **settings):
    """Runs both trainings and compares all that they leave; returns the oracle's.

    The trainer's x is of its noise's dtype, so it is given float64 noise, and its router alone is float32: AdamW makes
    nearly the same update of a gradient whatever its size, so float32 latents would bring in as much as 1e-2 where a
    gradient is nothing but rounding. With float64 ones, rows were off by at most 1.4e-4 of lr, losses and β by 3e-5 of
    themselves; λ of the last row, and the values that it weighs, by 2e-4, because diffusers keeps ᾱ in float32 and
    1 - ᾱ is 1e-4 at timestep 0. The tolerances are some 7 to 10 times that.
    """
    net, plain = nets
    real = start.image_noise
    monkeypatch.setattr(start, "image_noise", lambda *arguments: real(*arguments).double())
    router = train_router(net, steps=steps, batch=batch, compare=compare, guidance_channels=guidance_channels,
                          trajectories=trajectories, reseed=reseed, seed=SEED, out=folder, progress=False, **settings)
    logits = torch.randn(steps, K, generator=torch.Generator().manual_seed(SEED))
    drawn = numbers(trajectories, steps, settings["refresh"], reseed)
    oracle = Oracle(plain, noise(drawn, batch), labels(drawn, batch), logits, router.flops.branches, router.flops.fixed,
                    guided=guidance_channels,
                    compared=CHANNELS if compare == "noise" else 2 * CHANNELS, **settings)
    kept = load_file(folder / "checkpoint.safetensors")
    with open(folder / "log.csv") as file:
        log = list(csv.DictReader(file))

    near(torch.stack(list(router.logits)), torch.stack(oracle.logits[1:]), atol=1e-3 * settings["lr"])
    if settings["extrapolation"] == 0:
        assert router.coefficients is None
    else:
        near(torch.stack(list(router.coefficients)), torch.stack(oracle.a[1:]), atol=1e-3 * settings["lr"])
    near(kept["importance"], oracle.raw, rtol=2e-3)
    if "beta" not in settings:
        near(kept["steering"], oracle.mean_values, rtol=2e-3)
    for name, expected in (("loss", oracle.losses), ("error", oracle.errors), ("beta", oracle.betas),
                           ("importance", oracle.raw_means)):
        near(torch.tensor([float(line[name]) for line in log]), torch.tensor(expected), rtol=2e-4)
    near(torch.tensor([router.beta, router.threshold]), torch.tensor([oracle.beta, oracle.dit.tau]), rtol=2e-4)
    return oracle


def numbers(trajectories, steps, refresh, reseed):
    """Of the noise and labels of each trajectory: counted from the last one before which λ was measured, if reseeded.
    """
    found = []
    for n in range(trajectories):
        measured = n == 0 or n * steps // refresh > (n - 1) * steps // refresh
        found.append(0 if reseed and measured else found[-1] + 1 if found else 0)
    return found


def noise(drawn, batch):
    """[trajectories, batch, C, H, W]"""
    images = [np.random.default_rng((SEED, 2**32 + n * batch + i)).standard_normal((CHANNELS, 8, 8), np.float32)
              for n in drawn for i in range(batch)]
    return torch.from_numpy(np.stack(images)).unflatten(0, (-1, batch))


def labels(drawn, batch):
    """[trajectories, batch]"""
    return torch.from_numpy(np.stack([np.random.default_rng((SEED, n, 2)).integers(4, size=batch) for n in drawn]))


def near(found, expected, rtol=0.0, atol=0.0):
    torch.testing.assert_close(found.detach().double(), expected.detach().double(), rtol=rtol, atol=atol)
