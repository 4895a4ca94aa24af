"""Where a forward's time goes on the CPU, and how far each part is from what the machine can do.

    OMP_NUM_THREADS=1 python -m bench.roofline [--only NAME …] [--rounds 20] [--out FILE.json]

The machine: the bandwidth of a copy that no cache holds, and the rate of the models' own matrix products, the best of
several. A forward: the seconds that PyTorch's profiler gives to each kind of op; what it gives to none is Python and
dispatch. Floors: the products' FLOPs by that rate, the fused passes' bytes by that bandwidth; where a model fits into
the caches its passes are faster than a copy of memory. "GELU of PyTorch" runs the same with its GELU in the place of
`ops.bias_gelu`. Medians of interleaved rounds.
"""

import argparse
import json
import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bench import RESULTS
from bench.bench_residual_norm import ROTATE, Copy
from bench.problems import random_dit
from bench.record import machine, moment
from harmonica_dit.files import replacement
from harmonica_dit.flops import count_flops
from harmonica_dit.timing import interleave, medians, steady_clock
from harmonica_kernels import ops

MODELS = {"fashion-dit, 16 rows": ("fashion-dit", 16, None), "fashion-dit, 2 rows": ("fashion-dit", 2, None),
          "DiT-S/2, 2 rows": ("DiT-S/2", 2, None), "DiT-XL/2, one block, 2 rows": ("DiT-XL/2", 2, 1)}
KINDS = {"products": "^(addmm|mm|bmm)$", "attention": "scaled_dot_product", "fused norms": "residual_norm",
         "GELU": "gelu", "copies": "^copy_$"}


def kind_of(op: str) -> str:
    """aten::addmm is a product, harmonica::bias_gelu a GELU."""
    return next((kind for kind, names in KINDS.items() if re.search(names, op.rpartition("::")[2])), "the rest")


class Forward:
    """A model's forward with one noise, by its own weights or random ones."""

    def __init__(self, name: str, rows: int, depth: int | None, dtype: torch.dtype):
        net, _ = random_dit(name, depth)
        self.net, self.flops = net.to(dtype), rows * count_flops(net).total
        draw = torch.Generator().manual_seed(0)
        self.x = torch.randn(rows, *net.sample_shape, generator=draw).to(dtype)
        self.t, self.y = torch.full((rows,), 500.0), torch.arange(rows) % net.num_classes
        values, branches = rows * net.tokens * net.width, len(net.branches)
        self.bytes = values * self.x.element_size() * (2 + 4 * (branches - 1) + 3)  # R + 3, of R = 0, 1, …; design.md

    def run(self) -> Tensor:
        return self.net(self.x, self.t, self.y)

    def seconds_by_kind(self) -> dict[str, float]:
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:  # or older torch warns
            self.run()
        seconds = dict.fromkeys((*KINDS, "the rest"), 0.0)
        for event in found.key_averages():
            seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
        return seconds


@contextmanager
def pytorchs_gelu():
    """Its own GELU in the place of the kernel, as before there was one."""
    def bias_gelu(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
        return F.gelu(x.add_(bias), approximate=approximate)

    ours = ops.bias_gelu
    ops.bias_gelu = bias_gelu
    try:
        yield
    finally:
        ops.bias_gelu = ours


def product_rate(net: nn.Module, rows: int, dtype: torch.dtype, rounds: int) -> float:
    """FLOPs a second of the fastest of the model's linear layers on its tokens."""
    layers = [m for m in net.blocks[0].modules() if isinstance(m, nn.Linear) and m.weight.shape[1] == net.width]
    rates = []
    for layer in layers:
        h = torch.randn(rows * net.tokens, net.width).to(dtype)
        seconds = median(interleave({"": lambda h=h, layer=layer: F.linear(h, layer.weight)}, rounds, warmup=2,
                                    clock=steady_clock())[""])
        rates.append(2 * h.numel() * layer.weight.shape[0] / seconds)
    return max(rates)


@torch.inference_mode()
def measure(name: str, rounds: int) -> dict:
    model, rows, depth = MODELS[name]
    forward, brain = (Forward(model, rows, depth, dtype) for dtype in (torch.float32, torch.bfloat16))

    def before() -> None:
        with pytorchs_gelu():
            forward.run()

    candidates: dict[str, Callable] = {"now": forward.run, "GELU of PyTorch": before, "bfloat16": brain.run}
    seconds = medians(interleave(candidates, rounds, warmup=2, clock=steady_clock()))
    found = [forward.seconds_by_kind() for _ in range(rounds)]
    kinds = {kind: median(one[kind] for one in found) for kind in found[0]}
    whole = sum(kinds.values())
    return dict(model=name, ms=1000 * seconds["now"], before_over_now=seconds["GELU of PyTorch"] / seconds["now"],
                bfloat16_over_now=seconds["bfloat16"] / seconds["now"],
                shares={kind: value / whole for kind, value in kinds.items()},
                products_over_floor=kinds["products"] * product_rate(forward.net, rows, torch.float32, rounds)
                / forward.flops, norms_gb_s=forward.bytes / kinds["fused norms"] / 1e9)


@torch.inference_mode()
def copy_gb_s(rounds: int) -> float:
    copy = Copy(rows=32, rotate=ROTATE)
    turn = iter(range(1 << 30))
    seconds = median(interleave({"": lambda: copy.run(next(turn) % len(copy.x))}, rounds, clock=steady_clock())[""])
    return copy.bytes / seconds / 1e9


def markdown(rows: list[dict]) -> str:
    kinds = list(rows[0]["shares"])
    lines = [f"| model | ms | {' | '.join(kinds)} | products / floor | fused norms, GB/s | with PyTorch's GELU "
             "| in bfloat16 |", "|---" * (len(kinds) + 6) + "|"]
    for row in rows:
        shares = " | ".join(f"{share:.1%}" for share in row["shares"].values())
        lines.append(f"| {row['model']} | {row['ms']:.1f} | {shares} | {row['products_over_floor']:.2f} "
                     f"| {row['norms_gb_s']:.1f} | {row['before_over_now']:.3f} | {row['bfloat16_over_now']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", nargs="*", choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS / "roofline-cpu.json")
    args = parser.parse_args()
    copied = copy_gb_s(args.rounds)
    rows = [measure(name, args.rounds) for name in args.only or MODELS]
    with replacement(args.out) as made:
        made.write_text(json.dumps(machine() | moment() | dict(copy_gb_s=copied, rows=rows), indent=1) + "\n")
    print(f"a copy: {copied:.1f} GB/s, read and written, {torch.get_num_threads()} threads\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
