"""What an executor does on the host before and after a step's graph is replayed.

    python -m bench.host_work    writes bench/results/host-work-cpu.json

A DiT of DiT-XL/2's depth (292 parameters, 56 branches, a cache), narrow, on the CPU, where the graph is a stand-in that
does nothing; so the copies of the step's inputs and outputs count, and launching does not. It is the least of many, so
other work on the machine hardly touches it.
"""

import json
import time
from types import SimpleNamespace

import torch

import harmonica_kernels as hk
from bench import RESULTS
from bench.record import machine, moment
from harmonica_dit.files import replacement
from harmonica_dit.models import DiT
from harmonica_dit.sample import Trajectory
from harmonica_dit.sample.trajectory import run_eagerly
from harmonica_kernels.graphs import captured


class Recorder:
    """Records a graph that does nothing."""

    def __init__(self, device: torch.device):
        self.device = device

    def random_state(self) -> torch.Tensor:
        return torch.zeros(1)

    def record(self, call, alone: bool):
        return SimpleNamespace(replay=lambda: None), call()


@torch.no_grad()
def main() -> None:
    captured.RECORDERS["cpu"] = Recorder
    net = DiT(input_size=4, hidden_size=32, depth=28, num_heads=2).eval().requires_grad_(False)
    trajectory, row = Trajectory(net, torch.tensor([0]), steps=20), (True, False) * 28
    executor, cache = hk.compile(run_eagerly), hk.FeatureCache()
    inputs = trajectory.model, *trajectory.inputs(torch.randn(1, *net.sample_shape), 1)
    executor(*inputs, row=None, cache=cache)
    seconds = []
    for _ in range(3000):
        start = time.perf_counter()
        executor(*inputs, row=row, cache=cache)
        seconds.append(time.perf_counter() - start)
    found = dict(microseconds=1e6 * min(seconds), replays=len(seconds), parameters=len(list(net.parameters())))
    with replacement(RESULTS / "host-work-cpu.json") as path:
        path.write_text(json.dumps(moment() | machine() | found, indent=1) + "\n")
    print(f"{found['microseconds']:.0f} µs a replay")


if __name__ == "__main__":
    main()
