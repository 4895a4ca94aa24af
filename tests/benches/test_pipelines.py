"""bench/pipelines/: the table notices what is wrong, and says what is refused."""

import json
import sys
import warnings
from dataclasses import replace

import pytest
import torch

import harmonica_dit
from bench.bench_caches import silence
from bench.pipelines import __main__ as command
from bench.pipelines import checks, control, table
from bench.pipelines.checks import CHECKS, Check, call, judge
from harmonica_dit.pipelines.adapters.generic_cache import map_tensors
from harmonica_dit.pipelines.adapters.generic_runs import TrunkRun
from support.many_pipes import PIPES

pytestmark = pytest.mark.filterwarnings("ignore:forecasts to order 0, not 1", "ignore:reuses nothing")


def test_the_command_writes_and_prints_a_row(tmp_path, monkeypatch, capsys):
    columns = ("call", "after an interruption", "batch of 2")
    monkeypatch.setattr(table, "CHECKS", {name: CHECKS[name] for name in columns})
    monkeypatch.setattr(sys, "argv", [
        "pipelines", "table", "--only", "dit", "prx", "--out", str(tmp_path / "rows.json")])
    command.main()
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["versions"]["diffusers"] and found["commit"]
    dit, prx = found["rows"]
    assert (dit["cls"], dit["transformer"]) == ("DiTPipeline", "DiTTransformer2DModel")
    assert dit["checks"]["call"]["path"] == "fused" and dit["checks"]["call"]["result"] in ("equal", "close")
    assert prx["checks"]["after an interruption"]["result"] == "equal" and prx["checks"]["call"]["repeats"]
    assert prx["checks"]["call"]["speedup"] >= table.SPEEDUP and prx["checks"]["call"]["nbytes"] > 0
    assert prx["checks"]["batch of 2"] == dict(result="lacks", words="takes one prompt")
    assert "group by group" in prx["refusals"]["group offload"] and dit["refusals"]["group offload"] is None
    printed = capsys.readouterr().out
    assert "| PRXPipeline (prx) | = | = | – |" in printed and "batch of 2, lacks: takes one prompt (prx)" in printed
    assert "torch.compile(transformer): ValueError: transformer: has been compiled as a whole" in printed


@pytest.mark.parametrize("name", ["LoRA", "compiled blocks", "int8"])
def test_what_is_put_on_a_model_is_felt(name):
    entry, check = PIPES["ltx"], CHECKS[name]
    pipe, bare = entry.pipe(), entry.pipe()
    with silence(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.compile and torchao
        check.prepare(entry, pipe)
        first, last = (run(entry, pipe) for run in check.calls)
        found = judge(entry, check)
    torch.compiler.reset()
    assert found["result"] == "equal" and found["repeats"] and found["felt"]
    assert torch.equal(first, entry.call(bare, steps=checks.STEPS)) == (name == "compiled blocks")
    assert torch.equal(first, last) == (name != "LoRA")


def test_a_pipeline_that_ignores_its_compiled_blocks_is_noticed(monkeypatch):
    monkeypatch.setattr(checks, "compile_blocks", lambda *_: None)
    found = judge(PIPES["ltx"], Check(CHECKS["compiled blocks"].calls))
    assert found == dict(result="plain fails", words="AssertionError: no compiled block was run")
    assert not table.holds([dict(checks={"call": found}, refusals={})])


def test_a_computed_step_that_is_wrong_is_noticed(monkeypatch):
    """Also where the image at speedup 1 is right, because the plain forward runs there."""
    end = TrunkRun.end
    monkeypatch.setattr(TrunkRun, "end", lambda self, *call: map_tensors(
        lambda t: t + t.roll(1, -1) / 10 if self.computed else t, end(self, *call)))
    with silence():
        found = judge(PIPES["ltx"], Check((call(),)))
    assert found["result"] == "differs" and found["difference"] > 1e-3


def test_what_differs_or_depends_on_earlier_calls_is_wrong(monkeypatch):
    entry, made = PIPES["ltx"], harmonica_dit.enable_cache

    def judged() -> dict:
        with silence():
            return judge(entry, Check((call(steps=6), call(steps=4))))

    def row(cell: dict) -> list[dict]:
        return [dict(checks={"call": cell}, refusals={"x": "words"})]

    assert table.holds(row(judged()))
    monkeypatch.setattr(harmonica_dit, "enable_cache", lambda pipe, speedup: made(pipe, 1.3))
    differs = judged()
    assert differs["result"] == "differs" and differs["difference"] > 1e-3 and not table.holds(row(differs))
    assert table.shown(differs).endswith(", DIFFERS")
    monkeypatch.setattr(harmonica_dit, "enable_cache", lambda pipe, speedup: made(pipe, 1.0))
    nothing = judged()
    assert nothing["result"] == "equal" and not nothing["felt"] and not table.holds(row(nothing))
    monkeypatch.setattr(harmonica_dit, "enable_cache", made)

    def refuse(pipe, speedup):
        raise ValueError("not so")

    monkeypatch.setattr(harmonica_dit, "enable_cache", refuse)
    refused = judged()
    assert refused == dict(result="fails", words="ValueError: not so") and not table.holds(row(refused))
    monkeypatch.setattr(harmonica_dit, "enable_cache", made)
    counted = []

    def depends(entry, pipe):
        counted.append(1)
        return entry.call(pipe, steps=4) + (len(counted) > 5)

    found = judge(entry, Check((depends,)))
    assert found["repeats"]
    counted.clear()
    found = judge(entry, Check((depends, depends)))
    assert not found["repeats"] and not table.holds(row(found)) and "LEFTOVERS" in table.shown(found)
    assert not table.holds([dict(checks={}, refusals={"x": ""})])


def test_an_interruption_that_does_not_happen_is_noticed():
    entry = PIPES["ltx"]
    pipe = entry.pipe()
    checks.interrupted(inside=True)(entry, pipe)
    checks.interrupted(inside=False)(entry, pipe)
    assert not any(part._forward_pre_hooks for part in pipe.transformer.modules())
    with pytest.raises(AssertionError, match="not interrupted"):
        checks.interrupted(inside=False)(replace(entry, calls=99), pipe)


def test_every_model_that_diffusers_makes_images_of_images_with():
    assert set(table.IMG2IMG) == {"flux", "sd3", "qwen", "chroma", "z-image"}
    for name in ("chroma", "z-image"):
        entry = table.IMG2IMG[name]
        pipe = entry.pipe()
        assert "Img2Img" in type(pipe).__name__ and entry.call(pipe, steps=4).std() > 0.01


def test_what_becomes_of_a_controls_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(control, "CONTROL_PIPES", {"sd3": control.CONTROL_PIPES["sd3"]})
    monkeypatch.setattr(control, "SPEEDUPS", (1.7,))
    monkeypatch.setattr(control, "STEPS", 6)
    monkeypatch.setattr(sys, "argv", ["pipelines", "control", "--out", str(tmp_path / "rows.json")])
    command.main()
    none, always, half = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert none["effect"] == none["cached_effect"] == 0 < none["error"] < always["effect"]
    assert 0 < half["effect"] != always["effect"] != always["cached_effect"] and always["speedup"] == none["speedup"]
    assert f"| sd3 | {half['speedup']:.2f}× | at the first half |" in capsys.readouterr().out
