"""Bytes that a step of DiT-XL/2 moves, way by way, beside its time on a GPU: `python -m bench.gpu.traffic`.

Counted on the CPU, from the ops of a whole trajectory, T = 20, as a GPU is given them: each reads its arguments once
and writes its results once. What is large is neither computed nor touched. The floor is the time in which a copy moves
as many bytes, on that GPU. A gated graph also writes x in the first norm of a step; its tables are not counted.
"""

import json
from collections import Counter
from math import prod

import torch
from pytest import MonkeyPatch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from bench import RESULTS
from bench.problems import Plain
from harmonica_dit.methods import trunk_forecast
from harmonica_dit.models import DiT
from harmonica_dit.sample import denoise
from support.launches import Launches, as_on_a_gpu, name_of, starts_a_kernel

from . import models

FILE = RESULTS / "nvidia-h100-80gb-hbm3.json"
LARGE = 10_000  # values: no op of so many computes
OVERWRITE = "copy_", "fill_", "zero_"  # without reading what they write to
WAYS = {"plain, in a graph": "plain PyTorch, in one graph", "ours": "captured, all computed",
        "LTC": "captured, LTC's schedule", "37.5 % CUR": "captured, 37.5 % CUR", "gated": "gated, 37.5 % CUR",
        "whole steps": "captured, trunk forecast at every second step"}


class Bytes(Launches):
    """Bytes in its block, of `weights` and of all else. weights: tensors."""

    def __init__(self, weights):
        super().__init__()
        self.storages, self.moved = {w.untyped_storage().data_ptr() for w in weights}, Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not starts_a_kernel(op):
            return op(*args, **kwargs)
        given = [(a, args[i] if i < len(args) else kwargs.get(a.name)) for i, a in enumerate(op._schema.arguments)]
        written = [one for a, one in given if a.alias_info is not None and a.alias_info.is_write and one is not None]
        if max((t.numel() for t in tensors(given)), default=0) < LARGE:
            result = op(*args, **kwargs)
        elif written:
            result = written[0] if op._schema.returns else None
        else:
            result = hollow(op(*hollow(args, "meta"), **hollow(kwargs, "meta")), "cpu")
        # what is worked on in place is read as well; ours are so where they are given no x
        in_place = written and name_of(op) not in OVERWRITE and (given[0][1] is None or given[0][1] is written[0])
        self.add([one for _, one in given if not any(one is other for other in written)])
        self.add(written[0] if in_place else None)
        self.add(written or result)
        return result

    def add(self, some) -> None:
        for t in tensors(some):
            kind = "weights" if t.untyped_storage().data_ptr() in self.storages else "activations"
            self.moved[kind] += t.element_size() * prod(n for n, stride in zip(t.shape, t.stride()) if stride)


def tensors(some) -> list[Tensor]:
    return [t for t in tree_flatten(some)[0] if isinstance(t, Tensor)]


def hollow(some, device: str):
    """The same with other tensors, in which nothing is; on the CPU no memory is touched."""
    return tree_map_only(Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device), some)


def count(net: DiT, config: dict, images: int, steps: int) -> dict[str, Counter]:
    """Bytes of a step, the mean of a trajectory's, by the keys of WAYS."""
    device, noise = torch.device("cpu"), torch.zeros(images, *net.sample_shape)
    schedules = models.schedules(net, steps) | {"whole steps": trunk_forecast(net, steps, every=2)}
    ways = {"plain, in a graph": (Plain(net, torch.bfloat16, config), None), "ours": (net, None)}
    ways |= {name: (net, schedule) for name, schedule in schedules.items()}
    found = {}
    with MonkeyPatch.context() as patch, torch.inference_mode():
        as_on_a_gpu(patch)
        for way, (model, schedule) in ways.items():
            trajectory = models.trajectory(model, images, device, steps)
            with Bytes(net.parameters()) as counted:
                denoise(trajectory, noise, schedule)
            found[way] = Counter({kind: moved / steps for kind, moved in counted.moved.items()})
    x = 2 * images * net.tokens * net.width * torch.bfloat16.itemsize
    return found | dict(gated=found["37.5 % CUR"] + Counter(activations=x))


def measured(parts: dict, rows: int, steps: int) -> dict[str, float]:
    """Seconds of a step, by the keys of WAYS."""
    [gated] = [row["gated"] for row in parts["gated"]["rows"] if row.get("rows") == rows and "gated" in row]
    samples = {way: parts["trajectory"]["samples"].get(f"{rows} rows: {way}", {}).get("median") for way in WAYS}
    return {way: seconds / steps for way, seconds in (samples | dict(gated=gated / 1e3)).items()}


def table(parts: dict, rows: int, found: dict[str, Counter], steps: int) -> list[str]:
    copied = 1e9 * max(row["copy, GB/s"] for row in parts["kernels"]["rows"]
                       if "copy, GB/s" in row and not row["case"].endswith("alone"))  # whose copies stay in the cache
    lines = [f"| {rows} rows: a step | weights, MB | all else, MB | floor, µs | measured, µs | of the floor |",
             "|---" * 6 + "|"]
    for way, seconds in measured(parts, rows, steps).items():
        weights, rest = (found[way][kind] for kind in ("weights", "activations"))
        floor = (weights + rest) / copied
        cells = *(f"{value / 1e6:.0f}" for value in (weights, rest)), f"{1e6 * floor:.0f}", f"{1e6 * seconds:.0f}"
        lines.append(f"| {WAYS[way]} | {' | '.join(cells)} | {floor / seconds:.2f} |")
    return lines


def main() -> None:
    parts, steps = json.loads(FILE.read_text())["parts"], models.steps(False)
    with torch.device("meta"):
        net = DiT(**models.XL).eval().requires_grad_(False).to(torch.bfloat16)
    net = net.to_empty(device="cpu")  # which touches no memory
    for images in (1, 8):
        print(*table(parts, 2 * images, count(net, models.XL, images, steps), steps), "", sep="\n")


if __name__ == "__main__":
    main()
