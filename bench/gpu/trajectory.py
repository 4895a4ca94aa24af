"""Whole trajectories of a DiT-XL/2 at 256 pixels, random weights, bfloat16, T = 20, with guidance.

plain: the plain model in eager PyTorch, with SDPA; in a graph: the same, recorded, so that what is left of its distance
from ours is no cost of launches. ours, eager and captured: `denoise` and its executor, the whole
trajectory in one graph. The reference's way: see reference_way. For a schedule, should / does is the time that it
should take over the time that it takes, captured: should = fixed part + the computed branches' own measured times. A
branch's own time is that of its kind's bodies, one after the other in a CUDA graph, each with its own weights as in the
model, over their number; the fixed part is the rest of the uncached captured trajectory. Reused branches are promised
to cost nothing. Whole steps: every second one is a forecast of the trunk. Dependent launches: the norms begin while the
kernel before them ends. They come last, for no GPU has run them yet, and what fails in them must spoil nothing else.
"""

from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor

import harmonica_kernels as hk
from bench.problems import Plain
from bench.timing import branch_seconds, capture, relative_error, side_stream
from harmonica_dit.methods import trunk_forecast
from harmonica_dit.sample import denoise
from harmonica_kernels.triton_kernels import _launch

from . import models
from .record import Record
from .reference_way import ReferenceWay, tf32

REACH = {1: dict(plain=3.0, reference=2.5), 8: dict(plain=1.2, reference=1.2)}  # by images: half as many as rows


def run(record: Record) -> None:
    net = models.model(record.tiny, record.device, models.attention(record.path.parent))
    config = models.config(record.tiny)
    plain = Plain(net, torch.bfloat16, config)
    exact = Plain(net, torch.float32, config)
    measured = {}
    for images, rounds in ((1, 9), (8, 7)):
        with torch.inference_mode(), record.attempt(f"{2 * images} rows"):
            measured[images] = measure(record, net, plain, exact, images, rounds)
    for images, candidates in measured.items():  # after all timing, which the profiler could slow
        with torch.inference_mode(), record.attempt(f"{2 * images} rows, profile"):
            for name in ("ours", "LTC"):
                record.note(f"profile, {2 * images} rows, {name}", profile(candidates[name]))
        with torch.inference_mode(), record.attempt(f"{2 * images} rows, memory"):
            record.row(rows=2 * images, **peaks(record, net, plain, images))
    for images in measured:
        with torch.inference_mode(), record.attempt(f"{2 * images} rows, dependent launches"):
            dependent_launches(record, net, images)


def measure(record: Record, net, plain: Plain, exact: Plain, images: int,
            rounds: int) -> dict[str, Callable[[], Tensor]]:
    """Returns what was timed."""
    device, steps = record.device, models.steps(record.tiny)
    schedules = models.schedules(net, steps)
    noise, executor = models.noise(net, images, device), hk.compile(denoise)
    ours, theirs, exactly = (models.trajectory(m, images, device, steps) for m in (net, plain, exact))
    limit = check(record, f"{2 * images} rows", ours, theirs, exactly, noise)

    candidates: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: denoise(theirs, noise), "plain, in a graph": lambda: executor(theirs, noise),
        "ours, eager": lambda: denoise(ours, noise),
        "ours": lambda: executor(ours, noise)}
    for name, schedule in schedules.items():
        ways = [models.trajectory(ReferenceWay(m, schedule, ours.timesteps), images, device, steps)
                for m in (plain, exact)]
        check_reuse(record, f"{2 * images} rows, {name}", ours, ways[1], schedule, noise, limit)
        candidates |= {
            f"{name}, eager": lambda s=schedule: denoise(ours, noise, s),
            name: lambda s=schedule: executor(ours, noise, s),
            f"{name}, reference's way, bfloat16": lambda way=ways[0]: denoise(way, noise),
            f"{name}, reference's way, float32": tf32(lambda way=ways[1]: denoise(way, noise))}
    whole = trunk_forecast(net, steps, every=2)
    candidates |= {"whole steps, eager": lambda: denoise(ours, noise, whole),
                   "whole steps": lambda: executor(ours, noise, whole)}
    with side_stream(device):
        kinds = bodies(net, 2 * images)
    for _ in range(3):
        candidates["plain, in a graph"]()
    for name in ("ours", *schedules, "whole steps"):
        eager = candidates[f"{name}, eager"]()
        for _ in range(3):  # runs, records, replays
            replayed = candidates[name]()
        record.check(f"{2 * images} rows, {name}: captured beside eager", relative_error(replayed, eager), 0.02)

    seconds = record.time(f"{2 * images} rows", candidates | kinds, rounds)
    report(record, net, schedules, seconds, images)
    computed = sum(row is not False for row in whole.rows)
    step = seconds["ours"] / steps
    skipped = (seconds["whole steps"] - computed * step) / (steps - computed)
    record.row(rows=2 * images, schedule="whole steps", **{
        "computed step, µs": step * 1e6, "skipped step, µs": skipped * 1e6, "skipped / computed": skipped / step})
    return candidates


def dependent_launches(record: Record, net, images: int) -> None:
    """The uncached trajectory in a graph whose norms are launched so, beside two graphs of the usual kind. From one it
    may differ as the other does: not at all, if matrix products give the same bits each time."""
    where, device = f"{2 * images} rows, launches", record.device
    trajectory = models.trajectory(net, images, device, models.steps(record.tiny))
    noise, candidates = models.noise(net, images, device), {}
    for name, dependent in (("usual", False), ("again", False), ("dependent", device.type == "cuda")):
        executor = hk.compile(denoise)
        candidates[name] = lambda executor=executor: executor(trajectory, noise)
        with patch.object(_launch, "DEPENDENT", dependent):
            for _ in range(2):  # runs, records
                candidates[name]()
    usual, again, dependent = (call() for call in candidates.values())
    record.check(f"{where}: dependent beside usual ones, at most as usual ones beside each other",
                 relative_error(dependent, usual), relative_error(again, usual))
    seconds = record.time(where, candidates, 9)
    record.row(rows=2 * images, **{f"{name} launches, ms": seconds[name] * 1e3 for name in candidates},
               **{"usual / dependent": seconds["usual"] / seconds["dependent"]})


def check(record: Record, where: str, ours, plain, exact, noise: Tensor) -> float:
    """One forward beside float32's; ours may err as plain PyTorch does in the same dtype, and half as much again.

    Returns that limit.
    """
    truth = exact.predict(noise, 0)
    limit = 1.5 * relative_error(plain.predict(noise, 0), truth) + 1e-3
    record.check(f"{where}: a forward of ours beside float32 (limit: plain bfloat16's, and half)",
                 relative_error(ours.predict(noise, 0), truth), limit)
    return limit


def check_reuse(record: Record, where: str, ours, way, schedule, noise: Tensor, limit: float) -> None:
    """A step that reuses what another x left in the cache, so that much depends on it, beside the reference's way."""
    other, cache = noise.flip(-1), hk.FeatureCache()
    for s, x in enumerate((noise, other)):
        found, truth = ours.predict(x, s, row=schedule.rows[s], cache=cache), way.predict(x, s)
    difference = relative_error(found, truth)
    record.check(f"{where}: a step with reuse beside the reference's way in float32", difference, limit)
    record.note(f"{where}: what reuse changed there", relative_error(ours.predict(other, 1), truth))


def bodies(net, rows: int) -> dict[str, Callable[[], object]]:
    """For each kind of branch, a graph of all its bodies. To be made inside `side_stream`."""
    N, D = net.grid**2, net.pos_embed.shape[-1]
    h = torch.randn(rows, N, D, device=net.pos_embed.device).to(net.pos_embed.dtype)
    outs = torch.empty(len(net.branches), *h.shape, dtype=h.dtype, device=h.device)

    def all_of(kind: int) -> Callable[[], None]:
        def call() -> None:
            for k in range(kind, len(net.branches), 2):
                net.branches[k].body_out(h, None, outs[k])
        return call

    return {kind: capture(all_of(i), h.device) for i, kind in enumerate(("attention bodies", "feed-forward bodies"))}


def report(record: Record, net, schedules: dict, seconds: dict[str, float], images: int) -> None:
    rows, reach = 2 * images, REACH[images]
    ways = ("plain", "plain, in a graph", "ours, eager", "ours")
    record.row(rows=rows, **{f"{name}, ms": seconds[name] * 1e3 for name in ways})
    record.ratio(f"{rows} rows, uncached: eager PyTorch / ours", seconds["plain"] / seconds["ours"], reach["plain"])
    each = len(net.branches) // 2
    body = [seconds[f"{kind} bodies"] / each for kind in ("attention", "feed-forward")]
    fixed = seconds["ours"] - len(schedules["LTC"].rows) * each * sum(body)
    record.row(rows=rows, **{"attention body, µs": body[0] * 1e6, "feed-forward body, µs": body[1] * 1e6,
                             "fixed part, ms": fixed * 1e3})
    for name, schedule in schedules.items():
        should = fixed + branch_seconds(schedule.rows, body * each)
        wall = seconds["ours"] / seconds[name]
        published = seconds[f"{name}, reference's way, float32"] / seconds[name]
        in_bf16 = seconds[f"{name}, reference's way, bfloat16"] / seconds[name]
        record.row(rows=rows, schedule=name, **{
            "CUR, %": 100 * schedule.cur, "ours, ms": seconds[name] * 1e3,
            "ours eager, ms": seconds[f"{name}, eager"] * 1e3, "should / does": should / seconds[name], "wall": wall,
            "FLOPs": schedule.speedup, "wall / FLOPs": wall / schedule.speedup, "reference bf16 / ours": in_bf16,
            "reference TF32 / ours": published})
        record.ratio(f"{rows} rows, {name}: should take / takes", should / seconds[name], 0.97)
        record.ratio(f"{rows} rows, {name}: the reference's way in bf16 / ours", in_bf16, reach["reference"])


def peaks(record: Record, net, plain: Plain, images: int) -> dict[str, float]:
    """MB that inference holds at most beside the weights, of each way, its graph's memory included; 0 on a CPU."""
    device, steps = record.device, models.steps(record.tiny)
    noise, found = models.noise(net, images, device), {}
    for name, model, executor in (("plain", plain, None), ("captured", net, hk.compile(denoise)),
                                  ("gated", net, hk.compile(denoise, mode="gated"))):
        trajectory, before = models.trajectory(model, images, device, steps), 0
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        for _ in range(1 if executor is None else 3):  # runs, records, replays
            (executor or denoise)(trajectory, noise)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        found[f"{name}, peak MB"] = (peak - before) / 1e6
        if executor is not None:
            executor.reset()
    return found


def profile(call: Callable[[], object]) -> str:
    """Where the GPU's time goes in one call: kernels by their total."""
    with torch.profiler.profile(activities=torch.profiler.supported_activities(), acc_events=True) as found:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return found.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=80)
