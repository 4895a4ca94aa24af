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
    is_plain_linear,
    unpatchify,
)


class DiTAdapter(FusedAdapter):
    def __call__(self, hidden_states: Tensor, timestep: Tensor | None = None, class_labels: Tensor | None = None,
                 cross_attention_kwargs: dict[str, Any] | None = None, return_dict: bool = True, *,
                 row: Sequence[bool] | Tensor | bool | None = None,
                 forecast_weights: Sequence[float] | Tensor | hk.TrunkWeights | None = None,
                 cache: hk.FeatureCache | hk.TrunkCache | None = None,
                 threshold: float = 0.1, modulation: hk.Modulation | None = None, condition: Tensor | None = None):
        """As `DiTTransformer2DModel.forward`; row, forecast_weights, cache, threshold as in `cached_forward`.

        modulation: this step's from `hoist`. With it, timestep and label are not needed.
        condition: [D], added to every embedded timestep and label, or None.
        """
        model = self.transformer
        height, width = (side // model.patch_size for side in hidden_states.shape[-2:])
        x = model.pos_embed(hidden_states)
        if modulation is None:
            # all of it for scores, and for a row of runs, whose entries are not those of branches
            every = isinstance(row, Tensor) or (isinstance(row, Sequence) and len(row) != len(self.branches))
            modulation = self._modulations(timestep, class_labels, x.dtype, [None if every else row],
                                           None if condition is None else condition[None])[0]
        x = hk.cached_forward(self.branches, x, modulation, row=row, forecast_weights=forecast_weights,
                              cache=cache, threshold=threshold,
                              context=Context(options=attention_options(cross_attention_kwargs)),
                              eps=model.norm_out.eps)
        return finish(unpatchify(model.proj_out_2(x), height, width, model.patch_size), return_dict)

    def hoist(self, rows: Sequence[Sequence[bool] | bool | None], timesteps: Sequence[float], hidden_states: Tensor,
              timestep: Tensor | None = None, class_labels: Tensor | None = None, *,
              condition: Tensor | None = None, **_) -> Iterator[dict[str, Any]]:
        """The modulations of the steps with these rows and timesteps. Every block embeds once for all steps.

        condition: [T, D], added to the embedded timesteps and labels, or None.

        If they would take more than HOISTED bytes, the steps are cut into slices, as in `harmonica_dit.models.DiT`.
        """
        B, D, dtype = len(hidden_states), self.transformer.inner_dim, hidden_states.dtype
        at_once = max(1, HOISTED // ((3 * len(self.branches) + 2) * B * D * dtype.itemsize))
        times = torch.tensor(timesteps, device=hidden_states.device)
        for first in range(0, len(rows), at_once):
            part = slice(first, first + at_once)
            labels = class_labels.repeat(len(rows[part]))
            # no local variable holds a modulation: it would keep its slice alive while the next one is computed
            yield from (dict(modulation=modulation) for modulation in
                        self._modulations(times[part].repeat_interleave(B), labels, dtype, rows[part],
                                          None if condition is None else condition[part]))

    def _branches(self, block: nn.Module):
        attention, feed_forward = AttentionBody(block.attn1), FeedForwardBody(block.ff)
        return (("attn1", hk.Branch(attention, attention.write, eps=block.norm1.norm.eps)),
                ("ff", hk.Branch(feed_forward, feed_forward.write, eps=block.norm3.eps)))

    def _bypassed_modules(self, block: nn.Module) -> tuple[str, ...]:
        return "norm1", "norm1.norm", "norm1.silu", "norm3"

    def _modulations(self, timestep: Tensor, labels: Tensor, dtype: torch.dtype,
                     rows: Sequence[Sequence[bool] | bool | None],
                     added: Tensor | None = None) -> list[hk.Modulation]:
        """The adaLN-Zero modulations of T steps. Every block embeds timestep and label with its own weights.

        timestep, labels: [T·B], step after step. rows: the T hard rows; where the trunk is forecast (False), only the
        final norm's modulation is computed. added: [T, D] to what each block embeds, or None.
        """
        blocks, K = self.transformer.transformer_blocks, len(self.branches)
        made = [hk.Modulation([None] * K, [None] * K, [None] * K) for _ in rows]
        run = [s for s, row in enumerate(rows) if row is not False]  # the others run no block
        batch = len(timestep) // len(rows)
        of_run = torch.tensor([s * batch + b for s in run for b in range(batch)], device=timestep.device)
        for i, block in enumerate(blocks if run else ()):
            some = len(run) < len(rows)
            times, classes = (timestep[of_run], labels[of_run]) if some else (timestep, labels)
            embedded = block.norm1.emb(times, classes, hidden_dtype=dtype).unflatten(0, (len(run), -1))
            condition = F.silu(embedded if added is None else embedded + added[run, None].to(dtype))
            branches = 2 * i, 2 * i + 1
            computed = [[j for j, s in enumerate(run) if rows[s] is None or rows[s][k]] for k in branches]
            for k, steps, (shift_scale, gates) in zip(branches, computed,
                                                      adaln_rows(block.norm1.linear, condition, computed)):
                for j, rows_of_step in zip(steps, shift_scale):
                    made[run[j]].shift[k], made[run[j]].scale[k] = rows_of_step.chunk(2, 1)
                for s, gate in zip(run, gates):
                    made[s].gate[k] = gate
        embedded = blocks[0].norm1.emb(timestep, labels, hidden_dtype=dtype)
        condition = F.silu(embedded if added is None else embedded + added.to(dtype).repeat_interleave(batch, 0))
        for modulation, final in zip(made, self.transformer.proj_out_1(condition).unflatten(0, (len(rows), -1))):
            shift, scale = final.chunk(2, 1)
            modulation.shift.append(shift)
            modulation.scale.append(scale)
        return made


def adaln_rows(linear: nn.Module, condition: Tensor, computed: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
    """A block's adaLN modulation for T conditions [T, B, D]. computed: for each branch the steps that compute it.

    Returns, for each branch, shift and scale [·, B, 2·D] of these steps, and the gates [T, B, D] of all steps. If the
    layer is a plain linear one, it computes nothing else.
    """
    D = condition.shape[-1]
    if not is_plain_linear(linear):
        parts = linear(condition).split(3 * D, 2)
        return [(part[steps][..., : 2 * D], part[..., 2 * D :]) for part, steps in zip(parts, computed)]

    def part(x: Tensor, start: int, end: int) -> Tensor:
        return F.linear(x, linear.weight[start:end], None if linear.bias is None else linear.bias[start:end])

    made = []
    for branch, steps in enumerate(computed):
        # of the layer's output, first:last is the branch's shift and scale, last:end its gate
        first, last, end = 3 * D * branch, 3 * D * branch + 2 * D, 3 * D * (branch + 1)
        if len(steps) == len(condition):
            made.append(part(condition, first, end).split((2 * D, D), 2))
        else:
            made.append((part(condition[steps], first, last), part(condition, last, end)))
    return made
