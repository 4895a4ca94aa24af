"""Quantized copies: what is quantized, what it weighs and costs, and that a cache runs on it."""

import builtins

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from harmonica_dit.flops import count_flops
from harmonica_dit.methods import fora, trunk_forecast
from harmonica_dit.models import DiT, quantize, quantized, weight_bytes
from harmonica_dit.sample import sample
from support.pipeline_folders import random_model

torchao = pytest.importorskip("torchao.quantization")
SIZES = dict(input_size=8, patch_size=2, in_channels=2, hidden_size=32, depth=2, num_heads=2, num_classes=4)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = DiT(**SIZES, name="tiny").eval().requires_grad_(False)
    for p in net.parameters():
        p.normal_(std=0.2)
    return net


@pytest.mark.parametrize("kind, bound", [("int8", 0.05), ("int8-dynamic", 0.1), ("int4", 0.5)])
def test_a_quantized_copy_samples_with_and_without_a_cache(net, kind, bound):
    made, before = quantize(net, kind), {n: p.clone() for n, p in net.named_parameters()}
    for schedule in (None, fora(net, 6, 2), fora(made, 6, 2, 1), trunk_forecast(made, 6, every=2)):
        exact, found = (sample(model, [0, 3], steps=6, schedule=schedule) for model in (net, made))
        assert 1e-5 < (found - exact).norm() / exact.norm() < bound
    assert all(torch.equal(p, before[n]) and type(p) is torch.nn.Parameter for n, p in net.named_parameters())


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic", "int4"])
def test_no_product_is_saved(net, kind):
    assert count_flops(quantize(net, kind)) == count_flops(net)


def test_what_is_stored():
    """Of [out, in] weights in int8: a byte each, and a float32 scale a row; biases and all else stay."""
    net = DiT(**SIZES).requires_grad_(False)
    rows = 2 * (3 * 32 + 32 + 4 * 32 + 32 + 6 * 32)  # of qkv, proj, fc1, fc2 and the modulation, in two blocks
    weights = 2 * (3 * 32 * 32 + 32 * 32 + 2 * 4 * 32 * 32 + 6 * 32 * 32)
    plain = sum(p.numel() * 4 for p in net.parameters())
    assert weight_bytes(net) == plain
    scales = {"int8": 4 * rows, "int8-dynamic": 4 * rows}
    for kind, more in scales.items():
        assert plain - 3 * weights + more <= weight_bytes(quantize(net, kind)) <= plain - 3 * weights + 5 * rows


def test_the_linears_of_the_blocks_alone_are_quantized(net):
    for model, inside, outside in ((net, "blocks.1.adaLN_modulation.1", "t_embedder.mlp.0"),
                                   (random_model(PixArtTransformer2DModel, {}), "transformer_blocks.0.attn1.to_q",
                                    "proj_out")):
        made = quantize(model, "int8")
        assert type(made.get_submodule(inside).weight) is not torch.nn.Parameter
        assert type(made.get_submodule(outside).weight) is torch.nn.Parameter


def test_weights_that_are_left_as_they_are_are_refused(monkeypatch):
    config = torchao.Int4WeightOnlyConfig(group_size=128)  # torchao leaves what its groups do not fit
    monkeypatch.setitem(quantized.KINDS, "int4-packed", lambda width: config)
    with pytest.raises(ValueError, match="kind: 'int4-packed' does not fit blocks.0.attn.qkv, 36 wide"):
        quantize(DiT(**SIZES | dict(hidden_size=36)), "int4-packed")


def test_unknown_kinds_and_a_missing_package_are_named(net, monkeypatch):
    with pytest.raises(ValueError, match="kind: got 'int3', expected one of int8, int8-dynamic, int4,"):
        quantize(net, "int3")
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("torchao"):
            raise ImportError("No module named 'torchao'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="'int8' needs the package torchao"):
        quantize(net, "int8")
