"""What a forward costs in floating-point operations, branch by branch, counted by torch."""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .costs import Costs


@dataclass(frozen=True)
class Flops(Costs):
    """Floating-point operations of a forward of batch 1: each of the K branches', and `fixed`, which no schedule skips.

    A multiplication and the addition of its product are two, as torch counts; the DiT paper and fvcore count them as
    one, so that their numbers are half of these.
    """

    @property
    def uncached(self) -> float:
        """Of a forward without a cache: all."""
        return self.total

    def beside(self, schedule) -> float:
        """Of a schedule's forecasts of the trunk. Those of branches are left out, as norms are."""
        return schedule.forecaster.flops(schedule.compute[:, 0].tolist()) if schedule.unit == "trunk" else 0.0


def count_flops(net) -> Flops:
    """FLOPs of a forward of batch 1: matrix products and convolutions. A branch's are those in its body.

    net: a denoiser, whose forward is counted; or a traced adapter, or a denoiser that runs by one, whose `trace` has
        counted.

    Raises:
        TypeError: net is neither. ValueError: the adapter has not been traced.
    """
    if not is_denoiser(net) or runs_by_its_loop(net):
        return _traced(net, "flops")
    parameter = next(net.parameters())
    x = torch.zeros(1, *net.sample_shape, dtype=parameter.dtype, device=parameter.device)
    zero = torch.zeros(1, dtype=torch.long, device=parameter.device)
    return count_call(net, lambda: net(x, zero, zero))


def trunk_costs(net) -> tuple[Flops, int]:
    """FLOPs of a forward whose trunk is computed or forecast as a whole, and the values of the trunk's state, N·D.

    net: a denoiser, or a traced adapter, for which both are of the traced forward.

    Raises:
        TypeError: net is neither. ValueError: the adapter has not been traced, or its trunk cannot be reused.
    """
    if is_denoiser(net) and not runs_by_its_loop(net):
        return count_flops(net), net.tokens * net.width
    flops = _traced(net, "flops")
    if getattr(net, "trunk_size", None) is None:
        raise ValueError(f"adapter: the trunk of this model cannot be reused: {net.trunk_left_out}")
    return net.trunk_flops or flops, net.trunk_size


def is_denoiser(net) -> bool:
    """Whether this is called with latents, timesteps and labels alone. An adapter takes its transformer's arguments."""
    return hasattr(net, "sample_shape")


def runs_by_its_loop(net) -> bool:
    """Whether a denoiser is run step by step by its pipeline's own loop: it has an adapter in place of branches."""
    return getattr(net, "guided_by_its_loop", False)


def _traced(adapter, name: str):
    if not hasattr(adapter, "branch_names"):
        inside = "pipe.transformer" if hasattr(adapter, "transformer") else "transformer"
        raise TypeError(f"net: got {type(adapter).__name__}, expected a denoiser or an adapter: adapt({inside}), after "
                        "its trace(...)")
    found = getattr(adapter, name, None)
    if found is None:
        raise ValueError("adapter: has not been traced; call adapter.trace(...) with the arguments of one forward "
                         "first")
    return found


def count_call(net, call: Callable[[], object]) -> Flops:
    """Counts a call that runs a forward of `net`, a denoiser or a fused adapter."""
    counts = [0.0] * len(net.branches)
    counter = flop_counter()

    def count_body(k, body, h, context):
        before = counter.get_total_flops()
        o = body(h, context)
        counts[k] = float(counter.get_total_flops() - before)
        return o

    with torch.no_grad(), counter, replace_bodies(net, lambda k, body: partial(count_body, k, body)):
        call()
    return Flops(tuple(counts), float(counter.get_total_flops()) - sum(counts))


def flop_counter() -> FlopCounterMode:
    """torch's counter, of this thread's operations.

    By itself it leaves out the attention kernel of the CPU, products of integers and the fused kernels that torch.nn's
    attention and encoder layer take in inference, and puts hooks on the modules of all threads, to tell what each
    costs.
    """
    counter = FlopCounterMode(display=False, custom_mapping={
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention,
        torch.ops.aten._int_mm: _count_product,
        torch.ops.aten._native_multi_head_attention: _count_multi_head_attention,
        torch.ops.aten._transformer_encoder_layer_fwd: _count_encoder_layer})
    counter.mod_tracker = _NoModules()
    return counter


class _NoModules(nullcontext):
    parents = ("Global",)


def _count_attention(query, key, value, *_, out_shape=None, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _count_multi_head_attention(query, key, value, D, *_, out_shape=None, **__) -> int:
    """Self-attention with its four projections of width D: the kernel takes no other."""
    B, N, _ = query
    return 8 * B * N * D * D + 4 * B * N * N * D


def _count_encoder_layer(x, D, heads, *rest, out_shape=None, **__) -> int:
    ffn = rest[11]  # the first layer's weight [hidden, D]; the second's has as many values
    return _count_multi_head_attention(x, x, x, D) + 4 * x[0] * x[1] * ffn[0] * ffn[1]


def _count_product(a, b, *_, out_shape=None, **__) -> int:
    (m, k), (_, n) = a, b
    return 2 * m * k * n


@contextmanager
def replace_bodies(net, new: Callable[[int, Callable], Callable]):
    """Replaces body k of the denoiser by new(k, body) until the block ends."""
    branches, own = list(net.branches), net.branches
    changed = [replace(b, body=new(k, b.body), body_out=None) for k, b in enumerate(branches)]
    if isinstance(own, tuple):
        net.branches = tuple(changed)
    else:
        own[:] = changed  # in place: an adapter and its denoiser share their list
    try:
        yield
    finally:
        if isinstance(own, tuple):
            net.branches = own
        else:
            own[:] = branches
