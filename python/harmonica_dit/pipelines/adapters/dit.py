"""diffusers' `DiTTransformer2DModel` (DiT, Peebles & Xie, ICCV 2023) through `cached_forward`: two branches a block."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor, nn

import harmonica_kernels as hk
from harmonica_dit.models.adaln import add_block
from harmonica_dit.models.dit import HOISTED
from harmonica_dit.models.plain_modules import is_plain_linear, is_steady

from .fused import (
    AttentionBody,
    Context,
    FeedForwardBody,
    FusedAdapter,
    attention_options,
    each_step,
    finish,
    unpatchify,
)


class DiTAdapter(FusedAdapter):
    _bypassed = {"norm1": AdaLayerNormZero, "norm1.norm": nn.LayerNorm, "norm1.silu": nn.SiLU, "norm3": nn.LayerNorm}
    _norm_type, _parts = "ada_norm_zero", ("attn1", "ff")

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
        self._check_blocks()
        model = self.transformer
        x = model.pos_embed(hidden_states)
        if modulation is None:
            # all of it for scores, for a function, and for a row of runs, whose entries are not those of branches
            every = isinstance(row, Tensor) or callable(row) or (
                isinstance(row, Sequence) and len(row) != len(self.branches))
            modulation = self._modulations(timestep, class_labels, x.dtype, [None if every else row],
                                           None if condition is None else condition[None])[0]
        x = hk.cached_forward(self.branches, x, modulation, row=row, forecast_weights=forecast_weights,
                              cache=cache, threshold=threshold, model=model,
                              context=Context(options=attention_options(cross_attention_kwargs)),
                              eps=model.norm_out.eps)
        return finish(self.head(x, hidden_states.shape), return_dict)

    def hoist(self, rows: Sequence[Sequence[bool] | bool | None], timesteps: Sequence[float], hidden_states: Tensor,
              timestep: Tensor | None = None, class_labels: Tensor | None = None, *,
              condition: Tensor | None = None, **_) -> Iterator[dict[str, Any]]:
        """The modulations of the steps with these rows and timesteps. Every block embeds once for all steps.

        condition: [T, D], added to the embedded timesteps and labels, or None.

        If they would take more than HOISTED bytes, the steps are cut into slices, as in `harmonica_dit.models.DiT`. And
        as there, nothing is computed ahead if something has been put on the layers that may change between two steps.
        """
        model = self.transformer
        layers = [layer for block in self._blocks for layer in (block.norm1.emb, block.norm1.linear)]
        if not all(map(is_steady, (*layers, model.proj_out_1))):
            yield from ({} if condition is None else dict(condition=condition[s]) for s in range(len(rows)))
            return
        B, D, dtype = len(hidden_states), model.inner_dim, hidden_states.dtype
        at_once = max(1, HOISTED // ((3 * len(self.branches) + 2) * B * D * dtype.itemsize))
        times = torch.tensor(timesteps, device=hidden_states.device)
        for first in range(0, len(rows), at_once):
            part = slice(first, first + at_once)
            labels = class_labels.repeat(len(rows[part]))
            # no local variable holds a modulation: it would keep its slice alive while the next one is computed
            yield from (dict(modulation=modulation) for modulation in
                        self._modulations(times[part].repeat_interleave(B), labels, dtype, rows[part],
                                          None if condition is None else condition[part]))

    def loop_parts(self, timesteps: Tensor, condition: Tensor, class_labels: Tensor) -> dict[str, Any]:
        """The modulation of a device-gated trajectory, see `PipelineDenoiser.loop_parts`.

        timesteps, condition: [T], [T, D]. class_labels: [B].
        """
        T, dtype = len(timesteps), self.transformer.dtype

        def modulation() -> hk.Modulation:
            made = self._modulations(each_step(timesteps, len(class_labels)), class_labels.repeat(T), dtype, [None] * T,
                                     condition)
            return hk.Modulation(*([torch.stack(rows) for rows in zip(*part)] for part in zip(*made)))

        return dict(modulation=modulation, context=Context)

    def head(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """The output [B, C_out, H, W] of what the final norm returned; shape [..., H, W]."""
        patch = self.transformer.patch_size
        height, width = (side // patch for side in shape[-2:])
        return unpatchify(self.transformer.proj_out_2(x), height, width, patch)

    def _branches(self, i: int):
        block = self._blocks[i]
        attention, feed_forward = AttentionBody(self._blocks, i, "attn1"), FeedForwardBody(self._blocks, i, "ff")
        return (("attn1", hk.Branch(attention, attention.write, eps=block.norm1.norm.eps)),
                ("ff", hk.Branch(feed_forward, feed_forward.write, eps=block.norm3.eps)))

    def _modulations(self, timestep: Tensor, labels: Tensor, dtype: torch.dtype,
                     rows: Sequence[Sequence[bool] | bool | None],
                     added: Tensor | None = None) -> list[hk.Modulation]:
        """The adaLN-Zero modulations of T steps. Every block embeds timestep and label with its own weights.

        timestep, labels: [T·B], step after step. rows: the T hard rows; where the trunk is forecast (False), only the
        final norm's modulation is computed. added: [T, D] to what each block embeds, or None.
        """
        blocks, K = self._blocks, len(self.branches)
        made = [hk.Modulation([None] * K, [None] * K, [None] * K) for _ in rows]
        run = [s for s, row in enumerate(rows) if row is not False]  # the others run no block
        batch = len(timestep) // len(rows)
        times, classes, mine = timestep, labels, added
        if 0 < len(run) < len(rows):
            # slices are joined, because a list of indices would have to be copied to the device
            times, classes = (torch.cat([t[s * batch : (s + 1) * batch] for s in run]) for t in (timestep, labels))
            mine = None if added is None else torch.stack([added[s] for s in run])
        for i, block in enumerate(blocks if run else ()):
            embedded = block.norm1.emb(times, classes, hidden_dtype=dtype).unflatten(0, (len(run), -1))
            activated = F.silu(embedded if mine is None else embedded + mine[:, None].to(dtype))
            computed = [[j for j, s in enumerate(run) if rows[s] is None or rows[s][k]] for k in (2 * i, 2 * i + 1)]
            linear = block.norm1.linear
            add_block(made, i, run, computed, linear if is_plain_linear(linear) else None, activated,
                      partial(linear, activated))
        embedded = blocks[0].norm1.emb(timestep, labels, hidden_dtype=dtype)
        condition = F.silu(embedded if added is None else embedded + added.to(dtype).repeat_interleave(batch, 0))
        for modulation, final in zip(made, self.transformer.proj_out_1(condition).unflatten(0, (len(rows), -1))):
            shift, scale = final.chunk(2, 1)
            modulation.shift.append(shift)
            modulation.scale.append(scale)
        return made
