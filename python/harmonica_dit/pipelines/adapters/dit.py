"""diffusers' `DiTTransformer2DModel` (DiT, Peebles & Xie, ICCV 2023) through `cached_forward`: two branches a block."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import harmonica_kernels as hk
from harmonica_dit.models.dit import HOISTED

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
                 row: Sequence[bool] | Tensor | None = None,
                 forecast_weights: Sequence[float] | Tensor | None = None, cache: hk.FeatureCache | None = None,
                 threshold: float = 0.1, modulation: hk.Modulation | None = None):
        """As `DiTTransformer2DModel.forward`; row, forecast_weights, cache, threshold as in `cached_forward`.

        modulation: this step's of `hoist`, which makes timestep and label unnecessary.
        """
        model = self.transformer
        height, width = (side // model.patch_size for side in hidden_states.shape[-2:])
        x = model.pos_embed(hidden_states)
        if modulation is None:
            hard = row is not None and not isinstance(row, Tensor) and len(row) == len(self.branches)
            rows = (row if hard else (True,) * len(self.branches),)
            modulation = self._modulations(timestep, class_labels, x.dtype, rows)[0]
        x = hk.cached_forward(self.branches, x, modulation, row=row, forecast_weights=forecast_weights,
                              cache=cache, threshold=threshold,
                              context=Context(options=attention_options(cross_attention_kwargs)),
                              eps=model.norm_out.eps)
        return finish(unpatchify(model.proj_out_2(x), height, width, model.patch_size), return_dict)

    def hoist(self, rows: Sequence[Sequence[bool]], timesteps: Sequence[float], hidden_states: Tensor,
              timestep: Tensor | None = None, class_labels: Tensor | None = None, **_) -> Iterator[dict[str, Any]]:
        """The modulations of the steps with these rows and timesteps: every block embeds once for all of them.

        Where they would take more than HOISTED bytes, it goes by slices of steps, as in `harmonica_dit.models.DiT`.
        """
        B, D, dtype = len(hidden_states), self.transformer.inner_dim, hidden_states.dtype
        at_once = max(1, HOISTED // ((3 * len(self.branches) + 2) * B * D * dtype.itemsize))
        times = torch.tensor(timesteps, device=hidden_states.device)
        for first in range(0, len(rows), at_once):
            part = slice(first, first + at_once)
            labels = class_labels.repeat(len(rows[part]))
            # a name for the last of a slice would keep all of it while the next is made
            yield from (dict(modulation=modulation) for modulation in
                        self._modulations(times[part].repeat_interleave(B), labels, dtype, rows[part]))

    def _branches(self, block: nn.Module):
        attention, feed_forward = AttentionBody(block.attn1), FeedForwardBody(block.ff)
        return (("attn1", hk.Branch(attention, attention.write, eps=block.norm1.norm.eps)),
                ("ff", hk.Branch(feed_forward, feed_forward.write, eps=block.norm3.eps)))

    def _passed_by(self, block: nn.Module) -> tuple[str, ...]:
        return "norm1", "norm1.norm", "norm1.silu", "norm3"

    def _modulations(self, timestep: Tensor, labels: Tensor, dtype: torch.dtype,
                     rows: Sequence[Sequence[bool]]) -> list[hk.Modulation]:
        """adaLN-Zero rows of T steps, whose timesteps and labels [T·B] follow each other.

        Every block embeds timestep and label with weights of its own. rows: T rows of K bools, which are computed.
        """
        blocks = self.transformer.transformer_blocks
        made = [hk.Modulation([], [], []) for _ in rows]
        for i, block in enumerate(blocks):
            condition = F.silu(block.norm1.emb(timestep, labels, hidden_dtype=dtype)).unflatten(0, (len(rows), -1))
            computed = [[s for s, row in enumerate(rows) if row[k]] for k in (2 * i, 2 * i + 1)]
            for steps, (shift_scale, gates) in zip(computed, adaln_rows(block.norm1.linear, condition, computed)):
                shifts_scales = dict(zip(steps, shift_scale))
                for s, gate in enumerate(gates):
                    shift, scale = shifts_scales[s].chunk(2, 1) if s in shifts_scales else (None, None)
                    for rows_of, row in zip(made[s], (shift, scale, gate)):
                        rows_of.append(row)
        condition = F.silu(blocks[0].norm1.emb(timestep, labels, hidden_dtype=dtype))
        for modulation, final in zip(made, self.transformer.proj_out_1(condition).unflatten(0, (len(rows), -1))):
            for rows_of, row in zip(modulation, final.chunk(2, 1)):
                rows_of.append(row)
        return made


def adaln_rows(linear: nn.Module, condition: Tensor, computed: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
    """The rows of a block's adaLN for T conditions [T, B, D].

    Returns, for each branch, shift and scale [·, B, 2·D] of the steps at which it is computed, and the gates [T, B, D].
    Of a plain linear, nothing else is evaluated.
    """
    D = condition.shape[-1]
    if not writable(linear):
        parts = linear(condition).split(3 * D, 2)
        return [(part[steps][..., : 2 * D], part[..., 2 * D :]) for part, steps in zip(parts, computed)]

    def part(x: Tensor, start: int, end: int) -> Tensor:
        return F.linear(x, linear.weight[start:end], None if linear.bias is None else linear.bias[start:end])

    made = []
    for branch, steps in enumerate(computed):
        first, last, end = 3 * D * branch, 3 * D * branch + 2 * D, 3 * D * (branch + 1)  # shift and scale, the gate
        if len(steps) == len(condition):
            made.append(part(condition, first, end).split((2 * D, D), 2))
        else:
            made.append((part(condition[steps], first, last), part(condition, last, end)))
    return made
