"""Training a forecaster: its gradient, what it learns, resuming, files, what is refused."""

from contextlib import contextmanager

import pytest
import torch

from harmonica_dit.files import load_tensors, save_tensors
from harmonica_dit.forecaster import TrunkForecaster, taylor
from harmonica_dit.methods import trunk_forecast
from harmonica_dit.sample import sample
from harmonica_dit.sample.trajectory import Trajectory, image_noise
from harmonica_dit.schedule import Schedule
from harmonica_dit.train import train_forecaster
from harmonica_dit.train.unrolled import LearnedForecaster, unroll

SMALL = dict(steps=6, iterations=30, images=8, held_out=4, batch=4, progress=False, seed=1)


def learned_weights(compute, width, history=2, noise=0.1):
    torch.manual_seed(0)
    made = LearnedForecaster(compute, taylor(compute, history - 1), width, correct=True)
    with torch.no_grad():
        for p in made.parameters():
            p += noise * torch.randn_like(p)
    return made


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_the_gradient_through_a_trajectory_is_the_finite_difference(net, guidance):
    """In float64, with forecast, corrected and first steps, and with guidance rows."""
    net, compute = net.double(), [True, False, True, False, False, True]
    learned = learned_weights(compute, net.width).double()
    noise = image_noise(0, 0, 2, net.sample_shape).double()

    def loss():
        trajectory = Trajectory(net, torch.tensor([0, 3]), steps=6, guidance=guidance)
        return unroll(trajectory, noise, learned).square().mean()

    parameters = [p for p in learned.parameters() if p.numel()]
    wanted = [p for p in parameters if p.requires_grad]
    found = torch.autograd.grad(loss(), wanted)
    with torch.no_grad():
        for p, g in zip(wanted, found):
            direction = torch.randn_like(p)
            p += 1e-5 * direction
            after = loss()
            p -= 2e-5 * direction
            difference = (after - loss()) / 2e-5
            p += 1e-5 * direction
            torch.testing.assert_close((g * direction).sum(), difference, rtol=1e-5, atol=1e-9)
    net.float()


def test_what_is_frozen_samples_what_was_unrolled(net):
    compute = [True, False, False, True, False, True]
    learned = learned_weights(compute, net.width)
    schedule = trunk_forecast(net, 6, every=1)
    schedule = Schedule(torch.tensor(compute)[:, None].repeat(1, 4), net.branch_names, schedule.flops,
                        forecaster=learned.freeze(net.tokens * net.width, ""))
    noise = image_noise(5, 0, 3, net.sample_shape)
    labels = torch.tensor([1, 2, 3])
    with torch.no_grad():
        unrolled = unroll(Trajectory(net, labels, steps=6), noise, learned)
    torch.testing.assert_close(sample(net, labels, schedule=schedule, seed=5), unrolled)


@pytest.mark.parametrize("target, scheduler", [("uncached", None), ("accurate", None),
                                               ("uncached", "DPMSolverMultistepScheduler")])
def test_it_learns_on_noise_that_it_has_not_seen(net, target, scheduler):
    """Nearer to its target than the forecast that it starts from, on the sampled images of another seed."""
    start = trunk_forecast(net, 6, speedup=1.8)
    schedule = train_forecaster(net, start, target=target, scheduler=scheduler, **SMALL | dict(lr=0.02))
    labels, options = torch.arange(12) % 4, dict(seed=9, guidance=1.5)
    solver = dict(steps=40, scheduler="DPMSolverMultistepScheduler") if target == "accurate" else dict(
        steps=6, scheduler=scheduler)
    wanted = sample(net, labels, **solver, **options)
    before, after = ((sample(net, labels, schedule=one, scheduler=scheduler, **options) - wanted).square().mean()
                     for one in (start, schedule))
    assert after < 0.8 * before


def test_an_interrupted_training_ends_with_the_same_bits(net, tmp_path):
    settings = SMALL | dict(iterations=60)
    whole = train_forecaster(net, 1.8, out=tmp_path / "whole", **settings)
    count = iter(range(300))

    def interrupt(module, inputs):
        if next(count, None) is None:
            raise KeyboardInterrupt

    handle = net.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt, match="of 60 iterations; the same call goes on from"):
            train_forecaster(net, 1.8, out=tmp_path / "run", **settings)
    finally:
        handle.remove()
    again = train_forecaster(net, 1.8, out=tmp_path / "run", **settings)
    kept = Schedule.load(tmp_path / "run" / "forecast.safetensors")
    for other in (again, kept):
        for name in ("states", "tokens", "own"):
            assert torch.equal(getattr(other.forecaster, name), getattr(whole.forecaster, name))
    with pytest.raises(ValueError, match="of a training with lr=0.004, this one has lr=0.01"):
        train_forecaster(net, 1.8, out=tmp_path / "run", **settings | dict(lr=0.01))


@contextmanager
def never_called(net):
    def fail(module, inputs):
        raise AssertionError("the model ran")

    handle = net.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_model_runs(net, tmp_path):
    (tmp_path / "file").write_text("")
    schedule = trunk_forecast(net, 6, speedup=1.8)
    with never_called(net), pytest.raises(OSError, match="cannot write into the folder"):
        train_forecaster(net, schedule, out=tmp_path / "file" / "run", **SMALL)


def test_the_folder_of_another_training_is_refused_before_the_model_runs(net, tmp_path):
    schedule, settings = trunk_forecast(net, 6, speedup=1.8), SMALL | dict(iterations=1, out=tmp_path)
    train_forecaster(net, schedule, **settings)
    with never_called(net), pytest.raises(ValueError, match="with target='accurate', this one has target='uncached'"):
        train_forecaster(net, schedule, target="uncached", **settings)


@pytest.mark.parametrize("name", ["now.states.2", "best.states.2", "done"])
def test_a_damaged_checkpoint_is_refused(net, tmp_path, name):
    train_forecaster(net, 1.8, out=tmp_path, **SMALL | dict(iterations=1))
    path = tmp_path / "checkpoint.safetensors"
    tensors, metadata = load_tensors(path)
    if name == "done":
        metadata["done"] = -1
    else:
        tensors[name] = torch.full_like(tensors[name], torch.nan)
    save_tensors(path, tensors, metadata)
    with pytest.raises(ValueError, match=f"is not a whole checkpoint: {name}: "):
        train_forecaster(net, 1.8, out=tmp_path, **SMALL | dict(iterations=1))


def test_a_file_keeps_the_forecaster_and_its_timesteps(net, tmp_path):
    schedule = train_forecaster(net, 1.8, **SMALL | dict(iterations=1))
    schedule.save(tmp_path / "s.safetensors")
    found = Schedule.load(tmp_path / "s.safetensors")
    assert found.timesteps == schedule.timesteps and found.speedup == schedule.speedup
    assert torch.equal(sample(net, [1], schedule=found), sample(net, [1], schedule=schedule))


def test_computed_steps_alone_take_timesteps_of_their_own(net):
    """Every second of six timesteps: a schedule of three steps."""
    alone = Schedule(torch.ones(3, 4, dtype=torch.bool), net.branch_names, trunk_forecast(net, 6, every=1).flops,
                     timesteps=(999, 599, 200))
    schedule = train_forecaster(net, alone, **SMALL | dict(lr=0.05, iterations=100, images=40))
    assert schedule.timesteps == (999, 599, 200) and schedule.rows == (None,) * 3
    labels = torch.arange(8) % 4
    wanted = sample(net, labels, steps=40, scheduler="DPMSolverMultistepScheduler", seed=9)
    plain = Schedule(alone.compute, alone.branches, alone.flops, timesteps=alone.timesteps,
                     forecaster=TrunkForecaster(torch.zeros(3, 1, 1)))
    before, after = ((sample(net, labels, schedule=one, seed=9) - wanted).square().mean()
                     for one in (plain, schedule))
    assert after < 0.8 * before


@pytest.mark.parametrize("options, message", [
    (dict(iterations=0), "iterations: got 0"), (dict(target="better"), "target: got 'better'"),
    (dict(lr=-1.0), "lr: got -1.0"), (dict(steps=1), "steps: got 1"), (dict(batch=True), "batch: got True"),
    (dict(history=5), "history: got 5"), (dict(history=True), "history: got True")])
def test_bad_arguments_are_named(net, options, message):
    with pytest.raises(ValueError, match=message):
        train_forecaster(net, 1.8, **SMALL | options)


def test_nothing_to_learn_is_said(net):
    with pytest.raises(ValueError, match="leaves nothing to learn"):
        train_forecaster(net, trunk_forecast(net, 4, every=1), correct=False, **SMALL | dict(steps=4))
