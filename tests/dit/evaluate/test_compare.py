"""Comparisons: rows that must come out as they do, and methods made from files."""

import inspect
import io
import json
import sys
import time
from functools import partial

import pytest
import torch
from rich.console import Console

import harmonica_dit
from harmonica_dit import methods
from harmonica_dit.cli_compare import METHODS
from harmonica_dit.evaluate import Method, compare, fewer_steps, fora_methods, from_file, samples
from harmonica_dit.evaluate.catalogue import make_methods
from harmonica_dit.evaluate.fashion import fashion_floor, fashion_judge
from harmonica_dit.evaluate.judging import judged_floor
from harmonica_dit.evaluate.named_methods import name_after
from harmonica_dit.evaluate.report import cells, markdown, print_table
from harmonica_dit.files import load_tensors
from harmonica_dit.flops import count_flops
from harmonica_dit.methods import uncached
from harmonica_dit.models import DiT
from harmonica_dit.router import Router
from harmonica_dit.sample import sample
from harmonica_dit.schedule import Schedule
from support.pipeline_folders import small_vae


def small_latent_dit(depth: int = 2) -> DiT:
    torch.manual_seed(0)
    net = DiT(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=depth, num_heads=2, name="DiT-S/2")
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def net():
    return harmonica_dit.load("fashion-dit")


def test_a_schedule_that_computes_everything_costs_nothing_and_saves_nothing(net):
    done = []
    rows = compare(net, [Method("all", "all", 4, uncached(net, 4))], [0, 1, 2], steps=4, batch=2, judge=None,
                   progress=done.append)
    assert [row["name"] for row in rows] == ["uncached", "all"] and done == [0, 2, 4, 5, 6]
    for row in rows:
        assert (row["error"], row["psnr"], row["cur"], row["flops_speedup"]) == (0, None, 0, 1)
        assert row["label_accuracy"] is row["frechet"] is row["latent_error"] is None
        assert row["samples"] == 3 and row["wall_speedup"] > 0
    assert rows[0]["wall_speedup"] == 1
    json.dumps(rows)


def test_rows_say_what_the_methods_do(net):
    methods = [*fora_methods(net, 4, 2), fewer_steps(4, 2.0)]
    _, repeated, forecast, fewer = compare(net, methods, [0, 1, 2], steps=4, batch=3, judge=None)
    assert repeated["cur"] == forecast["cur"] == 0.5
    assert repeated["flops_speedup"] == methods[0].schedule.speedup > 1.5
    assert (fewer["name"], fewer["flops_speedup"], fewer["cur"]) == ("2 steps", 2, 0)
    assert min(repeated["error"], forecast["error"], fewer["error"]) > 0
    assert repeated["error"] != forecast["error"]
    split = compare(net, methods[:1], [0, 1, 2], steps=4, batch=1, judge=None)[1]
    assert split["error"] == pytest.approx(repeated["error"], rel=1e-4)


def test_seed_and_batches_are_by_default_those_of_sample():
    mine, theirs = (inspect.signature(function).parameters for function in (compare, sample))
    assert mine["batch"].default == theirs["batch"].default and mine["seeds"].default == (theirs["seed"].default,)


def test_seeds_are_compared_each_by_itself(net):
    methods = [fewer_steps(4, 2.0)]
    rows = compare(net, methods, [0, 1, 2], steps=4, batch=2, seeds=(3, 5))
    assert [(row["name"], row["seed"]) for row in rows] == [
        (name, seed) for seed in (3, 5) for name in ("uncached", "2 steps")]
    one = compare(net, methods, [0, 1, 2], steps=4, batch=2, seeds=(5,))
    assert one[1]["error"] == rows[3]["error"] != rows[1]["error"]


def test_what_is_kept_is_not_sampled_again_nor_timed(net, tmp_path, monkeypatch):
    options = dict(steps=4, batch=2, folder=tmp_path)
    first = compare(net, [fewer_steps(4, 2.0)], [0, 1, 2], **options)
    monkeypatch.setattr(samples, "sample", lambda *_, **__: pytest.fail("it sampled"))
    again = compare(net, [fewer_steps(4, 2.0)], [0, 1, 2], **options)
    assert all(row.pop("wall_speedup") for row in first) and not any(row.pop("wall_speedup") for row in again)
    assert first == again


def test_an_interrupted_comparison_says_what_is_kept_and_goes_on(net, tmp_path):
    def interrupt(done):
        if done == 4:
            raise KeyboardInterrupt

    options = dict(steps=3, batch=2)
    for folder, message in ((None, "nothing is kept"), (tmp_path, f"what is done is in {tmp_path}")):
        with pytest.raises(KeyboardInterrupt, match=message):
            compare(net, [fewer_steps(3, 1.5)], [0, 1, 2], folder=folder, progress=interrupt, **options)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    whole = compare(net, [fewer_steps(3, 1.5)], [0, 1, 2], **options)
    assert compare(net, [fewer_steps(3, 1.5)], [0, 1, 2], folder=tmp_path, **options)[1]["error"] == whole[1]["error"]


def test_processes_share_the_work(net, tmp_path):
    """The other makes a part of it, and the result is that of one alone."""
    def wait(done):  # for the other, which has to be started
        while done == 5 and len(list(tmp_path.rglob("*.safetensors"))) < 2:
            time.sleep(0.05)

    methods, load = [fewer_steps(4, 2.0), *fora_methods(net, 4, 2)], partial(harmonica_dit.load, "fashion-dit")
    labels, options = torch.arange(15) % 10, dict(steps=4, batch=5)
    rows = compare(net, methods, labels, processes=2, load=load, folder=tmp_path, progress=wait, **options)
    made = [load_tensors(path)[1]["process"] for path in tmp_path.rglob("*.safetensors")]
    assert len(made) == 4 * 3 and len(set(made)) == 2 and not list(tmp_path.rglob("*.lock"))
    for mine, theirs in zip(rows, compare(net, methods, labels, **options)):
        assert mine.pop("wall_speedup") is None and theirs.pop("wall_speedup") > 0 and mine == theirs


def test_a_process_that_fails_is_told_and_its_work_is_done(net):
    with pytest.warns(UserWarning, match="1 of 2 failed, and the others did their work"):
        rows = compare(net, [], [0, 1], steps=2, processes=2, load=partial(harmonica_dit.load, "no-such-model"))
    assert rows[0]["samples"] == 2


@pytest.mark.parametrize("name", METHODS)
def test_methods_by_name_reach_the_speedup_and_no_more_than_the_next_step(net, name):
    calibrated = name in ("step-search", "smoothcache", "first-block", "pruned")
    net, steps = (small_latent_dit(depth=6), 8) if calibrated else (net, 20)  # the small one is sampled
    if name == "pruned":  # by gradients at up to 1000 timesteps
        net = DiT(4, 2, 4, 64, 1, 8).eval().requires_grad_(False)
    for speedup in (2.5,) if name == "pruned" else (1.5, 2.5):
        (method,) = make_methods(net, [name], [speedup], steps, catalogue=METHODS)
        assert method.name.endswith(f" {speedup:g}×")
        if name == "pruned":  # of a width that heads and channels allow
            assert speedup <= method.speedup(steps) < 1.6 * speedup
        elif name != "first-block":  # which has none until it has run
            assert speedup <= method.speedup(steps) < speedup * (1.4 if calibrated else 1.25)


def test_fewer_steps_evenly_take_the_scheduler_s_own_timesteps_to_the_last_above_0(net):
    make = partial(make_methods, net, ["fewer-steps-evenly"], [2.8], 20)
    (method,) = make()
    assert method.schedule.timesteps == (999, 841, 684, 526, 368, 210, 53) and method.schedule.cur == 0
    (method,) = make(scheduler="DPMSolverMultistepScheduler")
    assert method.schedule.timesteps == (999, 849, 699, 500, 350, 200, 50)
    with pytest.raises(ValueError, match="fewer-steps-evenly at 2.8×: timesteps: SASolverScheduler chooses its own"):
        make(scheduler="SASolverScheduler")


@pytest.mark.parametrize("names, speedups, message", [
    (["fora", "nonsense"], [2.0], "method: got 'nonsense', expected one of fora, "),
    (["fora"], [200.0], "method: fora at 200×: speedup: got 200.0, expected at most"),
    (["pruned"], [200.0], "method: pruned at 200×: speedup: got 200.0"),
])
def test_methods_by_name_that_there_are_not(net, names, speedups, message):
    with pytest.raises(ValueError, match=message):
        make_methods(net, names, speedups, 20, catalogue=METHODS)


def test_a_method_for_other_models_is_named():
    with pytest.raises(ValueError, match="method: pruned at 2×: net: got Linear, expected a DiT"):
        make_methods(torch.nn.Linear(1, 1), ["pruned"], [2.0], 20, catalogue=METHODS)


def test_a_method_that_diverges_is_named(net, monkeypatch):
    whole = samples.sample
    monkeypatch.setattr(samples, "sample", lambda net, labels, *, steps, **options: whole(
        net, labels, steps=steps, **options) * (torch.nan if steps == 2 else 1))
    with pytest.raises(ValueError, match="2 steps: images: 1 of 1 hold values that are not finite"):
        compare(net, [fewer_steps(4, 2.0)], [0], steps=4)


def test_latents_are_compared_unclipped_and_decoded(monkeypatch):
    """The samples of a latent model lie far outside [-1, 1]; they were compared as if they were images."""
    net = small_latent_dit()
    assert net.sample_shape[0] == 4
    rows = compare(net, [fewer_steps(3, 3.0)], [0, 1], steps=3)
    made = [sample(net, [0, 1], steps=steps, guidance=1.5) for steps in (3, 1)]
    expected = (made[0] - made[1]).square().flatten(1).mean(1).sqrt().mean().item()
    assert rows[1]["latent_error"] == pytest.approx(expected, rel=1e-4) and "error" not in rows[1]
    with pytest.raises(ValueError, match="judge: DiT-S/2 makes latents, and no VAE decodes them"):
        compare(net, [], [0], steps=3, judge=fashion_judge)
    net.vae = small_vae(scaling_factor=0.5).eval()
    rows = compare(net, [fewer_steps(3, 3.0)], [0, 1], steps=3)
    images = [net.vae.decode(latents / 0.5).sample.clamp(-1, 1) for latents in made]
    assert images[0].shape == (2, 3, 64, 64)
    torch.testing.assert_close(sample(net, [0, 1], steps=1, guidance=1.5).clamp(-1, 1), images[1])
    difference = (images[0] - images[1]).square().flatten(1).mean(1).sqrt().mean().item()
    assert rows[1]["error"] == pytest.approx(difference, rel=1e-4)
    assert rows[1]["latent_error"] == pytest.approx(expected, rel=1e-4)


def test_the_bundled_model_is_judged(net):
    rows = compare(net, [], torch.arange(10), steps=4, judge=fashion_judge)
    assert 0 <= rows[0]["label_accuracy"] <= 1 and rows[0]["frechet"] is None


@pytest.mark.parametrize("methods, options, message", [
    ([], dict(labels=[10]), "labels"), ([], dict(labels=[]), "labels"), ([], dict(batch=0), "batch: got 0"),
    ([], dict(batch=2.0), "batch"), ([Method("0 steps", "fewer steps", 0)], {}, "steps: got 0"),
    ([Method("a", "a", 2), Method("b", "b", 2), Method("a", "c", 2)], {}, "more than one is called 'a'"),
    ([Method("uncached", "mine", 2)], {}, "'uncached'"), ([], dict(scheduler="nonsense"), "scheduler"),
    ([], dict(seeds=(-1,)), "seeds: got -1"), ([], dict(processes=0), "processes: got 0"),
    ([], dict(processes=2), "more than one need load"),
])
def test_what_cannot_be_compared_is_refused_before_the_first_batch(net, monkeypatch, methods, options, message):
    monkeypatch.setattr(samples, "sample", lambda *_, **__: pytest.fail("it sampled"))
    monkeypatch.setattr(sys.modules[compare.__module__], "sample", lambda *_, **__: pytest.fail("it sampled"))
    with pytest.raises(ValueError, match=message):
        compare(net, methods, **dict(labels=[0], steps=2, judge=None) | options)


def test_a_schedule_that_does_not_fit_is_refused_before_the_first_batch(net, monkeypatch):
    monkeypatch.setattr(samples, "sample", lambda *_, **__: pytest.fail("it sampled"))
    monkeypatch.setattr(sys.modules[compare.__module__], "sample", lambda *_, **__: pytest.fail("it sampled"))
    with pytest.raises(ValueError, match="4 steps, the trajectory has 3"):
        compare(net, [Method("all", "all", 3, uncached(net, 4))], [0], steps=3, judge=None)


@pytest.mark.parametrize("extrapolation, recipe, family", [
    (None, None, "router"), (1.0, "recommended", "router + forecast"),
    (None, "recommended, but importance=none (not paper)", "router, SDT alone")])
def test_routers_and_schedules_are_read_from_files(net, tmp_path, extrapolation, recipe, family):
    logits = torch.tensor([5.0, 5, -5, -5])[:, None].repeat(1, len(net.branch_names))
    table = None if extrapolation is None else torch.full_like(logits, extrapolation)
    router = Router(logits, net.branch_names, count_flops(net), (999, 666, 333, 0), extrapolation=table, model=net.name,
                    recipe=recipe)
    router.save(tmp_path / "mine.safetensors")
    router.schedule().save(tmp_path / "frozen.safetensors")
    mine, frozen = (from_file(tmp_path / f"{name}.safetensors", net) for name in ("mine", "frozen"))
    assert (mine.name, mine.family, mine.steps) == ("mine", family, 4)
    router.save(tmp_path / "run" / "router.safetensors")
    assert from_file(tmp_path / "run" / "router.safetensors", net).name == "run"
    assert frozen.family.startswith("frozen") and mine.speedup(4) == frozen.speedup(4) > 1


def test_what_calibrates_samples_as_the_comparison_does(net, monkeypatch):
    given = []
    monkeypatch.setattr(methods, "step_search", lambda net, steps, **how: given.append(how) or uncached(net, steps))
    make_methods(net, ["step-search", "fora"], [1.5], 4, guidance=3.0, scheduler="iddpm")
    assert given == [dict(speedup=1.5, guidance=3.0, scheduler="iddpm", costs=None)]


@pytest.mark.parametrize("file, family", [("fashion-dit-forecast-2.8x", "learned forecast"),
                                          ("fashion-dit-forecast-2.8x-uncached", "learned forecast, to uncached")])
def test_forecasts_of_another_target_are_another_family(file, family):
    assert name_after(file, Schedule.load(file)).family == family


@pytest.mark.parametrize("speedup, steps", [(1.67, 11), (1.66, 12), (2.5, 8), (20 / 7, 7), (1.05, 19), (100.0, 1)])
def test_fewer_steps_are_as_many_as_the_speedup_allows(speedup, steps):
    method = fewer_steps(20, speedup)
    assert (method.steps, method.name, method.family) == (steps, f"{steps} steps", "fewer steps")


@pytest.mark.parametrize("columns", [80, 60, 40])
def test_no_number_of_the_table_is_cut(columns):
    """With a name as long as the demo's longest; each heading's words are whole, too."""
    row = dict(name="learned 2.8×, trained now", cur=0.65, flops_speedup=2.79, wall_speedup=2.71, error=0.0447,
               accurate_error=0.0324, label_accuracy=0.875, frechet=None)
    shown = io.StringIO()
    print_table(Console(file=shown, width=columns), [row], "a title")
    for cell in ("65.0%", "2.79×", "2.71×", "0.0447", "0.0324", "87.5%", "accurate", "accuracy", row["name"]):
        assert cell in shown.getvalue(), shown.getvalue()
    assert "…" not in shown.getvalue() and max(map(len, shown.getvalue().splitlines())) <= columns
    assert shown.getvalue().count(row["name"]) == {80: 1, 60: 2, 40: 6}[columns]  # tables below each other


def test_seeds_are_told_apart_and_the_floor_is_the_last_line():
    """The seed only where there are several; the floor in columns that the rows have."""
    rows = [dict(name="4 steps", seed=seed, flops_speedup=5.0, frechet=3.5, psnr=20.25, ssim=0.5) for seed in (1, 2)]
    floor = fashion_floor()
    assert cells(rows, floor=floor)["seed"] == ["1", "2", "–"] and "seed" not in cells(rows[:1], floor=floor)
    shown = io.StringIO()
    print_table(Console(file=shown, width=80), rows, "a title", floor)
    lines = [line.split() for line in shown.getvalue().splitlines()]
    assert ["4", "steps", "2", "5.00×", "3.50"] in lines and ["10,000", "real", "images", "–", "–", "0.02"] in lines
    last = markdown(rows, "a title", floor).splitlines()[-3]
    assert last == "| 10,000 real images | – | – | 0.02 | – | – |", last
    assert judged_floor(fashion_judge) == floor and judged_floor(None) is None
