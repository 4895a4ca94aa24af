"""Comparisons: rows that must come out as they do, and methods made from files."""

import inspect
import io
import json
import sys

import pytest
import torch
from rich.console import Console

import harmonica_dit
from harmonica_dit.demo import fashion_judge
from harmonica_dit.evaluate import Method, compare, fewer_steps, fora_methods, from_file
from harmonica_dit.evaluate.table import table
from harmonica_dit.flops import count_flops
from harmonica_dit.methods import uncached
from harmonica_dit.router import Router
from harmonica_dit.sample import sample


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
        assert row["label_accuracy"] is row["frechet"] is None
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
    assert [mine[name].default for name in ("seed", "batch")] == [theirs[name].default for name in ("seed", "batch")]


def test_the_bundled_model_is_judged(net):
    rows = compare(net, [], torch.arange(10), steps=4, judge=fashion_judge)
    assert 0 <= rows[0]["label_accuracy"] <= 1 and rows[0]["frechet"] is None


@pytest.mark.parametrize("methods, options, message", [
    ([], dict(labels=[10]), "labels"), ([], dict(labels=[]), "labels"), ([], dict(batch=0), "batch: got 0"),
    ([], dict(batch=2.0), "batch"), ([Method("0 steps", "fewer steps", 0)], {}, "steps: got 0"),
    ([Method("a", "a", 2), Method("b", "b", 2), Method("a", "c", 2)], {}, "more than one is called 'a'"),
    ([Method("uncached", "mine", 2)], {}, "'uncached'"), ([], dict(scheduler="nonsense"), "scheduler"),
])
def test_what_cannot_be_compared_is_refused_before_the_first_batch(net, monkeypatch, methods, options, message):
    monkeypatch.setattr(sys.modules[compare.__module__], "sample", lambda *_, **__: pytest.fail("it sampled"))
    with pytest.raises(ValueError, match=message):
        compare(net, methods, **dict(labels=[0], steps=2, judge=None) | options)


def test_a_schedule_that_does_not_fit_is_refused_before_the_first_batch(net, monkeypatch):
    monkeypatch.setattr(sys.modules[compare.__module__], "sample", lambda *_, **__: pytest.fail("it sampled"))
    with pytest.raises(ValueError, match="4 steps, the trajectory has 3"):
        compare(net, [Method("all", "all", 3, uncached(net, 4))], [0], steps=3, judge=None)


@pytest.mark.parametrize("extrapolation, family", [(None, "router"), (1.0, "router + forecast")])
def test_routers_and_schedules_are_read_from_files(net, tmp_path, extrapolation, family):
    logits = torch.tensor([5.0, 5, -5, -5])[:, None].repeat(1, len(net.branch_names))
    table = None if extrapolation is None else torch.full_like(logits, extrapolation)
    router = Router(logits, net.branch_names, count_flops(net), (999, 666, 333, 0), extrapolation=table, model=net.name)
    router.save(tmp_path / "mine.safetensors")
    router.schedule().save(tmp_path / "frozen.safetensors")
    mine, frozen = (from_file(tmp_path / f"{name}.safetensors", net) for name in ("mine", "frozen"))
    assert (mine.name, mine.family, mine.steps) == ("mine", family, 4)
    router.save(tmp_path / "run" / "router.safetensors")
    assert from_file(tmp_path / "run" / "router.safetensors", net).name == "run"
    assert frozen.family.startswith("frozen") and mine.speedup(4) == frozen.speedup(4) > 1


@pytest.mark.parametrize("speedup, steps", [(1.67, 12), (1.6, 12), (2.5, 8), (1.05, 19), (100.0, 1)])
def test_fewer_steps_are_those_nearest_to_the_speedup(speedup, steps):
    method = fewer_steps(20, speedup)
    assert (method.steps, method.name, method.family) == (steps, f"{steps} steps", "fewer steps")


def test_no_number_of_the_table_is_cut_in_a_terminal_of_80_columns():
    """With a name as long as the demo's longest; each heading's words are whole, too."""
    row = dict(name="learned 2.8×, trained now", cur=0.65, flops_speedup=2.79, wall_speedup=2.71, error=0.0447,
               accurate_error=0.0324, label_accuracy=0.875, frechet=None)
    shown = io.StringIO()
    Console(file=shown, width=80).print(table([row], "a title"))
    for cell in ("65.0%", "2.79×", "2.71×", "0.0447", "0.0324", "87.5%", "accurate", "accuracy", row["name"]):
        assert cell in shown.getvalue(), shown.getvalue()
    assert "…" not in shown.getvalue()
