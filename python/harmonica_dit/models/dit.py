"""The diffusion transformer of Peebles & Xie (ICCV 2023), run branch by branch through `cached_forward`.

Parameters are named as in facebookresearch/DiT, so its checkpoints load as they are.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import harmonica_kernels as hk


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def mix(self, h: Tensor) -> Tensor:
        """Everything before the last linear: [B, N, D] -> [B, N, D]."""
        B, N, D = h.shape
        q, k, v = self.qkv(h).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D)

    def forward(self, h: Tensor, context=None) -> Tensor:
        return self.proj(self.mix(h))

    def forward_out(self, h: Tensor, context, out: Tensor) -> None:
        _linear_out(self.proj, self.mix(h), out)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, h: Tensor, context=None) -> Tensor:
        return self.fc2(F.gelu(self.fc1(h), approximate="tanh"))

    def forward_out(self, h: Tensor, context, out: Tensor) -> None:
        _linear_out(self.fc2, F.gelu(self.fc1(h), approximate="tanh"), out)


def _linear_out(linear: nn.Linear, h: Tensor, out: Tensor) -> None:
    """The linear layer written straight into `out`, a cache buffer."""
    torch.addmm(linear.bias, h.flatten(0, 1), linear.weight.t(), out=out.flatten(0, 1))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.half = frequencies // 2

    def forward(self, t: Tensor) -> Tensor:
        rates = torch.exp(-math.log(10000) * torch.arange(self.half, dtype=torch.float32, device=t.device) / self.half)
        angles = t[:, None].float() * rates  # [B, 128]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1).to(self.mlp[0].weight.dtype))


class PatchEmbedder(nn.Module):
    def __init__(self, patch: int, channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # [B, C, H, W] -> [B, N, D]


class LabelEmbedder(nn.Module):
    def __init__(self, classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)  # the last row: no label

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class DiT(nn.Module):
    """A class-conditional diffusion transformer; two branches a block, attention and feed-forward.

    Args:
        input_size: side of the square image or latent.
        patch_size: side of a patch; N = (input_size / patch_size)² tokens.
        in_channels: channels of the image or latent.
        hidden_size, depth, num_heads, mlp_ratio: the transformer's.
        num_classes: labels 0..num_classes-1; num_classes itself stands for "no label".
        learn_sigma: whether the output has as many channels again for the variance.
        name: what routers trained on this model call it.
    """

    guidance, guidance_channels, scheduler = 1.5, 3, "ddim"  # the reference's, where a trajectory is not told others

    def __init__(self, input_size: int = 32, patch_size: int = 2, in_channels: int = 4, hidden_size: int = 1152,
                 depth: int = 28, num_heads: int = 16, mlp_ratio: float = 4.0, num_classes: int = 1000,
                 learn_sigma: bool = True, name: str = "DiT"):
        super().__init__()
        self.name = name
        self.sample_shape = (in_channels, input_size, input_size)
        self.num_classes = num_classes
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.patch, self.grid = patch_size, input_size // patch_size
        self.tokens = self.grid**2
        self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)
        self.branches = [branch for block in self.blocks for branch in (
            hk.Branch(block.attn, block.attn.forward_out), hk.Branch(block.mlp, block.mlp.forward_out))]

    @property
    def branch_names(self) -> tuple[str, ...]:
        """The K branches in execution order."""
        return tuple(f"blocks.{i}.{part}" for i in range(len(self.blocks)) for part in ("attn", "mlp"))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, *, gate: Sequence[bool] | Tensor | None = None,
                extrapolate: Sequence[float] | Tensor | None = None, cache: hk.FeatureCache | None = None,
                threshold: float = 0.1) -> Tensor:
        """The model's output [B, C_out, H, W] for x [B, C, H, W] at timesteps t [B] with labels y [B].

        gate, extrapolate, cache, threshold: as in `harmonica_kernels.cached_forward`.
        """
        condition = F.silu(self.t_embedder(t) + self.y_embedder(y))
        tokens = self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed
        tokens = hk.cached_forward(self.branches, tokens, self.modulation(condition, gate), gate=gate,
                                   extrapolate=extrapolate, cache=cache, threshold=threshold)
        g, p = self.grid, self.patch
        out = self.final_layer.linear(tokens).view(-1, g, g, p, p, self.out_channels)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, g * p, g * p)

    def modulation(self, condition: Tensor, gate: Sequence[bool] | Tensor | None = None) -> hk.Modulation:
        """adaLN-Zero rows for the activated condition [B, D]; of a branch that a hard row reuses, only the gate."""
        linears = [block.adaLN_modulation[1] for block in self.blocks]
        hard = gate is not None and not isinstance(gate, Tensor)
        D = condition.shape[1]
        shift, scale, gates = [], [], []
        for k in range(len(self.branches)):
            linear, end = linears[k // 2], 3 * D * (k % 2 + 1)  # a branch's rows: shift, scale, gate
            reused = hard and k < len(gate) and not gate[k]  # cached_forward refuses a row of another length
            first = end - D if reused else end - 3 * D
            rows = F.linear(condition, linear.weight[first:end], linear.bias[first:end]).split(D, 1)
            shift.append(rows[-3] if len(rows) == 3 else None)
            scale.append(rows[-2] if len(rows) == 3 else None)
            gates.append(rows[-1])
        final_shift, final_scale = self.final_layer.adaLN_modulation[1](condition).chunk(2, 1)
        return hk.Modulation([*shift, final_shift], [*scale, final_scale], gates)
