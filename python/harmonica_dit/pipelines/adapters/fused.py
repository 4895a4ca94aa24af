"""The common part of the fused adapters: the bodies of diffusers' `BasicTransformerBlock`, and the checks."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

import harmonica_kernels as hk
from harmonica_dit.flops import Flops, count_call, count_flops
from harmonica_dit.models.feed_forward import linear_gelu
from harmonica_dit.models.plain_modules import (
    BlockPart,
    has_own_forward,
    is_linear,
    is_own,
    is_plain_linear,
    write_linear,
)

from .compiled import refuse_compiled, undo_compile
from .replace_forwards import replace_forwards


class Context(NamedTuple):
    """The arguments of a forward's bodies beside h.

    mask, text_mask: biases [B, 1, tokens] added to the scores of self- and cross-attention, or None.
    text: [B, tokens, D]; None where cross-attention attends to the image itself.
    options: keyword arguments of every attention (diffusers' `cross_attention_kwargs`).
    keys_values: of the text, for each cross-attention for which `hoist` computed them.
    """

    mask: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    options: dict[str, Any] = {}
    keys_values: dict[Attention, tuple[Tensor, Tensor]] = {}


class AttentionBody(BlockPart):
    """Self- or cross-attention of a block."""

    def __init__(self, blocks: nn.ModuleList, i: int, name: str, cross: bool = False):
        super().__init__(blocks, i, name)
        self.cross = cross

    def __call__(self, h: Tensor, context: Context) -> Tensor:
        text, mask = self._source(context)
        return self.module(h, encoder_hidden_states=text, attention_mask=mask, **context.options)

    def write(self, h: Tensor, context: Context, out: Tensor) -> None:
        """Writes o into `out`. In a plain attention the last linear layer writes there itself; else o is copied."""
        text, mask = self._source(context)
        source, attn = h if text is None else text, self.module
        if not is_plain_attention(attn, source, mask, context):
            out.copy_(self(h, context))
            return
        q = _heads(attn, attn.to_q, h)
        k, v = context.keys_values.get(attn) or keys_values_of(attn, source)
        mask = None if mask is None else mask[:, None]  # over the heads
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        write_linear(attn.to_out[0], mixed.transpose(1, 2).flatten(2), out)

    def hoistable(self, text: Tensor) -> Attention | None:
        """The attention, if this is a cross-attention whose keys and values of the text are the same at every step.

        They need not be where something has been put on their linear layers: the scale of a LoRA may change.
        """
        attn = self.module
        steady = self.cross and is_plain_attention(attn, text, None, Context())
        return attn if steady and is_linear(attn.to_k) and is_linear(attn.to_v) else None

    def _source(self, context: Context) -> tuple[Tensor | None, Tensor | None]:
        return (context.text, context.text_mask) if self.cross else (None, context.mask)


def is_plain_attention(attn: nn.Module, source: Tensor, mask: Tensor | None, context: Context) -> bool:
    """Whether a call of the attention does exactly what `AttentionBody.write` does without it."""
    if type(attn) is not Attention or not (is_own(Attention) and is_own(AttnProcessor2_0, "__call__")):
        return False
    linear, dropout = attn.to_out
    more = attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.norm_q, attn.norm_k, attn.residual_connection
    return (type(attn.processor) is AttnProcessor2_0 and has_own_forward(attn) and is_plain_linear(linear)
            and has_own_forward(dropout) and not (dropout.training and dropout.p)
            and not any(more) and attn.rescale_output_factor == 1  # another attention may stand in the block's place
            and not context.options and (mask is None or mask.shape[-1] == source.shape[1]))


def keys_values_of(attn: Attention, source: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the tokens attended to, [B, heads, tokens, width of a head] each."""
    return _heads(attn, attn.to_k, source), _heads(attn, attn.to_v, source)


def _heads(attn: Attention, linear: nn.Module, tokens: Tensor) -> Tensor:
    return linear(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)


class FeedForwardBody(BlockPart):
    """The feed-forward of a block."""

    def __call__(self, h: Tensor, context: Context) -> Tensor:
        ff = self.module
        return ff.net[-1](_before_last(ff, h)) if _is_plain(ff) else ff(h)

    def write(self, h: Tensor, context: Context, out: Tensor) -> None:
        """Writes o into `out`. In a plain feed-forward the last linear layer writes there itself; else o is copied."""
        ff = self.module
        if _is_plain(ff) and is_plain_linear(ff.net[-1]):
            write_linear(ff.net[-1], _before_last(ff, h), out)
        else:
            out.copy_(self(h, context))


class FusedAdapter:
    """Runs a diffusers transformer of `BasicTransformerBlock`s through `cached_forward`.

    What is put on the modules that it calls is honoured: LoRA, quantization and hooks on attentions, feed-forwards,
    embedders, adaLN's linear layers and what is inside them, and other modules or blocks in their places.

    Subclasses define `hoist`, `loop_parts`, `__call__`, `_branches(i)` (block i's branches with their names),
    `_bypassed` (the submodules of a block that fused calls replace, and their classes), the blocks' `_norm_type`, and
    `_parts` (the branches that a block may have).
    """

    _bypassed: dict[str, type[nn.Module]]
    _norm_type: str
    _parts: tuple[str, ...]

    def __init__(self, transformer: nn.Module):
        config = transformer.config
        for setting, only in (("norm_elementwise_affine", False), ("attention_type", "default")):
            if config.get(setting, only) != only:
                raise ValueError(f"transformer: its configuration has {setting}={config[setting]!r}, this adapter "
                                 f"knows {only!r} only")
        self.transformer, self._blocks = transformer, transformer.transformer_blocks
        self._check_bypassed()
        self.name = type(transformer).__name__  # a caller who knows the weights' repository may put its name here
        self.flops: Flops | None = None  # of the traced forward
        self.trunk_flops: Flops | None = None
        self.trunk_size: int | None = None
        self.branches: list[hk.Branch] = []
        names = []
        for i in range(len(self._blocks)):
            for part, branch in self._branches(i):
                self.branches.append(branch)
                names.append(f"transformer_blocks.{i}.{part}")
        self.branch_names, self._depth = tuple(names), len(self._blocks)

    @property
    def architecture(self) -> dict[str, str | int]:
        """The model's fingerprint; a router must have the same: class, number of branches K and width D."""
        return {"class": type(self.transformer).__name__, "K": len(self.branches), "D": self.transformer.inner_dim}

    def new_cache(self, history: int = 1, unit: str = "branch") -> hk.FeatureCache | hk.TrunkCache:
        """A cache for one trajectory, of the branches or of the trunk."""
        return hk.TrunkCache(history) if unit == "trunk" else hk.FeatureCache(history)

    def cache_nbytes(self, history: int = 1, unit: str = "branch") -> int:
        """Bytes that a full cache of a trajectory like the traced forward holds: of the trunk states and tokens.

        Raises:
            ValueError: no forward has been traced yet.
        """
        count_flops(self)
        return history * self._nbytes * (2 if unit == "trunk" else len(self.branches))

    def trace(self, *args, **kwargs) -> Flops:
        """Runs one forward and counts what it costs, branch by branch; the arguments are the transformer's own.

        Sets `flops`, `trunk_flops` (the same) and `trunk_size`, the values of the trunk's state.
        """
        return self.trace_call(self.transformer, args, kwargs)

    def trace_call(self, forward: Callable, args: tuple, kwargs: dict) -> Flops:
        """`trace`; the adapter runs in the place of `forward`, which is not called."""
        states: list[Tensor] = []

        def embed(module, forward, args, kwargs):
            states.append(forward(*args, **kwargs))
            return states[0]

        with replace_forwards({self.transformer.pos_embed: embed}):  # in this thread; a hook would see all of them
            self.flops = self.trunk_flops = count_call(self, lambda: self(*args, **kwargs))
        self.trunk_size, self._nbytes = states[0].numel(), states[0].nbytes
        return self.flops

    def is_current(self) -> bool:
        """Whether this adapter still knows the transformer."""
        try:
            self.check()
        except ValueError:
            return False
        return True

    def hoist(self, rows: Sequence[Sequence[bool]], timesteps: Sequence[float],
              *args, **kwargs) -> Iterator[dict[str, Any]]:
        """Computes for many steps at once what depends on the conditioning alone; yields more arguments for each call.

        rows, timesteps: the steps' hard rows and timesteps. args, kwargs: of one of these calls; all calls must have
        its conditioning (labels, text).
        """
        raise NotImplementedError

    def check(self) -> None:
        """Refuses what has been put on modules that the adapter does not call: it would silently not run.

        The transformer's own hooks are allowed. Whoever calls the adapter instead of the transformer has to run them.

        Raises:
            ValueError: such a module has hooks, compiled code or another class; the message names it. Or the blocks
                are not those that the adapter was made for.
        """
        self._check_blocks()
        self._check_bypassed()
        eps = [branch.eps for i in range(len(self._blocks)) for _, branch in self._branches(i)]
        if eps != [branch.eps for branch in self.branches]:
            raise ValueError("transformer_blocks: a block has other branches, or norms of another eps, than when the "
                             "adapter was made; adapt the transformer again")

    def _check_bypassed(self) -> None:
        refuse_compiled("", self.transformer, self.transformer, "branch")
        for name, cls in self._bypassed_modules():
            module = self.transformer.get_submodule(name)
            changes = _describe_changes(module, cls) or (
                self._describe_block(module) if cls is BasicTransformerBlock else None)
            if changes is not None:
                raise ValueError(
                    f"{name}: has {changes}, which would not run: the adapter calls the branches, not their blocks. "
                    "Compile or hook the branches (attn1, attn2, ff) instead; to offload the model, use "
                    "enable_model_cpu_offload")

    def _describe_block(self, block: BasicTransformerBlock) -> str | None:
        """What the block does that the adapter does not."""
        if block.norm_type != self._norm_type:
            return f"the norms of {block.norm_type}"
        if block.attn2 is not None and "attn2" not in self._parts:
            return "a cross-attention"
        return "other inputs of its attentions" if block.pos_embed or block.only_cross_attention else None

    def _bypassed_modules(self) -> Iterator[tuple[str, type[nn.Module]]]:
        """Names and classes of the modules that are not called, from the outside in."""
        yield from (("transformer_blocks", nn.ModuleList), ("norm_out", nn.LayerNorm))
        for i in range(len(self._blocks)):
            yield f"transformer_blocks.{i}", BasicTransformerBlock
            yield from ((f"transformer_blocks.{i}.{part}", cls) for part, cls in self._bypassed.items())

    def _check_blocks(self) -> None:
        """Raises if the list of blocks is not the one whose modules the bodies look up."""
        blocks = self.transformer.transformer_blocks
        if blocks is not self._blocks or len(blocks) != self._depth:
            raise ValueError("transformer_blocks: is another list, or of another length, than when the adapter was "
                             "made; adapt the transformer again")


def _describe_changes(module: nn.Module, cls: type[nn.Module]) -> str | None:
    """What the module does that the class does not by itself; None if there is nothing."""
    if undo_compile(module) is not None:
        return "been compiled"
    if type(module) is not cls:
        return f"another class ({type(module).__name__})"
    if not is_own(cls):
        return f"another forward, put in the place of {cls.__name__}'s"
    if not has_own_forward(module):
        return "a replaced forward (offloading or another hook)" if "forward" in module.__dict__ else "hooks"
    return "weights" if cls is nn.LayerNorm and module.elementwise_affine else None


def _is_plain(ff: nn.Module) -> bool:
    """Whether a feed-forward does no more than to call its modules one after the other."""
    return type(ff) is FeedForward and has_own_forward(ff) and is_own(FeedForward)


def _before_last(ff: FeedForward, h: Tensor) -> Tensor:
    """What enters the last module of a feed-forward."""
    first, *hidden, _ = ff.net
    h = linear_gelu(first.proj, h) if _is_linear_gelu(first) else first(h)
    for module in hidden:
        h = module(h)
    return h


def _is_linear_gelu(module: nn.Module) -> bool:
    """Whether this is exactly a linear layer with bias and the tanh form of the GELU."""
    return (type(module) is GELU and module.approximate == "tanh" and has_own_forward(module) and is_own(GELU)
            and is_plain_linear(module.proj) and module.proj.bias is not None)


def each_step(values: Tensor, batch: int) -> Tensor:
    """values [T, ...], each for a batch of its step: [T·B, ...], step after step."""
    return values[:, None].expand(-1, batch, *values.shape[1:]).flatten(0, 1)


def unpatchify(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """[B, height·width, patch²·C] -> [B, C, height·patch, width·patch]."""
    tokens = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (height, width))
    return torch.einsum("nhwpqc->nchpwq", tokens).flatten(4, 5).flatten(2, 3)


def finish(output: Tensor, return_dict: bool) -> Transformer2DModelOutput | tuple[Tensor]:
    """The output in the form that diffusers returns."""
    return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def attention_options(cross_attention_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """The keyword arguments of every attention, from diffusers' `cross_attention_kwargs`.

    Raises:
        ValueError: they ask for GLIGEN, which neither model has.
    """
    options = dict(cross_attention_kwargs or {})
    if options.pop("gligen", None) is not None:
        raise ValueError("cross_attention_kwargs: has 'gligen', but this model has no such layer")
    return options
