"""The fused ops between two branches, beside the chain of PyTorch ops that each replaces."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu

from bench.bench_residual_norm import AT_ONCE, BF16, F32, ROTATE, Shape, chain, in_turn
from bench.bench_residual_norm import Case as Buffers
from harmonica_kernels.ops import Term, bias_gelu, blend_residual_norm

from . import COMPILED, OURS, PLAIN, Candidate, Case

NEAR = {F32: 1e-5, BF16: 1e-2}
WAYS = (PLAIN, COMPILED, OURS)
BIG, SMALL = (32, 256, 1152), (32, 49, 128)
HIDDEN = (2, 256, 4608)  # of DiT-XL/2's feed-forward, two rows


def compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False)


def forward(shape: Shape, tiny: bool) -> Mapping[str, Candidate]:
    """Ours comes last, for it changes x in its place."""
    rotate = 1 if tiny else ROTATE
    buffers = Buffers(shape._replace(B=1) if tiny else shape, rotate)
    times = buffers.repeats(min(rotate, AT_ONCE))
    calls = {PLAIN: buffers.eager, COMPILED: partial(buffers.eager, chain=compiled(chain)), OURS: buffers.ours}
    return {name: Candidate(no_grad(in_turn(call, len(buffers.x), times)), NEAR[shape.dtype], times=times,
                            rival=name == COMPILED)
            for name, call in calls.items()}


def no_grad(call: Callable) -> Callable:
    return torch.no_grad()(call)


def soft_chain(x, fresh, latest, gate, shift, scale, r):
    return chain(x, [r * fresh + (1 - r) * latest], [gate], shift, scale)


def soft_ours(x, fresh, latest, gate, shift, scale, r):
    return blend_residual_norm(x, [Term(latest, None, gate)], shift, scale, fresh=fresh, r=r)[:2]


def forward_backward(shape: Shape, tiny: bool) -> Mapping[str, Candidate]:
    """A soft row's op: a branch's output blended with the cached one, and all gradients."""
    b, n, d, _, dtype = shape._replace(B=1) if tiny else shape
    generator = torch.Generator().manual_seed(0)
    x, fresh, latest, *grads = (torch.randn(b, n, d, generator=generator).to(dtype) for _ in range(5))
    gate, shift, scale = torch.randn(3, b, d, generator=generator).to(dtype)
    inputs = [x, fresh, latest, gate, shift, scale, torch.tensor(0.3)]
    learned = [t.requires_grad_() for k, t in enumerate(inputs) if k != 2]
    times = 1 if tiny else max(1, AT_ONCE // (10 * x.nbytes))  # ten such tensors are read or written

    def run(function: Callable, _: int) -> tuple[Tensor, ...]:
        outputs = function(*inputs)
        return *(t.detach() for t in outputs), *torch.autograd.grad(outputs, learned, grads)

    calls = {PLAIN: soft_chain, COMPILED: compiled(soft_chain), OURS: soft_ours}
    return {name: Candidate(in_turn(partial(run, call), 1, times), 1e-3 if dtype == F32 else 3e-2, times=times,
                            rival=name == COMPILED)
            for name, call in calls.items()}


def gelu_chain(x, bias):
    return gelu(x + bias, approximate="tanh")


def feed_forward(shape: Shape, tiny: bool) -> Mapping[str, Candidate]:
    """The bias and GELU between two linears; D is the hidden width. Ours comes last, for it changes x in its place."""
    b, n, d, _, dtype = shape._replace(B=1) if tiny else shape
    sets = 1 if tiny else max(2, ROTATE // (2 * b * n * d * dtype.itemsize))
    x, bias = [torch.randn(b, n, d, dtype=dtype) for _ in range(sets)], torch.randn(d, dtype=dtype)
    calls = {PLAIN: gelu_chain, COMPILED: compiled(gelu_chain), OURS: partial(bias_gelu, approximate="tanh")}
    return {name: Candidate(no_grad(in_turn(lambda i, call=call: call(x[i], bias), sets)), NEAR[dtype],
                            rival=name == COMPILED) for name, call in calls.items()}


def case(make: Callable, what: str, dims: tuple[int, int, int], run: int, dtype: torch.dtype, rounds: int,
         full: bool = False) -> Case:
    shape = Shape(*dims, run, dtype)
    return Case(f"{what} {shape}", WAYS, partial(make, shape), rounds, full)


CASES = [
    *(case(forward, "residual_norm", dims, run, dtype, rounds, full=dims == SMALL and dtype == BF16)
      for dims, rounds in ((BIG, 9), (SMALL, 25)) for dtype in (F32, BF16) for run in (1, 4)),
    case(forward_backward, "residual_norm, soft, with gradients,", BIG, 1, F32, 7),
    case(forward_backward, "residual_norm, soft, with gradients,", SMALL, 1, F32, 25),
    case(forward_backward, "residual_norm, soft, with gradients,", BIG, 1, BF16, 7, full=True),
    *(Case(f"bias_gelu {list(HIDDEN)} {str(dtype)[6:]}", WAYS, partial(feed_forward, Shape(*HIDDEN, 0, dtype)), 25)
      for dtype in (F32, BF16)),
]
