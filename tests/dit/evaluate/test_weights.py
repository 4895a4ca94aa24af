"""Methods by name on quantized weights: alone, before another method, before a file; and what the device lacks."""

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

import harmonica_dit.cli
from harmonica_dit.evaluate.catalogue import WEIGHTS, make_methods, quantizer, split_weights
from harmonica_dit.methods import fora, step_search
from harmonica_dit.models import weight_bytes
from harmonica_dit.models.quantized import KINDS
from harmonica_dit.sample import sample

pytest.importorskip("torchao")


def compare(*arguments):
    return CliRunner().invoke(harmonica_dit.cli.app, ["compare", *map(str, arguments)])


@pytest.fixture(scope="module")
def net():
    return harmonica_dit.load("fashion-dit")


def test_every_kind_is_offered():
    assert WEIGHTS == tuple(KINDS)


@pytest.mark.parametrize("name, parts", [
    ("int8", ("int8", "")), ("int8+fora", ("int8", "fora")), ("dpm-solver++", (None, "dpm-solver++")),
    ("int8+dpm-solver++", ("int8", "dpm-solver++")), ("int8+", (None, "int8+")), ("a+b.safetensors", (
        None, "a+b.safetensors")), ("int4+runs/a+b.safetensors", ("int4", "runs/a+b.safetensors"))])
def test_a_name_is_weights_and_a_method(name, parts):
    assert split_weights(name) == parts


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic", "int4"])
def test_weights_alone_are_one_method(net, kind):
    (method,) = make_methods(net, [kind], [1.5, 2.5], 20)
    assert method.name == f"{kind} weights 1×" and method.speedup(20) == 1
    assert weight_bytes(method.net) < 0.6 * weight_bytes(net)


def test_a_method_on_weights_is_the_same_on_a_copy_that_all_share(net):
    names = ["int8", "int8+fora", "fora", "int8+dpm-solver++"]
    alone, *on_int8, plain, _, solver, _ = made = make_methods(net, names, [1.5, 2.5], 20)
    assert [one.name for one in made] == ["int8 weights 1×", "int8 + FORA 1.5×", "int8 + FORA 2.5×", "FORA 1.5×",
                                          "FORA 2.5×", "int8 + DPM-Solver++ 1.5×", "int8 + DPM-Solver++ 2.5×"]
    assert plain.net is None and all(one.net is alone.net for one in (*on_int8, solver))
    assert on_int8[0].family == "int8 + FORA" and on_int8[0].speedup(20) == plain.speedup(20)
    assert on_int8[0].schedule.compute.equal(plain.schedule.compute) and solver.steps == 13


def test_what_is_calibrated_is_calibrated_on_the_weights(net, monkeypatch):
    """`step_search` samples with them too."""
    nets = []
    monkeypatch.setattr(sys.modules[step_search.__module__], "sample", lambda net, labels, **_: nets.append(net) or
                        torch.zeros(len(labels), *net.sample_shape))
    (method,) = make_methods(net, ["int8+step-search"], [1.5], 6)
    assert nets and all(used is method.net for used in nets)


def test_compare_shows_a_files_schedule_on_weights(net, tmp_path):
    file = tmp_path / "mine.safetensors"
    fora(net, 4, 2).save(file)
    result = compare("--schedule", f"int8+{file}", "--method", "int8+fewer-steps", "--steps", 4, "--speedup", 2,
                     "--samples", 2, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["uncached", "int8 + mine", "int8 + fewer steps 2×"]
    labels, small = torch.tensor([0, 1]), quantizer(net)("int8")
    exact, found = (sample(model, labels, steps=4, schedule=schedule) for model, schedule in (
        (net, None), (small, fora(net, 4, 2))))
    error = (found.clamp(-1, 1) - exact.clamp(-1, 1)).square().flatten(1).mean(1).sqrt().mean()
    assert rows[1]["error"] == pytest.approx(error.item(), rel=1e-4)


@pytest.mark.parametrize("arguments, message", [
    (["--method", "int4-packed"], "int4-packed at 1×: kind: 'int4-packed' does not run in torch.float32 on cpu: Only"),
    (["--method", "int4-packed+fora"], "int4-packed+fora at 1.9×: kind: 'int4-packed' does not run in torch.float32"),
    (["--schedule", "int4-packed+fashion-dit-2.0x"], "kind: 'int4-packed' does not run in torch.float32 on cpu"),
    (["--method", "int3+fora"], "--method: got 'int3+fora', expected one of fora,"),
    (["--method", "int8+magic"], "--method: got 'int8+magic', expected one of fora,"),
    (["--method", "int8+"], "--method: got 'int8+', expected one of fora,"),
    (["--method", "int8+pruned"], "--method: int8+pruned at 1.9×: "),
    (["--schedule", "int8"], "no file at int8"),
    (["--schedule", "int8+nowhere.safetensors"], "no file at nowhere.safetensors")])
def test_what_cannot_be_is_said_before_the_work(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("harmonica_dit.evaluate.report.compare_with_bar", lambda *_, **__: pytest.fail("it began"))
    result = compare(*arguments, "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 2 and message in result.stderr, result.output


def test_what_the_device_lacks_is_said_before_the_work(tmp_path):
    result = compare("--method", "fp8-dynamic", "--dtype", "bfloat16", "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 2 and "fp8-dynamic at 1×: kind: 'fp8-dynamic' does not run in torch.bfloat16" in \
        result.stderr
