"""`harmonica bench` in a tiny setting: numbers that do not depend on the clock, and what is refused."""

import json

import pytest
import torch
from harmonica_dit.bench import caches, measure, models, quantized
from harmonica_dit.bench.classes import MODELS
from rich.console import Console
from typer.testing import CliRunner

import harmonica_dit.cli
from harmonica_dit.flops import Flops

DIT = ["--layers", "2", "--heads", "1", "--rounds", "1"]


def bench(*arguments):
    return CliRunner().invoke(harmonica_dit.cli.app, ["bench", *map(str, arguments)])


def rows_of(path, *arguments):
    result = bench(*arguments, "--json", path)
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def of_models(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "models.json"
    return rows_of(path, "models", "dit-xl-2-256", "pixart-alpha-256", "wan-1-frame", "flux-256", *DIT, "--steps", 4)


@pytest.mark.parametrize("number, name, K, shape", [
    (0, "dit-xl-2-256", 2 * 2, (2, 256, 72)), (1, "pixart-alpha-256", 3 * 2, (2, 256, 72)),
    (2, "wan-1-frame", 3 * 2, (1, 1560, 128))])
def test_a_models_row(of_models, number, name, K, shape):
    row = of_models["rows"][number]
    B, N, D = shape
    assert (row["model"], row["K"], row["rows"], row["tokens"], row["width"]) == (name, K, B, N, D)
    assert row["cache_bytes"] == K * B * N * D * 4
    assert row["cur"] == pytest.approx(round(0.56 * 4 * K) / (4 * K))
    assert row["wall_over_flops"] == pytest.approx(row["wall_speedup"] / row["flops_speedup"])
    assert 1 < row["flops_speedup"] < 1 / (1 - row["cur"]) * 2
    assert row["error_at_cur_0"] < 1e-5 and row["path"] == ("generic" if name.startswith("wan") else "fused")
    body, fixed = row["body_seconds"], row["fixed_seconds"]
    assert len(body) == K and min(body) > 0
    assert 4 * sum(body) + fixed + row["hoist_seconds"]["computed"] == pytest.approx(row["seconds"]["computed"][1])


def test_single_stream_branches_are_clocked_with_what_feeds_them(of_models):
    row = of_models["rows"][3]
    assert row["K"] == 3 * 2 + 2 and row["tokens"] == 256 + 512 and row["error_at_cur_0"] == 0
    runner = models.Runner(MODELS["flux-256"], 2, heads=1, layers=1)
    modules = runner.adapter.modules
    assert len(modules[-1]) == 3  # proj_out, attn, proj_mlp


def test_clocks_of_a_fused_adapter_leave_it_as_it_was():
    runner = models.Runner(MODELS["dit-xl-2-256"], 2, heads=1, layers=1)
    branches = list(runner.adapter.branches)
    with torch.inference_mode(), runner.clocks() as seconds:
        runner.cached(measure.random_schedule(runner.adapter.branch_names, runner.flops, 2, 0.0))
    assert min(seconds) > 0 and runner.adapter.branches == branches


def test_a_report_says_where_and_when(of_models):
    about = of_models["settings"]
    assert about["steps"] == 4 and about["cores"] >= 1 and len(about["load"]) == 3 and about["versions"]["torch"]
    assert of_models["benchmark"] == "bench_models"


def test_every_model_has_its_real_depth():
    depths = {"dit-xl-2-256": 28, "pixart-alpha-256": 28, "pixart-sigma-512": 28, "sd3-512": 24, "flux-256": 19,
              "sana-1024": 20, "cogvideox-1-frame": 30, "wan-1-frame": 30, "hunyuan-dit-512": 40}
    for name, depth in depths.items():
        model = MODELS[name]
        with torch.device("meta"):
            config, _ = model.make(model.heads, list(model.layers))
        assert config["num_layers"] == depth
    assert MODELS["flux-256"].layers == (19, 38)


def test_a_random_schedule_reuses_what_was_asked_for():
    schedule = measure.random_schedule([f"b{k}" for k in range(84)], Flops((1.0,) * 84, 0.0), 10, 0.56)
    assert schedule.cur == pytest.approx(0.56, abs=0.5 / 840) and schedule.compute[0].all()
    assert not torch.equal(schedule.compute[1], schedule.compute[2])


@pytest.fixture(scope="module")
def of_caches(tmp_path_factory):
    path = tmp_path_factory.mktemp("caches") / "caches.json"
    report = rows_of(path, "caches", *DIT[2:], "--layers", 3, "--steps", 6)
    return {row["method"]: row for row in report["rows"]}


@pytest.mark.parametrize("method, computed", [
    ("diffusers FirstBlockCache", [6, 2, 2, 2, 2, 2]), ("diffusers PyramidAttentionBroadcast", [6, 3, 6, 3, 6, 3]),
    ("diffusers TaylorSeer", [6, 6, 0, 6, 0, 6]), ("diffusers MagCache", [6, 0, 6, 0, 6, 0]),
    ("cache-dit DBCache", [6, 2, 6, 2, 6, 2])])
def test_what_a_cache_skips_ours_skips(of_caches, method, computed):
    row = of_caches[method]
    if method.startswith("cache-dit") and measure.installed("cache-dit") is None:
        assert "not installed" in row["note"]
        return
    assert row["computed"] == computed and row["cur"] == pytest.approx(1 - sum(computed) / 36)
    assert 0 < row["error"] < 1 and 0 < row["our_error"] < 1
    assert row["our_lines"] == 2 < row["lines"]


@pytest.mark.parametrize("method", ["diffusers PyramidAttentionBroadcast", "diffusers TaylorSeer"])
def test_where_the_method_is_the_same_the_images_are(of_caches, method):
    assert of_caches[method]["error"] == pytest.approx(of_caches[method]["our_error"], rel=1e-3)


def test_what_cannot_run_on_dit_says_why(of_caches):
    assert "skips nothing" in of_caches["diffusers SeaCache"]["note"]
    assert "RuntimeError" in of_caches["diffusers FasterCache"]["note"]
    assert "skips nothing" in of_caches["diffusers TaylorSeer, as it comes"]["note"]
    assert all("speedup" not in of_caches[name] for name in ("diffusers SeaCache", "diffusers FasterCache"))


@pytest.mark.parametrize("method", [caches.pyramid_attention_broadcast, caches.taylorseer, caches.mag_cache])
def test_the_work_skipped_is_the_branches_own(method):
    transformer, arguments = MODELS["dit-xl-2-256"].build(1, 2)
    runner = models.Runner(MODELS["dit-xl-2-256"], 4, 1, 2)
    branches, flops = runner.adapter.branch_names, runner.flops
    theirs, ours, schedule = caches.watched(transformer, 4, method, dict(method="", note=""), branches, flops)
    everything = measure.random_schedule(branches, flops, 4, 0.0)
    of_theirs = caches.Candidate(transformer, 4, caches.uncached)
    of_ours = caches.Candidate(transformer, 4, lambda pipe, steps: caches.applied(pipe, everything))
    own = sum(f for row in schedule.rows for f, c in zip(flops.branches, row) if not c)
    for candidate, computing in ((theirs, of_theirs), (ours, of_ours)):
        skipped = total_flops(computing.run) - total_flops(candidate.run)
        assert skipped >= own > 0.9 * skipped  # with a branch, its modulation may be skipped


def total_flops(run) -> float:
    from harmonica_dit.pipelines.adapters.generic import flop_counter

    with flop_counter() as counter:
        run()
    return counter.get_total_flops()


def test_without_cache_dit_its_row_says_so(monkeypatch):
    monkeypatch.setattr(caches, "installed", lambda package: None)
    rows = caches.bench_caches(steps=2, rounds=1, heads=1, layers=2)
    assert "not installed" in rows[-1]["note"] and "speedup" not in rows[-1]


@pytest.fixture(scope="module")
def of_quantized(tmp_path_factory):
    pytest.importorskip("torchao")
    path = tmp_path_factory.mktemp("quantized") / "quantized.json"
    report = rows_of(path, "quantized", "--heads", 4, "--layers", 2, "--rounds", 1, "--steps", 3, "--cur", 0.5)
    return {row["weights"]: row for row in report["rows"]}


def test_quantized_rows(of_quantized):
    for kind in ("int8 weight-only", "int8 dynamic", "int4 weight-only, dequantized"):
        row = of_quantized[kind]
        assert row["cur"] == 0.5 and 0 < row["error_quantized"] < 0.5 and 0 < row["error_both"] < 0.5
        assert row["product"] == pytest.approx(row["speedup_quantized"] * row["speedup_router"])
        assert row["error_router"] == of_quantized["int8 dynamic"]["error_router"] > 0
    error = {kind: row["error_quantized"] for kind, row in of_quantized.items() if "error_quantized" in row}
    assert error["int8 weight-only"] < error["int8 dynamic"] < error["int4 weight-only, dequantized"]


def test_what_the_hardware_lacks_is_said(of_quantized):
    for kind in ("int4 weight-only, packed", "fp8 dynamic"):
        assert of_quantized[kind]["note"].startswith("cannot run here: ")
        assert "speedup_both" not in of_quantized[kind]


def test_quantization_is_of_the_blocks_linears_alone():
    pytest.importorskip("torchao")
    transformer, _ = MODELS["pixart-alpha-256"].build(1, 1)
    model = quantized.quantized(transformer, quantized.int8_weight_only)
    block = model.transformer_blocks[0]
    assert type(block.attn1.to_q.weight) is not torch.nn.Parameter and type(model.proj_out.weight) is torch.nn.Parameter
    assert type(transformer.transformer_blocks[0].attn1.to_q.weight) is torch.nn.Parameter


def test_weights_that_were_left_as_they_were_are_no_row():
    torchao = pytest.importorskip("torchao.quantization")
    transformer, _ = MODELS["pixart-alpha-256"].build(1, 1)  # 72 and 288 wide: int4's groups of 128 fit neither
    with pytest.raises(ValueError, match="left transformer_blocks.0"):
        quantized.quantized(transformer, lambda: torchao.Int4WeightOnlyConfig(group_size=128))


@pytest.mark.parametrize("arguments, said", [
    (["models", "resnet-50"], "model: got 'resnet-50'"),
    (["models", "dit-xl-2-256", "--rounds", 0], "rounds: got 0"),
    (["models", "dit-xl-2-256", "--heads", 0], "heads: got 0"),
    (["models", "dit-xl-2-256", "--cur", 0.95, "--steps", 4, *DIT], "cur: got 0.95, expected 0 to 0.75"),
    (["caches", "--steps", 1], "steps: got 1"),
    (["caches", "--layers", 1], "layers: got 1"),
    (["quantized", "--cur", -1, "--steps", 4, *DIT], "cur: got -1"),
    (["quantized", "--layers", 0], "layers: got 0"),
    (["models", "--json", "."], "is a folder"),
    (["flowers"], "flowers")])
def test_what_cannot_be_measured_is_said_in_one_line(arguments, said):
    result = bench(*arguments)
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("harmonica: ")]
    assert len(lines) == 1 and said in lines[0] and "Traceback" not in result.output


def test_tables_show_every_row(of_models, of_caches):
    console = Console(width=250, record=True, quiet=False, file=open("/dev/null", "w"))
    console.print(measure.table("title", models.CAPTION, models.COLUMNS, of_models["rows"]))
    console.print(measure.table("title", caches.CAPTION, caches.COLUMNS, list(of_caches.values())))
    text = console.export_text()
    assert all(row["model"] in text for row in of_models["rows"]) and all(name in text for name in of_caches)
