"""The diffusion transformer of Peebles & Xie (ICCV 2023), run branch by branch through `cached_forward`.

Parameters are named as in facebookresearch/DiT, so its checkpoints load as they are.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import harmonica_kernels as hk

from .adaln import add_block, linear_of
from .feed_forward import linear_gelu
from .plain_modules import BlockPart, has_own_forward, is_plain, is_steady, write_linear

HOISTED = 256 << 20  # at most so many bytes of modulation rows are computed ahead of their steps
CONFIGS = {f"DiT-{size}/{patch}": dict(hidden_size=width, depth=depth, num_heads=heads, patch_size=patch)
           for size, width, depth, heads in (("XL", 1152, 28, 16), ("L", 1024, 24, 16), ("B", 768, 12, 12),
                                             ("S", 384, 12, 6))
           for patch in (2, 4, 8)}


SDPA = {"sdpa": None, "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def _sdpa(only: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with nullcontext() if only is None else sdpa_kernel(only):
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def attention_back_end(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The function that computes attention: q, k, v [B, N, heads, D/heads] -> [B, N, heads, D/heads].

    "sdpa" is PyTorch's, which chooses between flash attention, cuDNN and its own; "flash" and "cudnn" are that one
    alone, on a GPU; "xformers" is `memory_efficient_attention` of the package of that name.

    Raises:
        ValueError: there is no such back end. ImportError: xformers is not installed.
    """
    if name in SDPA:
        return partial(_sdpa, SDPA[name])
    if name == "xformers":
        try:
            from xformers.ops import memory_efficient_attention
        except ImportError as error:
            raise ImportError(f'attention: "xformers" needs the package xformers ({error}); install it, or use the '
                              'default, "sdpa"') from error
        return memory_efficient_attention
    raise ValueError(f'attention: got {name!r}, expected one of {", ".join(map(repr, (*SDPA, "xformers")))}')


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, back_end: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.heads, self.back_end = heads, back_end
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def mix(self, h: Tensor) -> Tensor:
        """Everything before the last linear: [B, N, D] -> [B, N, D], or narrower where heads have been pruned."""
        B, N, _ = h.shape
        q, k, v = self.qkv(h).view(B, N, 3, self.heads, -1).unbind(2)
        return self.back_end(q, k, v).reshape(B, N, -1)

    def forward(self, h: Tensor, context=None) -> Tensor:
        return self.proj(self.mix(h))

    def forward_out(self, h: Tensor, out: Tensor) -> None:
        """Writes forward(h) into `out`, a cache buffer."""
        write_linear(self.proj, self.mix(h), out)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, h: Tensor, context=None) -> Tensor:
        return self.fc2(linear_gelu(self.fc1, h))

    def forward_out(self, h: Tensor, out: Tensor) -> None:
        """Writes forward(h) into `out`, a cache buffer."""
        write_linear(self.fc2, linear_gelu(self.fc1, h), out)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float, back_end: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.attn = Attention(width, heads, back_end)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))


class Body(BlockPart):
    """The body of a branch: a block's `attn` or `mlp`."""

    def __call__(self, h: Tensor, context=None) -> Tensor:
        return self.module(h)

    def write(self, h: Tensor, context, out: Tensor) -> None:
        """Writes the output into `out`, a cache buffer. It is copied there if something has been put on the module."""
        module = self.module
        if type(module) in (Attention, Mlp) and has_own_forward(module):
            module.forward_out(h, out)
        else:
            out.copy_(module(h))


def _float_dtype(module: nn.Module) -> torch.dtype:
    """That of its first parameter of a float type: a quantized layer's weight may be integers, or no tensor at all."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.size = frequencies // 2

    def forward(self, t: Tensor) -> Tensor:
        rates = torch.exp(-math.log(10000) * torch.arange(self.size, dtype=torch.float32, device=t.device) / self.size)
        angles = t[:, None].float() * rates  # [B, 128]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1).to(_float_dtype(self.mlp)))


class PatchEmbedder(nn.Module):
    def __init__(self, patch: int, channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] of any float dtype -> [B, N, D] in the weights'.

        One pass casts and cuts into patches. Then a matrix product, whose rows are dense: those of a convolution are
        not, and each later pass would have to copy them.
        """
        proj = self.proj
        dtype = _float_dtype(proj)
        if not is_plain(proj, nn.Conv2d):
            return proj(x.to(dtype)).flatten(2).transpose(1, 2)
        (B, C, *_), p = x.shape, proj.stride[0]
        patches = x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)  # [B, H/p, W/p, C, p, p]
        patches = patches.to(dtype, memory_format=torch.contiguous_format).reshape(B, -1, C * p * p)
        return F.linear(patches, proj.weight.flatten(1), proj.bias)


class LabelEmbedder(nn.Module):
    def __init__(self, classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)  # the last row: no label

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class DiT(nn.Module):
    """A class-conditional diffusion transformer; two branches a block, attention and feed-forward.

    What is put on its parts is honoured with every cache and schedule: LoRA, quantization and hooks on `attn`, `mlp`,
    `adaLN_modulation` and what is inside them, and other modules or blocks in their places. Only a hook on a block or
    on `final_layer` never runs, because these are not called as modules.

    Args:
        input_size: side of the square image or latent.
        patch_size: side of a patch; N = (input_size / patch_size)² tokens.
        in_channels: channels of the image or latent.
        hidden_size, depth, num_heads, mlp_ratio: width D, number of blocks, attention heads, width of the
            feed-forward's hidden values / D.
        num_classes: labels are 0..num_classes-1; num_classes itself stands for "no label".
        learn_sigma: whether the output has in_channels more channels, for the variance.
        name: routers trained on this model record it.
        attention: back end, see `attention_back_end`.
    """

    guidance, guidance_channels, scheduler = 1.5, 3, "ddim"  # the reference's; the defaults of trajectories
    branches: list[hk.Branch]

    def __init__(self, input_size: int = 32, patch_size: int = 2, in_channels: int = 4, hidden_size: int = 1152,
                 depth: int = 28, num_heads: int = 16, mlp_ratio: float = 4.0, num_classes: int = 1000,
                 learn_sigma: bool = True, name: str = "DiT", attention: str = "sdpa"):
        super().__init__()
        self.name = name
        self.sample_shape = (in_channels, input_size, input_size)
        self.num_classes = num_classes
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.patch, self.grid = patch_size, input_size // patch_size
        self.tokens, self.width = self.grid**2, hidden_size
        self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2, hidden_size), requires_grad=False)
        back_end = attention_back_end(attention)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio, back_end) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)

    def __setattr__(self, name: str, value) -> None:
        super().__setattr__(name, value)
        if name == "blocks":  # their bodies find modules in this very list
            bodies = [Body(value, i, part) for i in range(len(value)) for part in ("attn", "mlp")]
            self.branches = [hk.Branch(body, body.write) for body in bodies]

    @property
    def branch_names(self) -> tuple[str, ...]:
        """The K branches in execution order."""
        return tuple(f"blocks.{i}.{part}" for i in range(len(self.blocks)) for part in ("attn", "mlp"))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, *, row: Sequence[bool] | Tensor | bool | None = None,
                forecast_weights: Sequence[float] | Tensor | hk.TrunkWeights | None = None,
                cache: hk.FeatureCache | hk.TrunkCache | None = None, threshold: float = 0.1,
                modulation: hk.Modulation | None = None, condition: Tensor | None = None) -> Tensor:
        """The model's output [B, C_out, H, W] for x [B, C, H, W] at timesteps t [B] with labels y [B].

        row, forecast_weights, cache, threshold: as in `harmonica_kernels.cached_forward`.
        modulation: the one that `hoist` computed for t, y and row; None computes it here.
        condition: [D], added to the embedded timestep and label; see `harmonica_dit.forecaster.TrunkForecaster`.

        Raises:
            ValueError: blocks have been added or removed. Or an argument is not as it should be.
        """
        if 2 * len(self.blocks) != len(self.branches):
            raise ValueError(f"blocks: the list has {len(self.blocks)} now, but had {len(self.branches) // 2} when it "
                             "was set; set a new one, net.blocks = nn.ModuleList(...)")
        if modulation is None:
            embedded = self.t_embedder(t) + self.y_embedder(y)
            [modulation] = self.modulations((embedded if condition is None else embedded + condition)[None], [row])
        tokens = hk.cached_forward(self.branches, self.embed(x), modulation, row=row,
                                   forecast_weights=forecast_weights, cache=cache, threshold=threshold, model=self)
        return self.head(tokens)

    def embed(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, D], before the first branch."""
        own = type(self.x_embedder) is PatchEmbedder  # which casts by itself
        return self.x_embedder(x if own else x.to(self.pos_embed.dtype)) + self.pos_embed

    def head(self, tokens: Tensor) -> Tensor:
        """[B, N, D], after the final norm -> [B, C_out, H, W]."""
        g, p = self.grid, self.patch
        out = self.final_layer.linear(tokens).view(-1, g, g, p, p, self.out_channels)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, g * p, g * p)

    def hoist(self, t: Tensor, y: Tensor, rows: Sequence[Sequence[bool] | None],
              condition: Tensor | None = None) -> Iterator[dict]:
        """Computes the `modulation` arguments of `forward` for all T steps of a trajectory together.

        Each adaLN layer takes all steps as one matrix, so its weights are read once instead of T times. (The weights
        of these layers are a third of the model's.) If the modulation rows of all steps would take more than HOISTED
        bytes, the steps are cut into slices, and each slice is computed when its first step is asked for.

        If something has been put on these layers that may change between two steps (LoRA, a hook, another module),
        nothing is computed ahead; each forward computes its own modulation.

        Args:
            t: [T] timesteps. y: [B] labels, the same at every step.
            rows: the T hard rows, None where everything is computed, False where the trunk is forecast.
            condition: [T, D], added to the embedded timesteps and labels, or None.

        Yields:
            Further arguments of `forward`, step by step.
        """
        if not all(map(is_steady, (self.t_embedder, self.y_embedder, *self._adaln()))):
            yield from ({} if condition is None else {"condition": condition[s]} for s in range(len(rows)))
            return
        embedded = self.y_embedder(y)
        step_bytes = (3 * len(self.branches) + 2) * embedded.nbytes
        at_once = max(1, HOISTED // step_bytes)
        for first in range(0, len(rows), at_once):
            part = slice(first, first + at_once)
            times = self.t_embedder(t[part]) if condition is None else self.t_embedder(t[part]) + condition[part]
            for modulation in self.modulations(times[:, None] + embedded, rows[part]):
                yield {"modulation": modulation}

    def loop_parts(self, t: Tensor, y: Tensor, condition: Tensor) -> dict[str, Any]:
        """Of the arguments of a `harmonica_kernels.graphs.gated.Loop`, those that the model answers for.

        t: [T]. y: [B]. condition: [T, D], as in `hoist`; read whenever the loop's modulation is computed.
        """
        return dict(branches=self.branches, modulation=lambda: self._modulation_table(t, y, condition),
                    embed=self.embed, head=self.head)

    def _modulation_table(self, t: Tensor, y: Tensor, condition: Tensor) -> hk.Modulation:
        """The modulation rows of all T steps stacked, [T, B, D]."""
        embedded = (self.t_embedder(t) + condition)[:, None] + self.y_embedder(y)
        activated, *layers = F.silu(embedded), *self._adaln()
        made = [layer(embedded) if (linear := linear_of(layer)) is None else linear(activated) for layer in layers]
        parts, final = [part for six in made[:-1] for part in six.chunk(6, 2)], made[-1].chunk(2, 2)
        return hk.Modulation([*parts[::3], final[0]], [*parts[1::3], final[1]], parts[2::3])

    def modulations(self, condition: Tensor,
                    rows: Sequence[Sequence[bool] | Tensor | bool | None]) -> list[hk.Modulation]:
        """The adaLN-Zero modulations of S steps, from their embedded conditions [S, B, D] and decision rows.

        Where a hard row reuses a branch, shift and scale are None; only the gate is computed. Where the trunk is
        forecast (False), only the final norm's rows are.
        """
        S, K, activated = len(rows), len(self.branches), F.silu(condition)
        made = [hk.Modulation([None] * K, [None] * K, [None] * K) for _ in rows]
        run = [s for s in range(S) if rows[s] is not False]
        of_run, activated_of_run = condition, activated
        if len(run) < S and run:
            of_run, activated_of_run = (torch.stack([part[s] for s in run]) for part in (condition, activated))
        *layers, final = self._adaln()
        for i, layer in enumerate(layers if run else ()):
            computed = [[j for j, s in enumerate(run) if not _reuses(rows[s], k, K)] for k in (2 * i, 2 * i + 1)]
            add_block(made, i, run, computed, linear_of(layer), activated_of_run, partial(layer, of_run))
        for modulation, (shift, scale) in zip(made, zip(*final(condition).chunk(2, 2))):
            modulation.shift.append(shift)
            modulation.scale.append(scale)
        return made

    def _adaln(self) -> list[nn.Module]:
        """The layers that make the modulation, each with its activation: the blocks', and the final layer's."""
        return [*(block.adaLN_modulation for block in self.blocks), self.final_layer.adaLN_modulation]


def _reuses(row: Sequence[bool] | Tensor | None, k: int, K: int) -> bool:
    """Whether `row` is hard and reuses branch k; one of another length (of runs, or a wrong one) does not."""
    return isinstance(row, Sequence) and len(row) == K and not row[k]
