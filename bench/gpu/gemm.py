"""Which of cuBLASLt's kernels: every candidate of its heuristic for DiT-XL/2's products, beside the first one.

PyTorch takes that first one, within the workspace that it allows cuBLASLt, unmeasured. Here each candidate is asked for
as PyTorch asks, then again with 32 MiB where it allows less, and timed in a CUDA graph over buffers that rotate as the
kernels' do. The best of so many medians is also the luckiest: the first and the best three are timed again, as a step
runs them, with weights from memory and activations that may lie in the L2 cache. What a step could gain is the sum over
its blocks of the first one's time less the best one's, by these.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.timing import capture, relative_error, side_stream

from .cublaslt import Candidate, CuBlasLt, loaded, workspace_of_pytorch
from .kernels import FULL, LAUNCHES, ROTATE, sets_of
from .models import XL
from .record import Record

ROWS, D, DEPTH = (512, 4096), XL["hidden_size"], XL["depth"]  # 2 and 16 of 256 tokens
PRODUCTS = {"qkv": (D, 3 * D), "proj": (D, D), "fc1": (D, FULL["hidden"]), "fc2": (FULL["hidden"], D)}
GELU = "fc1"
MOST, AGAIN, LARGER, ROUNDS, TOLERANCE = 32, 3, 32 << 20, 9, 1e-2
Run = Callable[[Tensor, Tensor, Tensor], object]


def run(record: Record) -> None:
    torch.manual_seed(0)
    allowed = 0 if record.tiny else workspace_of_pytorch()
    workspace = None if record.tiny else torch.empty(max(allowed, LARGER), dtype=torch.uint8, device=record.device)
    record.note("bytes that PyTorch allows", allowed)
    for rows in ROWS:
        gains = []
        for name, (inner, outer) in PRODUCTS.items():
            sizes = (2, 8, 16) if record.tiny else (rows, inner, outer)
            where = f"{name}, {rows} rows"
            with record.attempt(where), side_stream(record.device), torch.inference_mode():
                gains.append(measure(record, where, Buffers(record, *sizes), name == GELU, workspace, allowed))
        if len(gains) == len(PRODUCTS):
            record.row(rows=rows, **{"a step could gain, µs": 1e6 * DEPTH * sum(gains)})


class Buffers:
    """Sets of h, weight and out for one product, with one bias."""

    def __init__(self, record: Record, rows: int, inner: int, outer: int):
        def new(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, device=record.device)).bfloat16()

        count = sets_of(2 * (rows * (inner + outer) + inner * outer), 1 if record.tiny else ROTATE)
        self.bias, self.launches = new(outer), max(count, 2 if record.tiny else LAUNCHES)
        self.sets = [(new(rows, inner), new(outer, inner, scale=inner**-0.5), new(rows, outer)) for _ in range(count)]

    def all(self, run: Run, weights_alone: bool = False) -> Callable[[], None]:
        """All launches, each with the next set; or with the next weight, and h and out of the first set."""
        def launch() -> None:
            for i in range(self.launches):
                h, weight, out = self.sets[i % len(self.sets)]
                run(self.sets[0][0] if weights_alone else h, weight, self.sets[0][2] if weights_alone else out)
        return launch

    def result(self, run: Run) -> Tensor:
        h, weight, out = self.sets[0]
        run(h, weight, out.fill_(float("nan")))
        return out.clone()


def measure(record: Record, where: str, buffers: Buffers, gelu: bool, workspace: Tensor | None,
            allowed: int) -> float:
    """Seconds by which the best candidate is faster than the first; 0 where that is the best."""
    def pytorch(h: Tensor, weight: Tensor, out: Tensor) -> None:
        if gelu:
            torch._addmm_activation(buffers.bias, h, weight.t(), use_gelu=True, out=out)
        else:
            torch.addmm(buffers.bias, h, weight.t(), out=out)

    found = candidates(buffers, gelu, workspace, allowed, pytorch)
    expected = buffers.result(found[0].run)
    record.check(f"{where}: PyTorch's beside the first", relative_error(buffers.result(pytorch), expected), TOLERANCE)
    graphs = {"PyTorch": capture(buffers.all(pytorch), record.device)}
    for number, candidate in enumerate(found):
        with record.attempt(f"{where}, candidate {number}"):
            error = relative_error(buffers.result(candidate.run), expected)
            if record.check(f"{where}: candidate {number} beside the first", error, TOLERANCE):
                graphs[str(number)] = capture(buffers.all(candidate.run), record.device)
    record.note(f"{where}, candidates", [candidate.facts for candidate in found])
    cold = record.time(where, graphs, ROUNDS, launches=buffers.launches)
    least = sorted(cold.keys() - {"PyTorch", "0"}, key=cold.get)[:AGAIN]
    graphs = {name: capture(buffers.all(pytorch if name == "PyTorch" else found[int(name)].run, True), record.device)
              for name in ("PyTorch", "0", *least)}
    seconds = record.time(f"{where}, again", graphs, ROUNDS, launches=buffers.launches)
    numbers = seconds.keys() - {"PyTorch"}
    best = min(numbers, key=seconds.get)
    within = min(seconds[name] for name in numbers if found[int(name)].facts["workspace"] <= allowed)
    record.row(product=where, candidates=len(found), best=int(best), **found[int(best)].facts, **{
        "PyTorch, µs": seconds["PyTorch"] * 1e6, "first, µs": seconds["0"] * 1e6, "best, µs": seconds[best] * 1e6,
        "best within PyTorch's workspace, µs": within * 1e6, "first / best": seconds["0"] / seconds[best],
        "first / best, cold": cold["0"] / min(cold[name] for name in cold.keys() - {"PyTorch"})})
    return seconds["0"] - seconds[best]


def candidates(buffers: Buffers, gelu: bool, workspace: Tensor | None, allowed: int, pytorch: Run) -> list[Candidate]:
    """The one that PyTorch takes first. In a dry run PyTorch's product, twice."""
    if workspace is None:
        return [Candidate(dict(ID=number, workspace=0), pytorch) for number in range(2)]
    lt = CuBlasLt(loaded(), torch.cuda.current_blas_handle(), lambda: torch.cuda.current_stream().cuda_stream)
    h, weight, out = buffers.sets[0]
    found: dict[tuple, Candidate] = {}
    for bytes, most in ((allowed, 1), (allowed, MOST), (workspace.numel(), MOST)):
        for one in lt.candidates(h, weight, buffers.bias, out, gelu, workspace, bytes, most):
            found.setdefault(tuple(one.facts.items()), one)
    return list(found.values())
