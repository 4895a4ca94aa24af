"""diffusers' `PixArtTransformer2DModel` (PixArt-α and Σ, Chen et al., 2023 and 2024) through `cached_forward`.

Three branches a block. Cross-attention has neither norm nor gate: it is given x itself.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import harmonica_kernels as hk
from harmonica_dit.models.plain_modules import is_steady

from .fused import (
    AttentionBody,
    Context,
    FeedForwardBody,
    FusedAdapter,
    attention_options,
    each_step,
    finish,
    keys_values_of,
    unpatchify,
)


class PixArtAdapter(FusedAdapter):
    _bypassed = {"norm1": nn.LayerNorm, "norm2": nn.LayerNorm}
    _norm_type, _parts = "ada_norm_single", ("attn1", "attn2", "ff")

    def __call__(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 timestep: Tensor | None = None, added_cond_kwargs: dict[str, Tensor] | None = None,
                 cross_attention_kwargs: dict[str, Any] | None = None, attention_mask: Tensor | None = None,
                 encoder_attention_mask: Tensor | None = None, return_dict: bool = True, *,
                 row: Sequence[bool] | Tensor | bool | None = None,
                 forecast_weights: Sequence[float] | Tensor | hk.TrunkWeights | None = None,
                 cache: hk.FeatureCache | hk.TrunkCache | None = None,
                 threshold: float = 0.1, condition: Tensor | None = None, text: Tensor | None = None,
                 keys_values: dict[nn.Module, tuple[Tensor, Tensor]] | None = None):
        """As `PixArtTransformer2DModel.forward`; row, forecast_weights, cache, threshold as in `cached_forward`.

        condition: [D], added to the embedded timestep, or None.
        text, keys_values: from `hoist`: the projected text states, and each cross-attention's keys and values of them.

        Raises:
            ValueError: the model wants micro-conditions and `added_cond_kwargs` is None.
        """
        self._check_blocks()
        model = self.transformer
        if model.use_additional_conditions and added_cond_kwargs is None:
            raise ValueError("added_cond_kwargs: got None, but this model is conditioned on resolution and aspect "
                             "ratio as well")
        batch = len(hidden_states)
        mask, text_mask = (bias(m, hidden_states.dtype) for m in (attention_mask, encoder_attention_mask))
        x = model.pos_embed(hidden_states)
        modulation = self._modulation(timestep, added_cond_kwargs, batch, x.dtype, condition)
        if text is None:
            text = self._text(encoder_hidden_states, batch)
        x = hk.cached_forward(self.branches, x, modulation, row=row, forecast_weights=forecast_weights, cache=cache,
                              threshold=threshold, eps=model.norm_out.eps, model=model,
                              context=Context(mask, text, text_mask, attention_options(cross_attention_kwargs),
                                              keys_values or {}))
        return finish(self.head(x, hidden_states.shape), return_dict)

    def hoist(self, rows: Sequence[Sequence[bool] | bool | None], timesteps: Sequence[float], hidden_states: Tensor,
              encoder_hidden_states: Tensor | None = None, *_, condition: Tensor | None = None,
              **__) -> Iterator[dict[str, Any]]:
        """The projected text, its keys and values for each cross-attention that a row computes, and the conditions.

        Keys and values, or the text, are left out where something has been put on the layers that make them and may
        change between two steps, as the scale of a LoRA does.
        """
        added = [{}] * len(rows) if condition is None else [dict(condition=row) for row in condition]
        project = self.transformer.caption_projection
        if encoder_hidden_states is None or not (project is None or is_steady(project)):
            yield from added
            return
        text = self._text(encoder_hidden_states, len(hidden_states))
        made = self._keys_values(text, [any(row is None or (row is not False and row[k]) for row in rows)
                                        for k in range(len(self.branches))])
        yield from (dict(text=text, keys_values=made) | one for one in added)

    def loop_parts(self, timesteps: Tensor, condition: Tensor, batch: int, encoder_hidden_states: Tensor,
                   encoder_attention_mask: Tensor | None, added_cond_kwargs: dict[str, Tensor]) -> dict[str, Any]:
        """Modulation and context of a device-gated trajectory, see `PipelineDenoiser.loop_parts`.

        timesteps, condition: [T], [T, D]. batch: B. added_cond_kwargs: of T·B rows, step after step. The others are as
        in the transformer's forward.
        """
        dtype = self.transformer.dtype

        def modulation() -> hk.Modulation:
            made = self._modulation(each_step(timesteps, batch), added_cond_kwargs, len(timesteps) * batch, dtype,
                                    each_step(condition, batch))
            return hk.Modulation(*([None if rows is None else rows.unflatten(0, (-1, batch)) for rows in part]
                                   for part in made))

        def context() -> Context:
            text = self._text(encoder_hidden_states, batch)
            return Context(text=text, text_mask=bias(encoder_attention_mask, dtype),
                           keys_values=self._keys_values(text, [True] * len(self.branches)))

        return dict(modulation=modulation, context=context)

    def head(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """The output [B, C_out, H, W] of what the final norm returned; shape [..., H, W]."""
        patch = self.transformer.config.patch_size
        height, width = (side // patch for side in shape[-2:])
        return unpatchify(self.transformer.proj_out(x), height, width, patch)

    def _keys_values(self, text: Tensor, computed: Sequence[bool]) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        """The text's keys and values in these branches' cross-attentions, where they are the same at every step."""
        bodies = [branch.body for branch, its in zip(self.branches, computed, strict=True) if its]
        hoisted = [body.hoistable(text) for body in bodies if isinstance(body, AttentionBody)]
        return {attn: keys_values_of(attn, text) for attn in hoisted if attn is not None}

    def _text(self, states: Tensor | None, batch: int) -> Tensor | None:
        """The text states [B, tokens, D] that cross-attention takes."""
        project = self.transformer.caption_projection
        return states if project is None else project(states).view(batch, -1, self.transformer.inner_dim)

    def _branches(self, i: int):
        block = self._blocks[i]
        attention, feed_forward = AttentionBody(self._blocks, i, "attn1"), FeedForwardBody(self._blocks, i, "ff")
        branches = [("attn1", hk.Branch(attention, attention.write, eps=block.norm1.eps)),
                    ("ff", hk.Branch(feed_forward, feed_forward.write, eps=block.norm2.eps))]
        if block.attn2 is not None:
            cross = AttentionBody(self._blocks, i, "attn2", cross=True)
            branches.insert(1, ("attn2", hk.Branch(cross, cross.write, norm=False, gate=False)))
        return branches

    def _modulation(self, timestep: Tensor, micro: dict[str, Tensor] | None, batch: int, dtype: torch.dtype,
                    condition: Tensor | None) -> hk.Modulation:
        """adaLN-single: all blocks share a step's values `shared` [B, 6·D], and each block adds its own table [6, D].

        The final norm adds its table [2, D] to `embedded` [B, D], the embedded timestep. condition: [D] or [B, D].
        """
        single, blocks = self.transformer.adaln_single, self._blocks
        shared, embedded = single(timestep, micro, batch_size=batch, hidden_dtype=dtype)
        if condition is not None:
            embedded = embedded + condition.to(embedded.dtype)
            shared = single.linear(single.silu(embedded))
        tables = torch.stack([block.scale_shift_table for block in blocks])
        shift, scale, gate = [], [], []
        for block, six in zip(blocks, (tables[:, None] + shared.unflatten(1, (6, -1))).unbind()):  # [B, 6, D] each
            six = six.unbind(1)
            cross = [] if block.attn2 is None else [None]
            shift += [six[0], *cross, six[3]]
            scale += [six[1], *cross, six[4]]
            gate += [six[2], *cross, six[5]]
        final_shift, final_scale = (self.transformer.scale_shift_table + embedded[:, None]).unbind(1)
        return hk.Modulation([*shift, final_shift], [*scale, final_scale], gate)


def bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """diffusers' bias [B, 1, tokens] for an attention mask [B, tokens] of 1 to keep and 0 to discard.

    A mask of three dimensions is a bias already and is returned as it is.
    """
    if mask is None or mask.dim() != 2:
        return mask
    return ((1 - mask.to(dtype)) * -10000.0)[:, None]
