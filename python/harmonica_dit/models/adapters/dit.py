"""diffusers' `DiTTransformer2DModel` (DiT, Peebles & Xie, ICCV 2023) through `cached_forward`: two branches a block."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import harmonica_kernels as hk

from .fused import (
    AttentionBody,
    Context,
    FeedForwardBody,
    FusedAdapter,
    attention_options,
    finish,
    unpatchify,
    writable,
)


class DiTAdapter(FusedAdapter):
    def __call__(self, hidden_states: Tensor, timestep: Tensor | None = None, class_labels: Tensor | None = None,
                 cross_attention_kwargs: dict[str, Any] | None = None, return_dict: bool = True, *,
                 gate: Sequence[bool] | Tensor | None = None, extrapolate: Sequence[float] | Tensor | None = None,
                 cache: hk.FeatureCache | None = None, threshold: float = 0.1):
        """As `DiTTransformer2DModel.forward`; gate, extrapolate, cache, threshold as in `cached_forward`."""
        model = self.transformer
        height, width = (side // model.patch_size for side in hidden_states.shape[-2:])
        x = model.pos_embed(hidden_states)
        mod = self._modulation(timestep, class_labels, x.dtype, gate)
        x = hk.cached_forward(self.branches, x, mod, gate=gate, extrapolate=extrapolate, cache=cache,
                              threshold=threshold, context=Context(options=attention_options(cross_attention_kwargs)),
                              eps=model.norm_out.eps)
        return finish(unpatchify(model.proj_out_2(x), height, width, model.patch_size), return_dict)

    def _branches(self, block: nn.Module):
        attention, feed_forward = AttentionBody(block.attn1), FeedForwardBody(block.ff)
        return (("attn1", hk.Branch(attention, attention.write, eps=block.norm1.norm.eps)),
                ("ff", hk.Branch(feed_forward, feed_forward.write, eps=block.norm3.eps)))

    def _passed_by(self, block: nn.Module) -> tuple[str, ...]:
        return "norm1", "norm1.norm", "norm1.silu", "norm3"

    def _modulation(self, timestep: Tensor, labels: Tensor, dtype, gate) -> hk.Modulation:
        """adaLN-Zero rows; every block embeds timestep and label with weights of its own."""
        hard = gate is not None and not isinstance(gate, Tensor)
        shift, scale, gates = [], [], []
        for i, block in enumerate(self.transformer.transformer_blocks):
            condition = F.silu(block.norm1.emb(timestep, labels, hidden_dtype=dtype))
            reused = [hard and not compute for compute in (gate[2 * i : 2 * i + 2] if hard else (True, True))]
            rows = adaln_rows(block.norm1.linear, condition, reused)
            shift += rows[0::3]
            scale += rows[1::3]
            gates += rows[2::3]
        condition = self.transformer.transformer_blocks[0].norm1.emb(timestep, labels, hidden_dtype=dtype)
        final_shift, final_scale = self.transformer.proj_out_1(F.silu(condition)).chunk(2, 1)
        return hk.Modulation([*shift, final_shift], [*scale, final_scale], gates)


def adaln_rows(linear: nn.Module, condition: Tensor, reused: Sequence[bool]) -> Sequence[Tensor | None]:
    """A block's rows [B, D]: shift, scale and gate of each branch; of a reused one only the gate is evaluated."""
    if not any(reused) or not writable(linear):
        return linear(condition).chunk(6, 1)
    D = condition.shape[1]
    rows = []
    for branch, skip in enumerate(reused):
        first, end = 3 * D * branch + (2 * D if skip else 0), 3 * D * (branch + 1)
        bias = None if linear.bias is None else linear.bias[first:end]
        part = F.linear(condition, linear.weight[first:end], bias).split(D, 1)
        rows += (None, None, *part) if skip else part
    return rows
