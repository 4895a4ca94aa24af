"""The kernels beside their floors, a copy's bandwidth and PyTorch's own ops.

Bytes are those that have to move: each argument read once, each result written once. The copy moves as many between
buffers of its own, half read and half written; it is the faster of copy_ and an elementwise kernel, and timed alike: a
CUDA graph of launches one after the other, over buffers that rotate through at least 256 MB, so that nothing is still
in the L2 from its last use. The results of all launches of a graph are kept, so that no two of them write to the same
memory. PyTorch's chain is recorded likewise.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import capture, relative_error, side_stream
from harmonica_kernels import ops
from harmonica_kernels.ops import Term, reference

from .record import Record

ROTATE = 256 << 20
LAUNCHES = 64  # of a graph, at least: so many that the graph's own 10 µs are little beside them
ROUNDS = 25
BF16 = torch.bfloat16
FULL = dict(inference=(16, 256, 1152), parts=(2, 4, 8), training=(64, 256, 1152), hidden=4608, images=(8, 4096),
            rotate=ROTATE)
TINY = dict(inference=(2, 4, 24), parts=(1,), training=(2, 4, 24), hidden=96, images=(1, 2), rotate=1)
TOLERANCE = 1e-2  # bfloat16 rounds by up to 2^-9 at each of a few places


@dataclass
class Case:
    """One op at one size, with several sets of buffers; `ours` and `eager` are given a set's number."""

    bytes: int  # 0: no floor to speak of
    sets: int
    ours: Callable[[int], object]
    eager: Callable[[int], object]
    check: Callable[[], Sequence[tuple[str, Tensor, Tensor]]]  # (what, ours, exact)


def run(record: Record) -> None:
    sizes = TINY if record.tiny else FULL
    torch.manual_seed(0)
    rotate, (B, N, _) = sizes["rotate"], sizes["inference"]
    cases = {f"residual_norm R={R}": lambda R=R: norm_case(record.device, sizes["inference"], R, rotate)
             for R in (0, 1, 2, 8)}
    cases |= {f"residual_norm R={R}, {part * N} rows": lambda R=R, part=part: norm_case(
        record.device, (part, *sizes["inference"][1:]), R, rotate) for part in sizes["parts"] for R in (0, 1)}
    cases |= {f"residual_norm R={R}, {B * N} rows alone": lambda R=R: norm_case(record.device, sizes["inference"], R, 0)
              for R in (0, 1, 2, 8)}
    cases |= {
        "blend_residual_norm forward": lambda: blend_case(record.device, sizes["training"], rotate),
        "blend_residual_norm backward": lambda: backward_case(record.device, sizes["training"], rotate),
        "cache_commit, committed": lambda: commit_case(record.device, sizes["training"], rotate, 0.9),
        "cache_commit, kept": lambda: commit_case(record.device, sizes["training"], rotate, 0.05),
        "bias_gelu": lambda: gelu_case(record.device, (B, N, sizes["hidden"]), rotate),
    } | {f"guided_step, {images} images": lambda images=images: step_case(record.device, images, rotate)
         for images in sizes["images"]}
    for name, make in cases.items():
        with record.attempt(name), side_stream(record.device):
            measure(record, name, make())
        if not record.tiny:
            torch.cuda.empty_cache()
    for R in () if record.tiny else (1, 2, 3, 4, 8):  # a CPU has no warps
        with record.attempt(f"residual_norm R={R}, warps"), side_stream(record.device), torch.no_grad():
            compare_warps(record, R, norm_case(record.device, sizes["inference"], R, rotate))


def compare_warps(record: Record, R: int, case: Case) -> None:
    """The norm's rows in so many warps, beside what `residual_norm` chooses."""
    launcher = sys.modules["harmonica_kernels.triton_kernels.residual_norm"]
    launches, chosen, candidates = max(case.sets, LAUNCHES), launcher.warps, {}

    def ours() -> None:
        for i in range(launches):
            case.ours(i % case.sets)

    try:
        for n in (1, 2, 4, 8):
            launcher.warps = lambda bytes, n=n: n
            candidates[f"{n} warps"] = capture(ours, record.device)
    finally:
        launcher.warps = chosen
    candidates["chosen"] = capture(ours, record.device)
    seconds = record.time(f"residual_norm R={R}, warps", candidates, 9, launches=launches)
    record.row(case=f"residual_norm R={R}", **{f"{name}, µs": value * 1e6 for name, value in seconds.items()})


def measure(record: Record, name: str, case: Case) -> None:
    with torch.no_grad():
        for what, ours, exact in case.check():
            record.check(f"{name}: {what}", relative_error(ours, exact), TOLERANCE)
    launches = max(case.sets, 2 if record.tiny else LAUNCHES)

    def each(f: Callable[[int], object]) -> Callable[[], object]:
        return capture(lambda: [f(i % case.sets) for i in range(launches)], record.device)

    candidates = {"ours": each(case.ours), "eager": each(case.eager)}
    if case.bytes:
        half = torch.randn(case.bytes // 4, device=record.device).to(BF16)
        sources = [half.clone() for _ in range(case.sets)]
        targets = [half.clone() for _ in range(case.sets)]
        candidates["copy"] = each(lambda i: targets[i].copy_(sources[i]))
        candidates["elementwise"] = each(lambda i: torch.neg(sources[i], out=targets[i]))
    seconds = record.time(name, candidates, ROUNDS, launches=launches)
    row = {"ours, µs": seconds["ours"] * 1e6, "eager / ours": seconds["eager"] / seconds["ours"]}
    if case.bytes:
        copied = min(seconds["copy"], seconds["elementwise"])
        row |= {"ours, GB/s": case.bytes / seconds["ours"] / 1e9, "copy, GB/s": case.bytes / copied / 1e9,
                "ours / copy": copied / seconds["ours"]}
    record.row(case=name, MB=case.bytes / 1e6, sets=case.sets, **row)
    if "residual_norm R" in name and "rows" not in name:
        record.ratio(f"{name}: its bandwidth / a copy's", row["ours / copy"], 0.92)


def sets_of(size: int, rotate: int) -> int:
    """As many sets of so many bytes as fill `rotate` bytes; 1 where nothing is to rotate."""
    return max(2, -(-rotate // size)) if rotate else 1


class Activations:
    """Random tensors of one device."""

    def __init__(self, device: torch.device, shape: tuple[int, ...]):
        self.device, self.shape = device, shape

    def new(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
        return (torch.randn(shape or self.shape, device=self.device) * scale).to(dtype)

    def poison(self) -> Tensor:
        return self.new().fill_(float("nan"))


def norm_case(device: torch.device, shape: tuple[int, int, int], R: int, rotate: int) -> Case:
    """x is added to in place, as in sampling; the outputs are small, so that it stays finite over the launches."""
    make, (B, N, D) = Activations(device, shape), shape
    bytes = 2 * B * N * D * (R + (3 if R else 2))
    sets = sets_of(2 * B * N * D * (R + 2), rotate)  # x is read and written in one place
    rows = make.new(R + 2, B, D)
    shift, scale, gates = rows[0], rows[1], rows[2:]
    x, h = [make.new() for _ in range(sets)], [make.poison() for _ in range(sets)]
    runs = [[Term(make.new(scale=1e-3), None, gate) for gate in gates] for _ in range(sets)]

    def ours(i: int) -> Tensor:
        return ops.residual_norm(x[i], runs[i], shift, scale, x_out=x[i] if R else None, h_out=h[i])

    def eager(i: int) -> Tensor:
        return reference.residual_norm(x[i], runs[i], [0.0] * R, shift, scale)[1]

    def check() -> list[tuple[str, Tensor, Tensor]]:
        exact_x, exact_h = reference.residual_norm(x[0].double(), in_float64(runs[0]), [0.0] * R, shift.double(),
                                                   scale.double())
        ours(0)
        return [("h", h[0], exact_h), ("x", x[0], exact_x)]

    return Case(bytes, sets, ours, eager, check)


def in_float64(run: Sequence[Term]) -> list[Term]:
    return [Term(term.latest.double(), None, term.gate.double()) for term in run]


class Blend:
    """The training op as SDT calls it: a run of one blended branch; gradients wanted of x, fresh and r."""

    def __init__(self, device: torch.device, shape: tuple[int, int, int], passes: int, rotate: int):
        make, (B, N, D) = Activations(device, shape), shape
        self.bytes = 2 * B * N * D * passes
        self.sets = sets_of(self.bytes, rotate)
        self.shift, self.scale, self.gate = make.new(3, B, D)
        self.r = torch.tensor(0.6, device=device, requires_grad=True)
        self.x, self.fresh, self.latest, self.dx_new, self.dh = (
            [make.new() for _ in range(self.sets)] for _ in range(5))
        for t in (*self.x, *self.fresh):
            t.requires_grad_()

    def inputs(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.x[i], self.fresh[i], self.r

    def ours(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        return ops.blend_residual_norm(self.x[i], [Term(self.latest[i], None, self.gate)], self.shift, self.scale,
                                   fresh=self.fresh[i], r=self.r)

    def eager(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        return reference.blend_residual_norm(self.x[i], [Term(self.latest[i], None, self.gate)], [0.0], self.shift,
                                             self.scale, self.fresh[i], self.r.to(BF16))

    def exact(self, i: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """float64 results, and gradients of x, fresh and r."""
        x, fresh, r = (t.detach().double().requires_grad_() for t in self.inputs(i))
        run = [Term(self.latest[i].double(), None, self.gate.double())]
        with torch.enable_grad():
            results = reference.blend_residual_norm(x, run, [0.0], self.shift.double(), self.scale.double(), fresh, r)
            gradients = torch.autograd.grad(results[:2], (x, fresh, r), (self.dx_new[i].double(), self.dh[i].double()))
        return results, gradients


def blend_case(device: torch.device, shape: tuple[int, int, int], rotate: int) -> Case:
    blend = Blend(device, shape, 6, rotate)

    def without_grad(f: Callable[[int], object]) -> Callable[[int], object]:
        return lambda i: torch.no_grad()(f)(i)

    return Case(blend.bytes, blend.sets, without_grad(blend.ours), without_grad(blend.eager),
                lambda: list(zip(("x", "h", "o"), blend.ours(0), blend.exact(0)[0])))


def backward_case(device: torch.device, shape: tuple[int, int, int], rotate: int) -> Case:
    """Both backwards through autograd, from graphs made once; recording runs them on this stream, their forward's."""
    blend = Blend(device, shape, 7, rotate)
    graphs = {}
    with torch.enable_grad():
        for name, f in (("ours", blend.ours), ("eager", blend.eager)):
            graphs[name] = [f(i)[:2] for i in range(blend.sets)]

    def backward(name: str) -> Callable[[int], tuple[Tensor, ...]]:
        return lambda i: torch.autograd.grad(graphs[name][i], blend.inputs(i), (blend.dx_new[i], blend.dh[i]),
                                             retain_graph=True)

    def check() -> list[tuple[str, Tensor, Tensor]]:
        return list(zip(("dx", "dfresh", "dr"), backward("ours")(0), blend.exact(0)[1]))

    return Case(blend.bytes, blend.sets, backward("ours"), backward("eager"), check)


def commit_case(device: torch.device, shape: tuple[int, int, int], rotate: int, score: float) -> Case:
    make, threshold = Activations(device, shape), 0.1
    bytes = 2 * 2 * make.new().numel()
    sets = sets_of(bytes, rotate)
    latest, o = [make.new() for _ in range(sets)], [make.new() for _ in range(sets)]
    r = torch.tensor(score, device=device)

    def eager(i: int) -> Tensor:
        return latest[i].copy_(torch.where(r > threshold, o[i], latest[i]))

    def check() -> list[tuple[str, Tensor, Tensor]]:
        exact = (o if score > threshold else latest)[0].clone()
        ops.cache_commit(latest[0], o[0], r, threshold)
        return [("latest", latest[0], exact)]

    def ours(i: int) -> None:
        ops.cache_commit(latest[i], o[i], r, threshold)

    return Case(bytes if score > threshold else 0, sets, ours, eager, check)


def gelu_case(device: torch.device, shape: tuple[int, int, int], rotate: int) -> Case:
    make = Activations(device, shape)
    bytes = 2 * 2 * make.new().numel()
    sets = sets_of(bytes // 2, rotate)  # in place
    x, bias = [make.new() for _ in range(sets)], make.new(shape[-1])

    def check() -> list[tuple[str, Tensor, Tensor]]:
        exact = F.gelu(x[0].double() + bias.double(), approximate="tanh")
        return [("x", ops.bias_gelu(x[0].clone(), bias, "tanh"), exact)]

    return Case(bytes, sets, lambda i: ops.bias_gelu(x[i], bias, "tanh"),
                lambda i: F.gelu(x[i] + bias, approximate="tanh"), check)


def step_case(device: torch.device, images: int, rotate: int) -> Case:
    """Latents in float32, the model's output in bfloat16, its learned variance not read; 3 channels guided."""
    make = Activations(device, (images, 4, 32, 32))
    bytes = make.new().numel() * (4 + 4 + 2 + 2)
    sets = sets_of(bytes, rotate) if bytes > 1 << 20 else 1
    guidance, channels, a, b = 1.5, 3, 1.02, -0.07
    x, out = [make.new(dtype=torch.float32) for _ in range(sets)], make.new(dtype=torch.float32)
    outputs = [make.new(2 * images, 8, 32, 32).chunk(2) for _ in range(sets)]

    def ours(i: int, into: Tensor | None = None) -> Tensor:
        return ops.guided_step(x[i], *outputs[i], guidance=guidance, channels=channels, a=a, b=b, out=into)

    def eager(i: int, dtype: torch.dtype = BF16) -> Tensor:
        conditional, unconditional = (t.to(dtype) for t in outputs[i])
        guided = unconditional.lerp(conditional, guidance)
        epsilon = torch.cat([guided[:, :channels], conditional[:, channels:4]], 1)
        return a * x[i] + b * epsilon

    return Case(bytes, sets, ours, eager,
                lambda: [("x", ours(0, out.fill_(float("nan"))), eager(0, torch.float64))])
