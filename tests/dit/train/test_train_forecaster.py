"""Training a forecaster: what it learns, resuming, files, what is refused."""

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from harmonica_dit.evaluate import from_file
from harmonica_dit.files import load_tensors, save_tensors
from harmonica_dit.forecaster import TrunkForecaster, taylor
from harmonica_dit.methods import fora, trunk_forecast
from harmonica_dit.sample import sample
from harmonica_dit.sample.schedulers import NOISE
from harmonica_dit.schedule import Schedule
from harmonica_dit.train import targets, train_forecaster

SMALL = dict(steps=6, iterations=30, images=8, held_out=4, batch=4, progress=False, seed=1,
             perceptual=0.0)  # the features of a model that was not trained say nothing


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


@pytest.mark.parametrize("target, scheduler, adams", [
    ("accurate", "ddim", True), ("accurate", "EulerDiscreteScheduler", True), ("uncached", "ddim", False),
    ("accurate", "DPMSolverMultistepScheduler", False)])
def test_where_the_weights_start(net, target, scheduler, adams):
    """As Adams's, where the target is a better solution than a first-order solver's own; else as Taylor's."""
    made = train_forecaster(net, 1.4, target=target, scheduler=scheduler, **SMALL | dict(iterations=1, lr=1e-9))
    start = taylor(made.compute[:, 0].tolist(), 1, adams=adams).states
    weights = made.forecaster.states
    torch.testing.assert_close(weights[:, :2], start.expand(-1, -1, net.width), rtol=0, atol=1e-6)
    assert weights.shape[1] == 3 and weights[:, 2].abs().max() < 1e-6


def test_which_loss_is_the_default(net):
    for target, perceptual in (("accurate", 0.5), ("uncached", 0.0)):
        settings = SMALL | dict(iterations=2, target=target)
        default, given = (train_forecaster(net, 1.8, **settings | dict(perceptual=p)) for p in (None, perceptual))
        other = train_forecaster(net, 1.8, **settings | dict(perceptual=0.5 - perceptual))
        assert torch.equal(default.forecaster.own, given.forecaster.own)
        assert not torch.equal(default.forecaster.own, other.forecaster.own)


def test_in_bfloat16_it_learns_too(net):
    start, labels, options = trunk_forecast(net, 6, speedup=1.8), torch.arange(12) % 4, dict(seed=9, guidance=1.5)
    schedule = train_forecaster(net, start, target="uncached", autocast="bfloat16", **SMALL | dict(lr=0.02))
    wanted = sample(net, labels, steps=6, **options)
    before, after = ((sample(net, labels, schedule=one, **options) - wanted).square().mean()
                     for one in (start, schedule))
    assert after < 0.8 * before
    weights = schedule.forecaster.states
    assert not torch.equal(weights, train_forecaster(net, start, target="uncached", **SMALL | dict(
        lr=0.02)).forecaster.states), "autocast changes nothing"


def test_trained_on_some_labels_it_says_so(net, tmp_path):
    schedule = train_forecaster(net, 1.8, labels=[2, 0, 2], out=tmp_path, **SMALL | dict(iterations=1))
    assert schedule.labels == (0, 2) and schedule.scheduler == "ddim"
    found = Schedule.load(tmp_path / "forecast.safetensors")
    assert (found.labels, found.scheduler, found.guidance) == (schedule.labels, "ddim", net.guidance)
    for part in sorted(tmp_path.glob("targets-*/*.safetensors")):
        assert set(load_tensors(part)[1]["labels"]) == {0, 2}
    sample(net, [0, 2], schedule=found)
    with pytest.warns(UserWarning, match=r"made for the labels \(0, 2\), used with \[1, 3\]"):
        sample(net, [0, 1, 3], schedule=found)
    with pytest.warns(UserWarning, match="made for guidance 1.5, the trajectory's is 3"):
        sample(net, [0, 2], schedule=found, guidance=3)


def test_another_scheduler_or_width_is_refused(net):
    other = "DPMSolverMultistepScheduler"
    schedule = train_forecaster(net, 1.8, scheduler=other, target="uncached", **SMALL | dict(iterations=1))
    assert schedule.scheduler == other
    named = sample(net, [1], schedule=schedule, scheduler=other)
    assert torch.equal(sample(net, [1], schedule=schedule), named)
    with pytest.raises(ValueError, match=f"is for the scheduler '{other}', this one is 'ddim'"):
        sample(net, [1], schedule=schedule, scheduler="ddim")
    wide = trunk_forecast(net, 6, speedup=1.8)
    wide = replace(wide, forecaster=TrunkForecaster(torch.zeros(6, 1, net.width + 1)))
    with pytest.raises(ValueError, match="its forecaster has states of width 17, the model has 16"):
        sample(net, [1], schedule=wide)


def test_a_schedulers_settings_belong_to_a_forecaster(net, tmp_path):
    """Its file has them: they are used where none are given, and others are refused with what differs."""
    third, second = (DPMSolverMultistepScheduler(**NOISE, solver_order=order) for order in (3, 2))
    train_forecaster(net, 1.8, scheduler=third, out=tmp_path, **SMALL | dict(iterations=1))
    assert (tmp_path / "targets-own-40-seed1").is_dir()  # of the same scheduler, and accurate, however few its steps
    path, labels = tmp_path / "forecast.safetensors", [0, 1]
    wanted = sample(net, labels, schedule=path, scheduler=third)
    assert torch.equal(sample(net, labels, schedule=path), wanted)
    assert from_file(path, net).scheduler.config.solver_order == 3
    fits = r"with solver_order=3, this one has solver_order=2; .* DPM\w+.from_config\(scheduler.config, solver_order=3"
    for other in (second, "DPMSolverMultistepScheduler"):
        with pytest.raises(ValueError, match=fits):
            sample(net, labels, schedule=path, scheduler=other)
    older = replace(Schedule.load(path), scheduler_config=None)
    assert not torch.equal(sample(net, labels, schedule=older), wanted)  # of files without settings the name is known


LARGE = DPMSolverMultistepScheduler(**NOISE | dict(num_train_timesteps=20_000))


@pytest.mark.parametrize("options, message", [
    (dict(scheduler=LARGE), "scheduler_config: got {'num_train_timesteps': 20000}"),
    (dict(scheduler="HeunDiscreteScheduler"), r"HeunDiscreteScheduler calls the model \d+ times in 4 steps"),
    (dict(guidance=math.inf), "guidance: got inf"), (dict(guidance_channels=0), "guidance_channels: got 0"),
    (dict(timesteps=(999, 600, 300, 0), scheduler="SASolverScheduler"), "chooses its own and takes none"),
    (dict(timesteps=(999.5, 600, 300, 0)), "timesteps: got .999.5, ")])
def test_what_cannot_be_sampled_or_kept_is_refused_before_the_training(net, tmp_path, options, message):
    schedule = replace(trunk_forecast(net, 4, every=2), timesteps=options.pop("timesteps", None))
    with pytest.raises(ValueError, match=message):
        train_forecaster(net, schedule, out=tmp_path / "out", **SMALL | options)
    assert not (tmp_path / "out").exists()


def test_targets_are_kept_part_by_part(net, tmp_path, monkeypatch):
    """An interruption while they are made loses one part at most; a damaged part is named."""
    monkeypatch.setattr("harmonica_dit.train.targets.PART", 4)
    settings, made = SMALL | dict(iterations=1, out=tmp_path), []
    plain = targets.sample

    def interrupted(*args, **options):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(options["first"])
        return plain(*args, **options)

    monkeypatch.setattr(targets, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped after 0 of 1 iterations; the same call goes on"):
        train_forecaster(net, 1.8, **settings)
    kept = sorted(tmp_path.glob("targets-*/*.safetensors"))
    assert [path.stem for path in kept] == ["0", "4"]
    made.clear()
    train_forecaster(net, 1.8, **settings)
    assert len(made) == 1, "12 images, of which 8 were there"
    tensors, metadata = load_tensors(kept[1])
    for images, message in ((tensors["images"] * torch.nan, "is damaged"), (tensors["images"][:3], "is damaged")):
        save_tensors(kept[1], {"images": images}, metadata)
        with pytest.raises(ValueError, match=rf"4.safetensors: {message}"):
            train_forecaster(net, 1.8, **settings)
    save_tensors(kept[1], tensors, metadata | dict(guidance=4.0))
    with pytest.raises(ValueError, match="holds targets made with guidance=4.0, expected 1.5"):
        train_forecaster(net, 1.8, **settings)


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
        for name in ("states", "tokens", "own", "condition"):
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
    (dict(history=5), "history: got 5"), (dict(history=True), "history: got True"),
    (dict(perceptual=-1), "perceptual: got -1"), (dict(autocast="float16"), "autocast: got 'float16'"),
    (dict(labels=[9]), "labels: got 9 to 9")])
def test_bad_arguments_are_named(net, options, message):
    with pytest.raises(ValueError, match=message):
        train_forecaster(net, 1.8, **SMALL | options)


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_any_number_of_steps(net, steps):
    schedule = train_forecaster(net, 2.5, **SMALL | dict(steps=steps, iterations=1, target="uncached"))
    assert schedule.steps == steps == len(schedule.timesteps) and schedule.speedup >= 2.5
    assert sample(net, [0], schedule=schedule).isfinite().all()


def test_a_schedule_that_can_have_no_forecaster_is_refused_before_the_model_runs(net):
    whole = trunk_forecast(net, 6, every=2)
    K = len(net.branch_names)
    partly = whole.compute.clone()
    partly[1, 0] = True
    plain = replace(whole, forecaster=None)
    for schedule, message in ((replace(plain, compute=partly), r"steps \[1\] are computed in part"),
                              (fora(net, 6, 2, order=1), "got coefficients beside a forecaster"),
                              (replace(plain, runs=(K,)), "runs: got some beside a forecaster of the trunk"),
                              (replace(plain, branches=tuple("abcd")), "branch 0 is 'a'")):
        with never_called(net), pytest.raises(ValueError, match=message):
            train_forecaster(net, schedule, **SMALL)
    with pytest.raises(ValueError, match="has timesteps of its own, on which there are no uncached images"):
        train_forecaster(net, replace(whole, timesteps=(999, 900, 500, 400, 300, 20)), target="uncached", **SMALL)
    assert train_forecaster(net, plain, **SMALL | dict(iterations=1)).rows == whole.rows


def test_nothing_to_learn_is_said(net):
    with pytest.raises(ValueError, match="what it makes are the uncached images already"):
        train_forecaster(net, trunk_forecast(net, 4, every=1), target="uncached", **SMALL | dict(steps=4))
    with pytest.raises(ValueError, match="leaves nothing to learn"):
        train_forecaster(net, trunk_forecast(net, 4, every=1), correct=False, **SMALL | dict(steps=4))
