"""The common part of the fused adapters: the bodies of diffusers' `BasicTransformerBlock`, and the checks."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

import harmonica_kernels as hk
from harmonica_dit.models.feed_forward import linear_gelu


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


class AttentionBody:
    """Self- or cross-attention of a block."""

    def __init__(self, attn: Attention, cross: bool = False):
        self.attn, self.cross = attn, cross

    def __call__(self, h: Tensor, context: Context) -> Tensor:
        text, mask = self._source(context)
        return self.attn(h, encoder_hidden_states=text, attention_mask=mask, **context.options)

    def write(self, h: Tensor, context: Context, out: Tensor) -> None:
        """Writes o into `out`. In a plain attention the last linear layer writes there itself; else o is copied."""
        text, mask = self._source(context)
        source = h if text is None else text
        if not self.is_plain(source, mask, context):
            out.copy_(self(h, context))
            return
        q = self._heads(self.attn.to_q, h)
        k, v = context.keys_values.get(self.attn) or self.keys_values(source)
        mask = None if mask is None else mask[:, None]  # over the heads
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        write_linear(self.attn.to_out[0], mixed.transpose(1, 2).flatten(2), out)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens attended to, [B, heads, tokens, width of a head] each."""
        return self._heads(self.attn.to_k, source), self._heads(self.attn.to_v, source)

    def _heads(self, linear: nn.Module, tokens: Tensor) -> Tensor:
        return linear(tokens).unflatten(-1, (self.attn.heads, -1)).transpose(1, 2)

    def _source(self, context: Context) -> tuple[Tensor | None, Tensor | None]:
        return (context.text, context.text_mask) if self.cross else (None, context.mask)

    def is_plain(self, source: Tensor, mask: Tensor | None, context: Context) -> bool:
        """Whether a call of the attention does exactly what `write` does without it."""
        attn = self.attn
        linear, dropout = attn.to_out
        return (type(attn) is Attention and type(attn.processor) is AttnProcessor2_0 and has_own_forward(attn)
                and is_plain_linear(linear) and has_own_forward(dropout) and not (dropout.training and dropout.p)
                and not context.options and (mask is None or mask.shape[-1] == source.shape[1]))


class FeedForwardBody:
    """The feed-forward of a block."""

    def __init__(self, ff: FeedForward):
        self.ff = ff

    def __call__(self, h: Tensor, context: Context) -> Tensor:
        return self.ff(h)

    def write(self, h: Tensor, context: Context, out: Tensor) -> None:
        """Writes o into `out`. In a plain feed-forward the last linear layer writes there itself; else o is copied."""
        first, *hidden, last = self.ff.net
        if not (type(self.ff) is FeedForward and has_own_forward(self.ff) and is_plain_linear(last)):
            out.copy_(self.ff(h))
            return
        h = linear_gelu(first.proj, h) if _is_linear_gelu(first) else first(h)
        for module in hidden:
            h = module(h)
        write_linear(last, h, out)


class FusedAdapter:
    """Runs a diffusers transformer of `BasicTransformerBlock`s through `cached_forward`.

    Subclasses define `hoist`, `__call__`, `_branches(block)` (a block's branches with their names) and
    `_bypassed_modules(block)` (the names of its submodules that fused calls replace).
    """

    def __init__(self, transformer: nn.Module):
        config = transformer.config
        for setting, only in (("norm_elementwise_affine", False), ("attention_type", "default")):
            if config.get(setting, only) != only:
                raise ValueError(f"transformer: its configuration has {setting}={config[setting]!r}, this adapter "
                                 f"knows {only!r} only")
        self.transformer = transformer
        self.name = type(transformer).__name__  # a caller who knows the weights' repository may put its name here
        self.branches: list[hk.Branch] = []
        names = []
        for i, block in enumerate(transformer.transformer_blocks):
            for part, branch in self._branches(block):
                self.branches.append(branch)
                names.append(f"transformer_blocks.{i}.{part}")
        self.branch_names = tuple(names)
        self.check()

    @property
    def architecture(self) -> dict[str, str | int]:
        """The model's fingerprint; a router must have the same: class, number of branches K and width D."""
        return {"class": type(self.transformer).__name__, "K": len(self.branches), "D": self.transformer.inner_dim}

    def new_cache(self, history: int = 1) -> hk.FeatureCache:
        """A cache for one trajectory."""
        return hk.FeatureCache(history)

    def trunk_values(self, latents: Tensor) -> int:
        """Values of the trunk's state of a forward with these latents [B, C, H, W]."""
        B, _, height, width = latents.shape
        return B * (height // self.transformer.config.patch_size) * (width // self.transformer.config.patch_size) \
            * self.transformer.inner_dim

    def hoist(self, rows: Sequence[Sequence[bool]], timesteps: Sequence[float],
              *args, **kwargs) -> Iterator[dict[str, Any]]:
        """Computes for many steps at once what depends on the conditioning alone; yields more arguments for each call.

        rows, timesteps: the steps' hard rows and timesteps. args, kwargs: of one of these calls; all calls must have
        its conditioning (labels, text).
        """
        raise NotImplementedError

    def check(self) -> None:
        """Refuses hooks and compiled code on modules that the adapter does not call: they would silently not run.

        The transformer's own hooks are allowed. Whoever calls the adapter instead of the transformer has to run them.

        Raises:
            ValueError: the message names the module and its hooks or compiled code.
        """
        transformer = self.transformer
        bypassed = [("transformer_blocks", transformer.transformer_blocks), ("norm_out", transformer.norm_out)]
        for i, block in enumerate(transformer.transformer_blocks):
            prefix = f"transformer_blocks.{i}"
            bypassed.append((prefix, block))
            bypassed += ((f"{prefix}.{part}", block.get_submodule(part)) for part in self._bypassed_modules(block))
        refused = [(name, module) for name, module in bypassed if not has_own_forward(module)]
        if transformer._compiled_call_impl is not None:
            refused.insert(0, ("transformer", transformer))
        if refused:
            name, module = refused[0]
            raise ValueError(
                f"{name}: has {_describe_changes(module)}, which would not run: the adapter calls the branches, not "
                "their blocks. Compile or hook the branches (attn1, attn2, ff) instead; to offload the model, use "
                "enable_model_cpu_offload")


def has_own_forward(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward and nothing else."""
    return not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks or module._compiled_call_impl is not None
                or "forward" in module.__dict__)  # accelerate's and diffusers' hooks set one


def _describe_changes(module: nn.Module) -> str:
    if module._compiled_call_impl is not None:
        return "been compiled"
    return "a replaced forward (offloading or another hook)" if "forward" in module.__dict__ else "hooks"


def is_plain_linear(linear: nn.Module) -> bool:
    """Whether this is exactly nn.Linear (no LoRA, quantization or hook), so that its weight may be used directly."""
    return type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and has_own_forward(linear)


def _is_linear_gelu(module: nn.Module) -> bool:
    """Whether this is exactly a linear layer with bias and the tanh form of the GELU."""
    return (type(module) is GELU and module.approximate == "tanh" and has_own_forward(module)
            and is_plain_linear(module.proj) and module.proj.bias is not None)


def write_linear(linear: nn.Linear, h: Tensor, out: Tensor) -> None:
    """Writes linear(h), with h [B, N, ·], straight into `out`, a contiguous cache buffer."""
    h, out = h.flatten(0, 1), out.flatten(0, 1)
    if linear.bias is None:
        torch.mm(h, linear.weight.t(), out=out)
    else:
        torch.addmm(linear.bias, h, linear.weight.t(), out=out)


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
