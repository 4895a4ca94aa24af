"""What the fused adapters share: the bodies of diffusers' `BasicTransformerBlock`, and the checks."""

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
    """What a forward's bodies need beside h.

    mask, text_mask: biases [B, 1, tokens] added to the scores of self- and cross-attention, or None.
    text: [B, tokens, D]; None where cross-attention attends to the image itself.
    options: keyword arguments of every attention (diffusers' `cross_attention_kwargs`).
    keys_values: of the text, by cross-attention, where they have been computed for several steps at once.
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
        """Writes o into `out`, by the last linear itself where nothing stands between."""
        text, mask = self._source(context)
        source = h if text is None else text
        if not self.plain(source, mask, context):
            out.copy_(self(h, context))
            return
        q = self._heads(self.attn.to_q, h)
        k, v = context.keys_values.get(self.attn) or self.keys_values(source)
        mask = None if mask is None else mask[:, None]  # over the heads
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        write_linear(self.attn.to_out[0], mixed.transpose(1, 2).flatten(2), out)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """[B, heads, tokens, width of a head] each, of what is attended to."""
        return self._heads(self.attn.to_k, source), self._heads(self.attn.to_v, source)

    def _heads(self, linear: nn.Module, tokens: Tensor) -> Tensor:
        return linear(tokens).unflatten(-1, (self.attn.heads, -1)).transpose(1, 2)

    def _source(self, context: Context) -> tuple[Tensor | None, Tensor | None]:
        return (context.text, context.text_mask) if self.cross else (None, context.mask)

    def plain(self, source: Tensor, mask: Tensor | None, context: Context) -> bool:
        """Whether calling the attention does what `write` does, and nothing else."""
        attn = self.attn
        linear, dropout = attn.to_out
        return (type(attn) is Attention and type(attn.processor) is AttnProcessor2_0 and untouched(attn)
                and writable(linear) and untouched(dropout) and not (dropout.training and dropout.p)
                and not context.options and (mask is None or mask.shape[-1] == source.shape[1]))


class FeedForwardBody:
    """The feed-forward of a block."""

    def __init__(self, ff: FeedForward):
        self.ff = ff

    def __call__(self, h: Tensor, context: Context) -> Tensor:
        return self.ff(h)

    def write(self, h: Tensor, context: Context, out: Tensor) -> None:
        """Writes o into `out`, by the last linear itself where nothing stands between."""
        first, *hidden, last = self.ff.net
        if not (type(self.ff) is FeedForward and untouched(self.ff) and writable(last)):
            out.copy_(self.ff(h))
            return
        h = linear_gelu(first.proj, h) if _is_linear_gelu(first) else first(h)
        for module in hidden:
            h = module(h)
        write_linear(last, h, out)


class FusedAdapter:
    """A diffusers transformer of `BasicTransformerBlock`s run through `cached_forward`.

    Subclasses give `_branches(block)`, a block's named branches, `_passed_by(block)`, the names of its submodules that
    the fused calls stand in for, `hoist` and `__call__`.
    """

    def __init__(self, transformer: nn.Module):
        config = transformer.config
        for setting, only in (("norm_elementwise_affine", False), ("attention_type", "default")):
            if config.get(setting, only) != only:
                raise ValueError(f"transformer: its configuration has {setting}={config[setting]!r}, this adapter "
                                 f"knows {only!r} only")
        self.transformer = transformer
        self.name = type(transformer).__name__  # whoever knows the repository of the weights may put its name here
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
        """What a router has to have been made for: class, number of branches K and width D."""
        return {"class": type(self.transformer).__name__, "K": len(self.branches), "D": self.transformer.inner_dim}

    def new_cache(self, history: int = 1) -> hk.FeatureCache:
        """A cache for one trajectory."""
        return hk.FeatureCache(history)

    def hoist(self, rows: Sequence[Sequence[bool]], timesteps: Sequence[float],
              *args, **kwargs) -> Iterator[dict[str, Any]]:
        """What depends on the conditioning alone, for many steps at once: more arguments for each step's call.

        rows, timesteps: the steps' hard rows and timesteps. args, kwargs: of one of these calls; what they say of the
        conditioning (labels, text) has to hold for all.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Refuses hooks and compiled code on modules that are not called here, for they would be passed by silently.

        The transformer's own hooks are left to those who call the adapter in its place.

        Raises:
            ValueError: the message names the module and what sits on it.
        """
        transformer = self.transformer
        passed_by = [("transformer_blocks", transformer.transformer_blocks), ("norm_out", transformer.norm_out)]
        for i, block in enumerate(transformer.transformer_blocks):
            prefix = f"transformer_blocks.{i}"
            passed_by.append((prefix, block))
            passed_by += ((f"{prefix}.{part}", block.get_submodule(part)) for part in self._passed_by(block))
        touched = [(name, module) for name, module in passed_by if not untouched(module)]
        if transformer._compiled_call_impl is not None:
            touched.insert(0, ("transformer", transformer))
        if touched:
            name, module = touched[0]
            raise ValueError(
                f"{name}: has {_touch(module)}, which would not run: blocks are taken apart into their branches. "
                "Compile or hook the branches (attn1, attn2, ff) instead; to offload the model, use "
                "enable_model_cpu_offload")


def untouched(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward and nothing else."""
    return not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks or module._compiled_call_impl is not None
                or "forward" in module.__dict__)  # how accelerate and diffusers' own hooks come in


def _touch(module: nn.Module) -> str:
    if module._compiled_call_impl is not None:
        return "been compiled"
    return "a replaced forward (offloading or another hook)" if "forward" in module.__dict__ else "hooks"


def writable(linear: nn.Module) -> bool:
    """Whether this is exactly nn.Linear, so that its weight may be used in its place: no LoRA, quantization or hook."""
    return type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and untouched(linear)


def _is_linear_gelu(module: nn.Module) -> bool:
    """Whether it is exactly a linear layer with bias and the tanh form of the GELU."""
    return (type(module) is GELU and module.approximate == "tanh" and untouched(module) and writable(module.proj)
            and module.proj.bias is not None)


def write_linear(linear: nn.Linear, h: Tensor, out: Tensor) -> None:
    """The linear layer of h [B, N, ·] written straight into `out`, a contiguous cache buffer."""
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
    """The output in the form that diffusers gives it."""
    return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def attention_options(cross_attention_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """diffusers' `cross_attention_kwargs` as every attention gets them.

    Raises:
        ValueError: they ask for GLIGEN, which neither model has.
    """
    options = dict(cross_attention_kwargs or {})
    if options.pop("gligen", None) is not None:
        raise ValueError("cross_attention_kwargs: has 'gligen', but this model has no such layer")
    return options
