"""Device-gated trajectories on a GPU, from the smallest case up: `python -m bench.gpu.gated [STEP ...]`.

Every step is a process of its own with a time limit, and prints lines of JSON before the next one begins, so that a run
that fails half-way says where.

    smallest   WHILE -> IF nodes -> child graphs with one kernel, without Python or torch; what idle nodes cost
    dit        DiT-XL/2 256 (random weights, bfloat16, T=20), 2 and 16 rows: gated and captured on the same schedule, a
               changed router against a new capture, launches and synchronisations inside a trajectory
    bodies     random small models against the plan walked on the CPU
    cublas     60 bodies of one bfloat16 GEMM each
    change     the same model as dit's, decided by the change of the first branch's output
    memory     10,000 trajectories with router changes, and a new capture for every thousand: memory held by the device
               at the end and at the beginning
    sanitizer  the smallest case under compute-sanitizer
"""

import faulthandler
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import harmonica_kernels as hk
from bench import ROOT
from bench.problems import random_schedule
from harmonica_dit.flops import Flops
from harmonica_dit.sample import denoise
from harmonica_dit.timing import interleave, medians
from support.loops import Table, Trajectory

from . import models
from .record import clocks, spin

DEVICE, TRAJECTORIES = torch.device("cuda", 0), 10_000
ATTENTION = os.environ.get("HARMONICA_ATTENTION", "sdpa")  # the back end, as the part `gated` knows it
LIMITS = dict(smallest=60, dit=90, bodies=60, cublas=60, change=60, memory=60, sanitizer=90)  # seconds


def report(**facts) -> None:
    print(json.dumps(facts), flush=True)


def milliseconds(step: str, candidates: dict[str, Callable[[], object]], rounds: int = 20) -> dict[str, float]:
    """Each one's median time on the device, interleaved, after three calls that warm up and record. The device's clocks
    are brought up before, and reported after."""
    for candidate in candidates.values():
        candidate()  # records, which takes longer than clocks stay up
    spin(DEVICE)
    found = medians(interleave(candidates, rounds, warmup=3, device=DEVICE))
    report(step=step, clocks=clocks(DEVICE))
    return {name: 1e3 * seconds for name, seconds in found.items()}


def agree(found: Tensor, expected: Tensor, limit: float, **facts) -> bool:
    """Reports how far they are apart; whether that is at most `limit` times the largest value."""
    difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    report(**facts, difference=difference, largest=largest, limit=limit)
    return difference <= limit * largest  # not where either is NaN


@contextmanager
def smallest_program() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "smallest"
        sources = [ROOT / path for path in ("tests/cuda/smallest.cu", "csrc/cuda/decide.cu", "csrc/cuda/graph.cpp")]
        subprocess.run(["nvcc", "-std=c++17", "-O2", "-arch=native", *sources, "-o", program], check=True, timeout=45)
        yield program


def smallest() -> None:
    with smallest_program() as program:
        subprocess.run([program], check=True, timeout=10)


def sanitizer() -> None:
    with smallest_program() as program:
        results = {tool: subprocess.run(["compute-sanitizer", "--tool", tool, "--error-exitcode", "2", program],
                                        capture_output=True, text=True, timeout=20)
                   for tool in ("memcheck", "racecheck")}
    for tool, result in results.items():
        report(step="sanitizer", tool=tool, code=result.returncode, said=result.stdout.splitlines()[-20:])
    assert not any(result.returncode for result in results.values())


def bodies() -> None:
    right = True
    for _ in range(20):
        T, K = random.randint(1, 6), random.randint(1, 9)
        trajectory = Trajectory(T, K)
        there, gated, walked = trajectory.to(DEVICE), gated_executor(), gated_executor()
        for forecast in (False, True):
            table = Table(torch.rand(T, K), torch.randn(T, K) * 0.3 if forecast else None)
            noise = torch.randn(trajectory.shape)
            for executor in (gated, walked):
                executor.load(table)
                executor.threshold = 0.5
            found, expected = gated(there, noise.to(DEVICE)).cpu(), walked(trajectory, noise)
            same = torch.equal(gated.reused, walked.reused)
            right &= agree(found, expected, 1e-3, step="bodies", T=T, K=K, forecast=forecast, same_decisions=same)
            right &= same
        gated.reset()
    assert right


def cublas() -> None:
    T, K = 20, 60
    trajectory = Trajectory(T, K, n=2, tokens=256, width=1152, dtype=torch.bfloat16, plain=True)
    there, gated = trajectory.to(DEVICE), gated_executor()
    noise = torch.randn(trajectory.shape, device=DEVICE)
    for share in (1.0, 0.5, 0.0):
        gated.load(Table((torch.rand(T, K) < share).float()))
        time_ms = milliseconds("cublas", {"gated": lambda: gated(there, noise)})["gated"]
        report(step="cublas", computed=1 - gated.reused.float().mean().item(), ms=time_ms)


def dit() -> None:
    net, right = models.model(False, DEVICE, ATTENTION), True
    for images in (1, 8):
        trajectory, noise = dit_trajectory(net, images)
        schedule, rows = new_schedule(trajectory, 0.375), 2 * images
        captured, gated = hk.compile(denoise), hk.compile(denoise, mode="gated")
        with torch.no_grad():
            begin = time.perf_counter()
            found, expected = (executor(trajectory, noise, schedule) for executor in (gated, captured))
            report(step="dit", rows=rows, first_calls_s=time.perf_counter() - begin)
            same = agree(found, expected, 0.02, step="dit", rows=rows, cur=schedule.cur)
            times = milliseconds("dit", {name: partial(executor, trajectory, noise, schedule)
                                         for name, executor in (("captured", captured), ("gated", gated))})
            report(step="dit", rows=rows, valid=same, **times)
            if same:  # or else the ratio would be of something else
                report(step="dit", rows=rows, gated_by_captured=times["gated"] / times["captured"])
            right &= same
            switch(gated, trajectory, noise)
        captured.reset()
        if images == 1:
            gated.reset()
    report(step="dit", rows=rows, calls_inside=calls(gated._last.run))
    assert right


def switch(gated, trajectory, noise) -> None:
    """Time from a changed router to the end of the first image, with and without a new capture."""
    def first_image(executor, schedule) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        executor(trajectory, noise, schedule)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    image = statistics.median(first_image(gated, None) for _ in range(5))
    written = statistics.median(first_image(gated, new_schedule(trajectory, 0.4)) for _ in range(5))
    new = hk.compile(denoise, mode="gated")
    capture = first_image(new, new_schedule(trajectory, 0.4))
    new.reset()
    report(step="dit", rows=2 * len(noise), image_s=image, changed_router_s=written, new_capture_s=capture,
           change_alone_s=written - image, capture_alone_s=capture - image)


def change() -> None:
    trajectory, noise = dit_trajectory(models.model(False, DEVICE, ATTENTION), 1)
    gated = hk.compile(denoise, mode="gated", rule="change")
    with torch.no_grad():
        for threshold in (0.0, 0.05, 0.1, 0.2, 1e9):
            gated.threshold = threshold
            time_ms = milliseconds("change", {"gated": lambda: gated(trajectory, noise)}, 10)["gated"]
            report(step="change", threshold=threshold, reused=gated.reused.float().mean().item(), ms=time_ms)
        report(step="change", calls_inside=calls(gated._last.run))


def memory() -> None:
    trajectory, gated = Trajectory(5, 6).to(DEVICE), gated_executor()
    noise = torch.randn(trajectory.shape, device=DEVICE)
    free = []
    for i in range(TRAJECTORIES):
        if i % 1000 == 0:
            gated.reset()
        gated.load(Table(torch.rand(5, 6)))
        gated(trajectory, noise)
        if i in (100, TRAJECTORIES - 1):
            torch.cuda.synchronize()
            free.append(torch.cuda.mem_get_info()[0])
    report(step="memory", trajectories=TRAJECTORIES, grown_bytes=free[0] - free[1])


def gated_executor():
    return hk.compile(Trajectory.run, mode="gated")


def dit_trajectory(net, images: int) -> tuple:
    return models.trajectory(net, images, DEVICE, steps=20), models.noise(net, images, DEVICE)


def new_schedule(trajectory, cur: float):
    """One that reuses this share of all entries, drawn anew at each call."""
    names = trajectory.net.branch_names
    return random_schedule(names, Flops((1.0,) * len(names), 0.0), trajectory.steps, cur, seed=random.getrandbits(31))


def calls(run) -> dict[str, int]:
    """The CUDA calls of the host while `run` works, by name."""
    with torch.profiler.profile(activities=torch.profiler.supported_activities(), acc_events=True) as profile:
        run()
    torch.cuda.synchronize()
    return dict(Counter(event.name for event in profile.events() if event.name.startswith(("cuda", "cu"))))


def run(step: str) -> None:
    faulthandler.enable()
    random.seed(0)  # of the schedules
    torch.manual_seed(0)
    if sys.stdin.readline():  # the imports are done, and it is this step's turn
        faulthandler.dump_traceback_later(LIMITS[step] - 1)  # says where it hangs
        globals()[step]()


def begin(step: str) -> subprocess.Popen:
    """A process that imports, and then waits for its turn. No fork of this one, in which an import may have used CUDA.
    """
    program = f"from bench.gpu import gated; gated.run({step!r})"
    return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, text=True)


def main() -> None:
    steps = sys.argv[1:] or list(LIMITS)
    if unknown := set(steps) - set(LIMITS):
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; the steps are {', '.join(LIMITS)}")
    processes = {step: begin(step) for step in steps}  # so that imports take place side by side
    failed = False
    try:
        for step, process in processes.items():
            started, hangs = time.perf_counter(), ""
            try:
                process.communicate("go\n", timeout=LIMITS[step])
            except subprocess.TimeoutExpired:
                hangs = f"no end within {LIMITS[step]} s"
                process.kill()
                process.wait(5)
            report(step=step, ended=hangs or process.returncode, seconds=round(time.perf_counter() - started, 1))
            failed = failed or process.returncode != 0
    finally:  # interrupted as well: a step that waits for the GPU would outlive this process, beside later parts
        for process in processes.values():
            process.kill()
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
