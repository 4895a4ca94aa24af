"""torch's counts of a DiT-XL/2 at 256 pixels, beside a formula and beside fvcore's.

Here a multiplication and the addition of its product are two FLOPs. fvcore, and the DiT paper, count them as one.
"""

import warnings

import pytest
import torch

from harmonica_dit.flops import count_flops, flop_counter
from harmonica_dit.models import CONFIGS, DiT
from support.plain_dit import PlainDiT

CONFIG = CONFIGS["DiT-XL/2"] | dict(input_size=32, in_channels=4)
N, D, PATCH, C = 256, 1152, 2, 4  # tokens, width, patch side, latent channels; the output has 2·C, for the variance
ATTENTION = 4 * N * D**2 + 2 * N**2 * D  # multiply-adds: q, k, v and projection; q·k and weights·v
MLP = 8 * N * D**2
ADALN = 6 * D**2  # of a block
ENDS = N * PATCH**2 * C * D + 256 * D + D**2 + 2 * D**2 + N * D * PATCH**2 * 2 * C  # patches, timestep, final layer


def make(cls, depth: int, device: str = "cpu"):
    """With whatever the memory holds as weights; on "meta" none."""
    with torch.device("meta"):
        net = cls(**CONFIG | dict(depth=depth)).requires_grad_(False)
    return net if device == "meta" else net.to_empty(device=device)


@pytest.mark.parametrize("depth", [1, 2])
def test_torch_counts_what_the_formula_says(depth):
    flops = count_flops(make(DiT, depth))
    assert flops.branches == (2.0 * ATTENTION, 2.0 * MLP) * depth
    assert flops.fixed == 2.0 * (ENDS + depth * ADALN)


def test_half_of_the_whole_model_is_what_the_paper_says():
    """118.6 Gflops: Peebles & Xie, "Scalable Diffusion Models with Transformers" (ICCV 2023)."""
    label = torch.zeros(1, dtype=torch.long, device="meta")
    with flop_counter() as counter:
        make(PlainDiT, 28, "meta")(torch.zeros(1, C, 32, 32, device="meta"), label, label)
    assert counter.get_total_flops() == 2 * (ENDS + 28 * (ATTENTION + MLP + ADALN))
    assert round(counter.get_total_flops() / 2e9, 1) == 118.6


def test_fvcore_counts_the_same_multiply_adds():
    """Of one block. It counts norms beside them, 4 for each value, and has to be told of the fused attention."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit, which it uses
        fvcore = pytest.importorskip("fvcore.nn")
        net = make(PlainDiT, 1)  # tracing does not work on "meta"
        label = torch.zeros(1, dtype=torch.long)
        analysis = fvcore.FlopCountAnalysis(net, (torch.zeros(1, C, 32, 32), label, label))
        analysis.set_op_handle("aten::scaled_dot_product_attention", attention)
        analysis.unsupported_ops_warnings(False)
        found = dict(analysis.by_operator())
    assert found.pop("layer_norm") == 3 * N * D * 4
    assert 2.0 * sum(found.values()) == count_flops(make(DiT, 1)).total
    assert found["scaled_dot_product_attention"] == 2 * N**2 * D


def attention(inputs, outputs) -> int:
    """Multiply-adds of q·kᵀ and of the weights with v, for q and k [B, heads, tokens, D / heads]."""
    (B, heads, n, d), (_, _, m, _) = (value.type().sizes() for value in inputs[:2])
    return 2 * B * heads * n * m * d
