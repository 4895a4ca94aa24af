"""Device-gated trajectories on a GPU, from the smallest case up: `python bench/gpu_gated.py [STEP ...]`.

Every step is a process of its own with a time limit, and prints lines of JSON before the next one begins, so that a run
that fails half-way says where. Not yet run.

    smallest   WHILE -> IF nodes -> child graphs with one kernel, without Python or torch; what idle nodes cost; the
               same under compute-sanitizer
    bodies     random small models against the plan walked on the CPU
    cublas     60 bodies of one bfloat16 GEMM each
    dit        DiT-XL/2 256 (random weights, bfloat16, T=20), 2 and 16 rows: gated and captured on the same schedule,
               launches and synchronisations inside a trajectory, a changed router against a new capture
    change     the same model, decided by the change of the first branch's output
    memory     10,000 trajectories with router changes: memory held by the device at the end and at the beginning
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch

import harmonica_kernels as hk

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "gated"))
LIMITS = dict(smallest=120, bodies=120, cublas=120, dit=300, change=180, memory=180)  # seconds


def report(**facts) -> None:
    print(json.dumps(facts), flush=True)


def milliseconds(call, repeats: int = 20) -> float:
    """Median time on the device; the first three calls, which warm up and capture, are not counted."""
    times = []
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[3:])


def smallest() -> None:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "smallest"
        sources = [ROOT / path for path in ("tests/cuda/smallest.cu", "csrc/cuda/gate.cu", "csrc/cuda/graph.cpp")]
        subprocess.run(["nvcc", "-std=c++17", "-O2", "-arch=native", *sources, "-o", program], check=True)
        subprocess.run([program], check=True)
        for tool in ("memcheck", "racecheck"):
            result = subprocess.run(["compute-sanitizer", "--tool", tool, "--error-exitcode", "2", program],
                                    capture_output=True, text=True)
            report(step="smallest", sanitizer=tool, code=result.returncode, said=result.stdout.splitlines()[-1:])


def bodies() -> None:
    from loops import Table, Trajectory

    worst = 0.0
    for _ in range(20):
        T, K = random.randint(1, 6), random.randint(1, 9)
        trajectory = Trajectory(T, K)
        there, gated, walked = trajectory.to(torch.device("cuda:0")), gated_executor(), gated_executor()
        for forecast in (False, True):
            table = Table(torch.rand(T, K), torch.randn(T, K) * 0.3 if forecast else None)
            noise = torch.randn(trajectory.shape)
            for executor in (gated, walked):
                executor.load(table)
                executor.threshold = 0.5
            difference = gated(there, noise.cuda()).cpu() - walked(trajectory, noise)
            worst = max(worst, difference.abs().max().item())
            assert torch.equal(gated.reused, walked.reused)
    report(step="bodies", worst_difference=worst)


def cublas() -> None:
    from loops import Table, Trajectory

    T, K = 20, 60
    trajectory = Trajectory(T, K, n=2, tokens=256, width=1152, dtype=torch.bfloat16, plain=True)
    there, gated = trajectory.to(torch.device("cuda:0")), gated_executor()
    noise = torch.randn(trajectory.shape, device="cuda")
    for share in (1.0, 0.5, 0.0):
        gated.load(Table((torch.rand(T, K) < share).float()))
        time_ms = milliseconds(lambda: gated(there, noise))
        report(step="cublas", computed=1 - gated.reused.float().mean().item(), ms=time_ms)


def dit() -> None:
    from harmonica_dit.sample import denoise

    for images in (1, 8):
        trajectory, noise, schedule = dit_trajectory(images)
        captured, gated = hk.compile(denoise), hk.compile(denoise, mode="gated")
        with torch.no_grad():
            times = {name: milliseconds(partial(executor, trajectory, noise, schedule))
                     for name, executor in (("captured", captured), ("gated", gated))}
            difference = (captured(trajectory, noise, schedule) - gated(trajectory, noise, schedule)).abs().max().item()
            report(step="dit", rows=2 * images, cur=schedule.cur, **times, difference=difference,
                   largest=captured(trajectory, noise, schedule).abs().max().item(),
                   gated_by_captured=times["gated"] / times["captured"])
            report(step="dit", rows=2 * images, calls_inside=calls(gated._last.run))
            switch(gated, denoise, trajectory, noise)
        captured.reset()
        gated.reset()


def switch(gated, denoise, trajectory, noise) -> None:
    """Time from a changed router to the end of the first image, with and without a new capture."""
    def first_image(executor, schedule) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        executor(trajectory, noise, schedule)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    image = statistics.median(first_image(gated, None) for _ in range(5))
    written = statistics.median(first_image(gated, random_schedule(trajectory, 0.4)) for _ in range(5))
    new = hk.compile(denoise, mode="gated")
    capture = first_image(new, random_schedule(trajectory, 0.4))
    new.reset()
    report(step="dit", rows=2 * len(noise), image_s=image, changed_router_s=written, new_capture_s=capture,
           change_alone_s=written - image, capture_alone_s=capture - image)


def change() -> None:
    from harmonica_dit.sample import denoise

    trajectory, noise, _ = dit_trajectory(1)
    gated = hk.compile(denoise, mode="gated", rule="change")
    with torch.no_grad():
        for threshold in (0.0, 0.05, 0.1, 0.2, 1e9):
            gated.threshold = threshold
            time_ms = milliseconds(lambda: gated(trajectory, noise), 10)
            report(step="change", threshold=threshold, reused=gated.reused.float().mean().item(), ms=time_ms)
        report(step="change", calls_inside=calls(gated._last.run))


def memory() -> None:
    from loops import Table, Trajectory

    trajectory, gated = Trajectory(5, 6).to(torch.device("cuda:0")), gated_executor()
    noise = torch.randn(trajectory.shape, device="cuda")
    free = []
    for i in range(10_000):
        gated.load(Table(torch.rand(5, 6)))
        gated(trajectory, noise)
        if i in (100, 9_999):
            torch.cuda.synchronize()
            free.append(torch.cuda.mem_get_info()[0])
    report(step="memory", trajectories=10_000, grown_bytes=free[0] - free[1])


def gated_executor():
    from loops import Trajectory

    return hk.compile(Trajectory.run, mode="gated")


def dit_trajectory(images: int):
    from harmonica_dit.models import DiT
    from harmonica_dit.sample import Trajectory

    torch.manual_seed(0)
    net = DiT().to("cuda", torch.bfloat16).eval().requires_grad_(False)
    trajectory = Trajectory(net, torch.arange(images, device="cuda"), steps=20)
    return trajectory, torch.randn(images, *net.sample_shape, device="cuda"), random_schedule(trajectory, 0.375)


def random_schedule(trajectory, cur: float):
    """A schedule that reuses this share of all entries, drawn at random."""
    from harmonica_dit.models.flops import Flops
    from harmonica_dit.schedule import Schedule

    names = trajectory.net.branch_names
    T, K = trajectory.steps, len(names)
    entries = torch.randperm((T - 1) * K)[: round(cur * T * K)]
    compute = torch.ones(T * K, dtype=torch.bool)
    compute[K + entries] = False
    return Schedule(compute.view(T, K), names, Flops((1.0,) * K, 0.0))


def calls(run) -> dict[str, int]:
    """The CUDA calls of the host while `run` works, by name."""
    both = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=both) as profile:
        run()
    torch.cuda.synchronize()
    return dict(Counter(event.name for event in profile.events() if event.name.startswith(("cuda", "cu"))))


def main() -> None:
    if sys.argv[1:2] == ["--here"]:
        globals()[sys.argv[2]]()
        return
    unknown = set(sys.argv[1:]) - set(LIMITS)
    if unknown:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; the steps are {', '.join(LIMITS)}")
    failed = False
    for step in sys.argv[1:] or LIMITS:
        begin = time.perf_counter()
        try:
            code = subprocess.run([sys.executable, __file__, "--here", step], timeout=LIMITS[step]).returncode
        except subprocess.TimeoutExpired:
            code = f"no end within {LIMITS[step]} s"
        report(step=step, ended=code, seconds=round(time.perf_counter() - begin, 1))
        failed = failed or code != 0
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
