"""The suites of bench/ at tiny sizes: numbers that do not depend on the clock, and what is refused."""

import io
import mmap
import multiprocessing
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import (
    bench_caches,
    bench_costs,
    bench_forward,
    bench_models,
    bench_overhead,
    bench_quantized,
    bench_residual_norm,
    other_caches,
    sdt_models,
)
from bench.bench_sdt import resident
from bench.diffusers_models import MODELS
from bench.problems import random_schedule
from bench.record import installed_version, table
from bench.sdt_loops import LEARNING_TO_CACHE, Problem
from bench.sdt_models import PIXART
from harmonica_dit.costs import Seconds
from harmonica_dit.flops import Flops
from harmonica_dit.models import CONFIGS, DiT
from harmonica_dit.schedule import Schedule


def test_memory_that_was_used_stays_in_the_peak():
    with multiprocessing.get_context("fork").Pool(1) as pool:  # its peak is its own
        assert 128 << 20 <= pool.apply(use_memory, [256 << 20]) < 264 << 20


def use_memory(size: int) -> int:
    """Bytes by which the peak has grown after so many were used and given back."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is used now, not before a collection
    before = resident()
    # Pages of its own: a tensor may be given what earlier tests have left to the allocator, which is in use already.
    mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()
    return resident() - before


def test_a_table_and_a_clock_are_set_side_by_side(monkeypatch):
    """By made-up times: whatever is cached takes a tenth longer than by the table."""
    table = Seconds((3.0, 1.0) * 8, 1.0, 0.1, 0.5, 0.2, 32.0)
    monkeypatch.setattr(bench_costs, "measure_costs", lambda net, **_: table)
    monkeypatch.setattr(bench_costs, "interleave", lambda calls, *_, **__: {name: [
        20 * table.uncached if call.__defaults__[0] is None else 1.1 * table.of_trajectory(call.__defaults__[0])]
        for name, call in calls.items()})
    found = bench_costs.measure("fashion-dit", **bench_costs.TINY | dict(steps=20))
    assert len(found.rows) == len(found.seconds) - 1 == 12
    for name, row in found.rows.items():
        assert row["clock_over_table"] == pytest.approx(1 / 1.1)
        assert row["asked"] <= row["table"] < row["asked"] * (1.02 if name.startswith("router") else 1.3)


@pytest.mark.parametrize("layers, whole", [(None, lambda one, two: one + 27 * (two - one)), (1, lambda one, _: one)])
def test_what_a_router_costs_is_scaled_from_one_block_and_two(monkeypatch, layers, whole):
    """Of the seconds and bytes that are found; the model's own numbers are those of 28 blocks."""
    took = {"ours": (2.0, 3.0), "published": (4.0, 7.0), LEARNING_TO_CACHE: (5.0, 8.0)}
    monkeypatch.setattr(bench_overhead, "peaks_of", lambda runs: [took[r][m["depth"] - 1] * 2**30 for r, m in runs])
    monkeypatch.setattr(bench_overhead, "interleave", lambda calls, *_, **__: {
        (loop, i): [4 * took[loop][i]] for loop, i in calls})
    rows = bench_overhead.measure("DiT-S/8", images=1, steps=5, rounds=1, warmup=0, layers=layers).rows
    for loop, pair in took.items():
        row = rows[loop]
        assert row["seconds"] == row["peak_gib"] == whole(*pair) and row["rows"] == 2
        assert row["time_over_ours"] == pytest.approx(1 / row["ours_over_peak"]) == whole(*pair) / whole(*took["ours"])
    with torch.device("meta"):
        net = DiT(**CONFIGS["DiT-S/8"] | dict(depth=28 if layers is None else 1))
    assert row["parameters_share"] == 20 * len(net.branches) / sum(p.numel() for p in net.parameters())
    assert 0 < row["flops_share"] < 1e-4


@pytest.mark.parametrize("model", ["DiT-S/8", PIXART])
def test_every_loop_of_sdt_does_the_same_work(monkeypatch, model):
    """Beyond the first update too. Learning-to-Cache is another method."""
    monkeypatch.setattr(sdt_models, "HEADS", 1)
    problem = Problem(model, images=1, steps=3, depth=1, dtype="float32", device="cpu")
    ours = torch.tensor(problem.run("ours"))
    for loop in ("plain", "published"):
        torch.testing.assert_close(torch.tensor(problem.run(loop)), ours, rtol=1e-2, atol=0)
    theirs = torch.tensor(problem.run(LEARNING_TO_CACHE))
    assert theirs.isfinite().all() and len(theirs) == 2 and not torch.allclose(theirs, ours, rtol=1e-2)


@pytest.fixture(scope="module")
def of_models():
    """A row for each of four models."""
    names = ("dit-xl-2-256", "pixart-alpha-256", "wan-1-frame", "flux-256")
    return [bench_models.measure(name, **bench_models.TINY, cur=0.56).rows["cached"] for name in names]


@pytest.mark.parametrize("number, name, K, shape", [
    (0, "dit-xl-2-256", 2 * 2, (2, 256, 72)), (1, "pixart-alpha-256", 3 * 2, (2, 256, 72)),
    (2, "wan-1-frame", 3 * 2, (1, 1560, 128))])
def test_a_models_row(of_models, number, name, K, shape):
    row = of_models[number]
    B, N, D = shape
    assert (row["model"], row["K"], row["rows"], row["tokens"], row["width"]) == (name, K, B, N, D)
    assert row["cache_bytes"] == K * B * N * D * 4
    assert row["trunk_cache_bytes"] == 2 * (1 if name.startswith("wan") else 2) * B * N * D * 4  # fused: and tokens
    assert 1.3 < row["trunk_flops_speedup"] < 2 and row["skipped_over_computed"] > 0
    assert row["trunk_wall_over_flops"] == pytest.approx(
        row["seconds"]["plain"][1] / row["seconds"]["trunk"][1] / row["trunk_flops_speedup"])
    assert row["cur"] == pytest.approx(round(0.56 * 4 * K) / (4 * K))
    assert row["wall_speedup"] == pytest.approx(row["seconds"]["plain"][1] / row["seconds"]["cached"][1])
    assert row["wall_over_flops"] == pytest.approx(row["wall_speedup"] / row["flops_speedup"])
    assert 1 < row["flops_speedup"] < 1 / (1 - row["cur"]) * 2
    assert row["error_at_cur_0"] < 1e-5 and row["path"] == ("generic" if name.startswith("wan") else "fused")
    body, fixed = row["body_seconds"], row["fixed_seconds"]
    assert len(body) == K and min(body) > 0
    assert 4 * sum(body) + fixed + row["hoist_seconds"]["computed"] == pytest.approx(row["seconds"]["computed"][1])


def test_single_stream_branches_are_clocked_with_what_feeds_them(of_models):
    row = of_models[3]
    assert row["K"] == 3 * 2 + 2 and row["tokens"] == 256 + 512 and row["error_at_cur_0"] == 0
    runner = bench_models.Runner(MODELS["flux-256"], 2, heads=1, layers=1)
    modules = runner.adapter.modules
    assert len(modules[-1]) == 3  # proj_out, attn, proj_mlp


def test_clocks_of_a_fused_adapter_leave_it_as_it_was():
    runner = bench_models.Runner(MODELS["dit-xl-2-256"], 2, heads=1, layers=1)
    branches = list(runner.adapter.branches)
    with torch.inference_mode(), runner.clocks() as seconds:
        runner.cached(random_schedule(runner.adapter.branch_names, runner.flops, 2, 0.0))
    assert min(seconds) > 0 and runner.adapter.branches == branches


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
    schedule = random_schedule([f"b{k}" for k in range(84)], Flops((1.0,) * 84, 0.0), 10, 0.56)
    assert schedule.cur == pytest.approx(0.56, abs=0.5 / 840) and schedule.compute[0].all()
    assert not torch.equal(schedule.compute[1], schedule.compute[2])


@pytest.fixture(scope="module")
def of_caches():
    return bench_caches.measure(**bench_caches.TINY).rows


@pytest.mark.parametrize("method, computed", [
    ("diffusers FirstBlockCache", [6, 2, 2, 2, 2, 2]), ("diffusers PyramidAttentionBroadcast", [6, 3, 6, 3, 6, 3]),
    ("diffusers TaylorSeer", [6, 6, 0, 6, 0, 6]), ("diffusers MagCache", [6, 0, 6, 0, 6, 0]),
    ("cache-dit DBCache", [6, 2, 6, 2, 6, 2])])
def test_what_a_cache_skips_ours_skips(of_caches, method, computed):
    row = of_caches[method]
    if method.startswith("cache-dit") and installed_version("cache-dit") is None:
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


@pytest.mark.parametrize("method", [other_caches.pyramid_attention_broadcast, other_caches.taylorseer,
                                    other_caches.mag_cache])
def test_the_work_skipped_is_the_branches_own(method):
    transformer, arguments = MODELS["dit-xl-2-256"].build(1, 2)
    runner = bench_models.Runner(MODELS["dit-xl-2-256"], 4, 1, 2)
    branches, flops = runner.adapter.branch_names, runner.flops
    theirs, ours, schedule = bench_caches.watch(transformer, 4, method, dict(method="", note=""), branches, flops)
    compute = torch.ones(4, len(branches), dtype=torch.bool)
    compute[3, 0] = False  # with nothing reused the plain model would run, which computes nothing ahead
    almost = Schedule(compute, branches, flops)
    of_theirs = bench_caches.Candidate(transformer, 4, other_caches.nothing)
    of_ours = bench_caches.Candidate(transformer, 4, lambda pipe, steps: other_caches.ours(pipe, almost))
    own = sum(f for row in schedule.rows for f, c in zip(flops.branches, row) if not c)
    for candidate, computing, first in ((theirs, of_theirs, 0.0), (ours, of_ours, flops.branches[0])):
        skipped = total_flops(computing.run) - total_flops(candidate.run) + first
        assert skipped >= own > 0.9 * skipped  # with a branch, its modulation may be skipped


def total_flops(run) -> float:
    from harmonica_dit.pipelines.adapters.generic import flop_counter

    with flop_counter() as counter:
        run()
    return counter.get_total_flops()


def test_without_cache_dit_its_row_says_so(monkeypatch):
    monkeypatch.setattr(bench_caches, "installed_version", lambda package: None)
    monkeypatch.setattr(bench_caches, "METHODS", {"cache-dit DBCache": (other_caches.cache_dit, "")})
    measured = bench_caches.measure(**bench_caches.TINY)
    row = measured.rows["cache-dit DBCache"]
    assert "not installed" in row["note"] and "speedup" not in row and "cache-dit DBCache" not in measured.seconds


@pytest.fixture(scope="module")
def of_quantized():
    pytest.importorskip("torchao")
    return bench_quantized.measure(**bench_quantized.TINY).rows


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


def test_an_error_of_ours_is_not_called_the_hardwares(monkeypatch):
    init = bench_quantized.Pipeline.__init__

    def refuse_quantized(self, transformer, arguments, schedule=None):
        if schedule is not None and transformer in made:
            raise ValueError("ours")
        init(self, transformer, arguments, schedule)

    made, quantize = [], bench_quantized.quantize
    monkeypatch.setattr(bench_quantized.Pipeline, "__init__", refuse_quantized)
    monkeypatch.setattr(bench_quantized, "quantize", lambda *args: made.append(quantize(*args)) or made[-1])
    with pytest.raises(ValueError, match="ours"):
        bench_quantized.measure(**bench_quantized.TINY)


def test_a_trajectorys_rows_hold_together():
    found = bench_forward.measure("fashion-dit", **bench_forward.TINY)
    assert found.seconds.keys() == {"plain", "ours", "clocked", *bench_forward.SCHEDULES}
    for kind, row in found.rows.items():
        assert row["wall_over_flops"] == pytest.approx(row["wall_speedup"] / row["flops_speedup"])
        assert row["wall_speedup"] == pytest.approx(found.seconds["ours"][0] / found.seconds[kind][0])
        assert row["plain_over_ours"] == pytest.approx(found.seconds["plain"][0] / found.seconds["ours"][0])
        assert row["flops_speedup"] > 1 and row["rows"] == 2
    alone, steps = found.rows[bench_forward.LONE], bench_forward.TINY["steps"]
    lone, whole = found.seconds[bench_forward.LONE][0], found.seconds["ours"][0] / steps
    assert alone["forecast_over_computed"] == pytest.approx((lone - whole) / (steps - 1) / whole)


def test_a_shape_of_residual_norm_is_measured():
    copy = bench_residual_norm.Copy(rows=1, rotate=1)
    for shape in (bench_residual_norm.CASES[0], bench_residual_norm.CASES[4]):
        found = bench_residual_norm.measure(shape, copy, **bench_residual_norm.TINY)
        row = found.rows["ours"]
        moved = 256 * 1152 * (3 + shape.R if shape.R else 2) * shape.dtype.itemsize  # of one row of the batch
        assert row["ours_gb_s"] == pytest.approx(moved / found.seconds["ours"][0] / 1e9) and row["shape"][:2] == "[1"
        assert row["eager_over_ours"] == pytest.approx(found.seconds["eager"][0] / found.seconds["ours"][0])


def test_a_short_call_is_timed_as_its_share_of_several(monkeypatch):
    monkeypatch.setattr(bench_residual_norm, "interleave", lambda *_, **how: dict(ours=[6.0], eager=[9.0], copy=[1.0]))
    copy, shape = bench_residual_norm.Copy(rows=1, rotate=1), bench_residual_norm.CASES[-1]
    times = (1 << 20) // (4 * 1152 * 4)  # as often as its four tensors fit in 1 MB
    found = bench_residual_norm.measure(shape, copy, **bench_residual_norm.TINY | dict(rotate=1 << 20))
    assert found.seconds == dict(ours=[6 / times], eager=[9 / times], copy=[1])


@pytest.mark.parametrize("measure, said", [
    (lambda: bench_models.measure("dit-xl-2-256", **bench_models.TINY, cur=0.95), "cur: got 0.95, expected 0 to 0.75"),
    (lambda: bench_quantized.measure(**bench_quantized.TINY | dict(cur=-1)), "cur: got -1"),
    (lambda: bench_caches.measure(**bench_caches.TINY | dict(steps=1)), "steps: got 1"),
    (lambda: bench_caches.measure(**bench_caches.TINY | dict(layers=1)), "layers: got 1")])
def test_what_cannot_be_measured_is_said(measure, said):
    with pytest.raises(ValueError, match=said):
        measure()


def test_tables_show_every_model_and_cache(of_models, of_caches):
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(table("title", bench_models.CAPTION, bench_models.COLUMNS, of_models))
    console.print(table("title", bench_caches.CAPTION, bench_caches.COLUMNS, list(of_caches.values())))
    text = console.export_text()
    assert all(row["model"] in text for row in of_models) and all(name in text for name in of_caches)
