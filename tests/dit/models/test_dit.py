"""The DiT through `cached_forward` equals the plain one, and loads facebookresearch's layout."""

import argparse
import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import harmonica_dit
import harmonica_kernels as hk
import harmonica_kernels.ops as ops
from harmonica_dit.files import save_tensors
from harmonica_dit.flops import count_flops, replace_bodies
from harmonica_dit.load import read_weights
from harmonica_dit.models import DiT, dit, feed_forward
from harmonica_dit.sample import Trajectory, denoise
from harmonica_dit.train.frozen_model import checkpoint_bodies
from support.plain_dit import PlainDiT

SMALL = dict(input_size=8, patch_size=2, in_channels=2, hidden_size=24, depth=3, num_heads=3, num_classes=5)


def pair(**changes):
    """A plain DiT with random weights and the DiT that loaded its state dict."""
    plain = PlainDiT(**(SMALL | changes)).eval().requires_grad_(False)
    for p in plain.parameters():
        p.normal_(std=0.2)
    net = DiT(**(SMALL | changes)).eval().requires_grad_(False)
    net.load_state_dict(plain.state_dict())
    return plain, net


def inputs(B=4):
    return torch.randn(B, 2, 8, 8), torch.randint(0, 1000, (B,)), torch.arange(B) % 6


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_nothing_reused_equals_the_plain_model(learn_sigma, grad):
    plain, net = pair(learn_sigma=learn_sigma)
    x, t, y = inputs()
    with torch.set_grad_enabled(grad):
        expected = plain(x, t, y)
        cache = hk.FeatureCache()
        for options in ({}, dict(cache=cache), dict(cache=cache, row=(True,) * 6)):
            torch.testing.assert_close(net(x, t, y, **options), expected, rtol=1e-4, atol=1e-4)


def test_trains_like_the_plain_model():
    """Gradients of every parameter: the recipe trains through the same call that serves."""
    plain, net = pair()
    x, t, y = inputs()
    for model in (plain, net):
        model.requires_grad_(True)
        model(x, t, y).square().mean().backward()
    for p, q in zip(plain.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4)


def test_a_reused_branch_keeps_its_new_gate():
    """adaLN's residual gate follows the present timestep although the branch's output is the old one."""
    plain, net = pair()
    x, t, y = inputs()
    cache = hk.FeatureCache()
    net(x, t, y, cache=cache)
    now = net(x, t - 1, y, cache=cache, row=(True, False) * 3)
    other = net(x, (t + 400) % 1000, y, cache=cache, row=(False,) * 6)
    again = net(x, t - 1, y, cache=cache, row=(False,) * 6)
    assert (now - other).abs().max() > 1e-3
    torch.testing.assert_close(again, now, rtol=1e-4, atol=1e-4)  # the outputs computed a line ago, the same row's


@torch.no_grad()
def test_a_cache_of_another_dit():
    """Refused, also of a copy; bodies that are replaced for a while are no other model."""
    (_, a), (_, b), cache, row = pair(), pair(), hk.FeatureCache(), (False,) * 6
    step = inputs()
    expected = a(*step, cache=cache)
    for other in (b, copy.deepcopy(a)):
        for options in (dict(row=row), {}):
            with pytest.raises(ValueError, match="cache: holds a forward of DiT 'DiT' at .*, got one of DiT 'DiT' at"):
                other(*step, cache=cache, **options)
    for replaced in (checkpoint_bodies(a), replace_bodies(a, lambda k, body: lambda h, context: body(h, context))):
        with replaced:
            assert torch.equal(a(*step, cache=cache, row=row), expected)
    count_flops(a)
    assert torch.equal(a(*step, cache=cache, row=row), expected)


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
def test_hoisted_modulation(monkeypatch, at_once):
    """Of all steps together, or of slices of them: as found step by step, and of reused branches the gate alone."""
    _, net = pair()
    x, _, y = inputs()
    t = torch.tensor([999, 500, 30, 7, 0])
    table = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    monkeypatch.setattr(dit, "HOISTED", at_once * 4 * (3 * 6 + 2) * 24 * x.element_size())
    sizes, modulations = [], net.modulations
    monkeypatch.setattr(net, "modulations", lambda c, rows: sizes.append(len(c)) or modulations(c, rows))
    for rows in ([None] * 5, [None, *(tuple(row) for row in table[1:].tolist())]):
        sizes.clear()
        hoisted = list(net.hoist(t, y, rows))
        assert max(sizes) == min(at_once, 5) and sum(sizes) == 5
        caches = [hk.FeatureCache(), hk.FeatureCache()]
        for s, (row, precomputed) in enumerate(zip(rows, hoisted, strict=True)):
            mod = precomputed["modulation"]
            assert [r is not None for r in mod.shift] == [*(row or (True,) * 6), True]
            assert [r is None for r in mod.scale] == [r is None for r in mod.shift]
            now, again = t[s].expand(4), torch.zeros(4, dtype=torch.long)  # t and y are not read with a modulation
            want = net(x, now, y, row=row, cache=caches[0])
            got = net(x, again, again, row=row, cache=caches[1], **precomputed)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_reused_step_takes_no_memory_for_shift_and_scale():
    _, net = pair()
    _, _, y = inputs()
    t, rows = torch.arange(8), [None] + [(False,) * 6] * 7
    found = [precomputed["modulation"] for precomputed in net.hoist(t, y, rows)]
    storages = {row.untyped_storage().data_ptr(): row.untyped_storage().nbytes()
                for mod in found for part in mod for row in part if row is not None}
    assert sum(storages.values()) == 4 * 24 * (18 + 7 * 6 + 8 * 2) * 4


def test_bad_rows():
    _, net = pair()
    x, t, y = inputs()
    cache = hk.FeatureCache()
    net(x, t, y, cache=cache)
    for row in ((True,), (False,) * 7):
        with pytest.raises(ValueError, match=f"row: got {len(row)} entries, expected 6"):
            net(x, t, y, cache=cache, row=row)


def test_bfloat16_weights():
    """A model in bfloat16 samples from float32 noise."""
    plain, net = pair(learn_sigma=False)
    exact = harmonica_dit.sample(net, [0, 1, 2], steps=3)
    images = harmonica_dit.sample(net.bfloat16(), [0, 1, 2], steps=3)
    assert images.dtype == torch.float32 and (images - exact).norm() / exact.norm() < 0.1


def test_flops():
    """Counted by torch; here by hand."""
    _, net = pair()
    flops, N, D = count_flops(net), 16, 24
    attention = 2 * N * D * 4 * D + 2 * 2 * N * N * D
    assert flops.branches == (float(attention), float(2 * N * D * 4 * D * 2)) * 3
    embed = 2 * N * (2 * 2 * 2) * D
    rows = 2 * D * (256 + D) + 3 * 2 * D * 6 * D + 2 * D * 2 * D
    assert flops.fixed == embed + rows + 2 * N * D * (2 * 2 * 4)


def test_loads_facebookresearch_layout(tmp_path):
    """DiT-S/8 weights under the published names, from .pt (plain or with ema) and safetensors."""
    plain = PlainDiT(32, 8, 4, 384, 12, 6)
    torch.save(plain.state_dict(), tmp_path / "a.pt")
    torch.save({"ema": plain.state_dict(), "args": argparse.Namespace(lr=1e-4)}, tmp_path / "b.pt")
    save_file(plain.state_dict(), tmp_path / "c.safetensors", {"format": "pt"})
    for name in ("a.pt", "b.pt", "c.safetensors"):
        net = harmonica_dit.load("DiT-S/8", tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), plain.state_dict().values()))
    keys = set(net.state_dict())
    assert {"x_embedder.proj.weight", "t_embedder.mlp.2.bias", "y_embedder.embedding_table.weight", "pos_embed",
            "blocks.11.attn.qkv.weight", "blocks.0.mlp.fc1.bias", "blocks.0.adaLN_modulation.1.weight",
            "final_layer.linear.weight", "final_layer.adaLN_modulation.1.bias"} <= keys


def test_hostile_checkpoints(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"w": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match="trap.pt"):
        read_weights(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(ValueError, match="cut.safetensors"):
        read_weights(tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError):
        harmonica_dit.load("DiT-S/8", tmp_path / "none.pt")
    with pytest.raises(ValueError, match="checkpoint"):
        harmonica_dit.load("DiT-XL/2")
    with pytest.raises(ValueError, match="name: got"):
        harmonica_dit.load("nothing")
    save_tensors(tmp_path / "other.safetensors", {"w": torch.zeros(3)}, {})
    with pytest.raises(ValueError, match="does not fit DiT-S/8"):
        harmonica_dit.load("DiT-S/8", tmp_path / "other.safetensors")


@pytest.fixture
def gelu_calls(monkeypatch):
    """The calls of bias_gelu."""
    calls, op = [], ops.bias_gelu
    monkeypatch.setattr(ops, "bias_gelu", lambda *args: calls.append(1) or op(*args))
    return calls


@pytest.mark.parametrize("autocast", [False, True])
def test_bias_and_gelu_are_one_pass_where_there_is_a_kernel(gelu_calls, autocast, monkeypatch):
    """In bodies that return and in those that write into the cache; where a gradient is wanted, on the CPU."""
    plain, net = pair()
    x, t, y = inputs()
    tolerance = 2e-1 if autocast else 1e-4
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            expected, cache = plain(x, t, y), hk.FeatureCache()
            row = (True,) * 5 + (False,)
            for calls, options in ((3, {}), (6, dict(cache=cache)), (8, dict(cache=cache, row=row))):
                torch.testing.assert_close(net(x, t, y, **options).float(), expected.float(), rtol=tolerance,
                                           atol=tolerance)
                assert len(gelu_calls) == calls
        net(x, t, y)
        assert len(gelu_calls) == 11
        monkeypatch.setattr(feed_forward, "SLOW", ())
        net(x, t, y)
        assert len(gelu_calls) == 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_forward_has_the_same_bits_where_a_gradient_is_wanted(dtype):
    linear, h = torch.nn.Linear(24, 33).to(dtype), torch.randn(2, 5, 24, dtype=dtype)
    with torch.no_grad():
        expected = feed_forward.linear_gelu(linear, h)
    found = feed_forward.linear_gelu(linear, h.requires_grad_())
    assert torch.equal(found.detach(), expected) and not torch.equal(expected, F.gelu(linear(h)))
    weights = torch.randn_like(found)
    gradients = torch.autograd.grad((found * weights).sum(), (h, *linear.parameters()))
    plain = torch.autograd.grad((F.gelu(linear(h), approximate="tanh") * weights).sum(), (h, *linear.parameters()))
    for a, b in zip(gradients, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    if dtype == torch.float64:
        given = [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((2, 3, 5), (5,))]
        assert torch.autograd.gradcheck(feed_forward.BiasGelu.apply, given)


def test_gradients_under_autocast():
    """The product is in bfloat16, the bias in float32."""
    linear, h = torch.nn.Linear(24, 33), torch.randn(2, 5, 24, requires_grad=True)
    found = []
    for kernel in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            made = feed_forward.linear_gelu(linear, h) if kernel else F.gelu(linear(h), approximate="tanh")
        assert made.dtype == torch.bfloat16
        found.append(torch.autograd.grad(made.float().square().sum(), (h, *linear.parameters())))
    for a, b in zip(*found, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.03 * b.norm()


def test_bias_and_gelu_are_part_of_the_product_where_it_takes_them(monkeypatch):
    """On CUDA, where that function's GELU is the tanh form. Here a stand-in: on the CPU it is the exact one."""
    calls = []

    def product(bias, h, weight, use_gelu):
        calls.append(1)
        assert use_gelu and h.dim() == 2
        return F.gelu(torch.addmm(bias, h, weight), approximate="tanh")

    monkeypatch.setattr(feed_forward, "EPILOGUE", ("cpu",))
    monkeypatch.setattr(feed_forward, "SLOW", ())
    monkeypatch.setattr(torch, "_addmm_activation", product)
    plain, net = pair()
    x, t, y = inputs()
    with torch.no_grad():
        torch.testing.assert_close(net(x, t, y), plain(x, t, y), rtol=1e-4, atol=1e-4)
        assert len(calls) == 3
        net(x, t, y, cache=hk.FeatureCache())
        assert len(calls) == 6, "also in bodies that write into the cache"
        with torch.autocast("cpu", torch.bfloat16):
            assert feed_forward.linear_gelu(net.blocks[0].mlp.fc1, torch.randn(4, 2, 24)).dtype == torch.bfloat16
        net.blocks[0].mlp.fc1.register_forward_hook(lambda *_: None)
        net.double()(x, t, y)
        net.float()(x, t, y)
    net(x, t, y)
    assert len(calls) == 8, "of layers without a hook, in float32, without autocast and grad"


def test_the_fused_feed_forward_compiles(gelu_calls):
    _, net = pair()
    x, t, y = inputs()
    with torch.no_grad():
        expected = net(x, t, y)
        got = torch.compile(net, fullgraph=True, backend="aot_eager")(x, t, y)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_fused_feed_forward_in_a_gated_trajectory(gelu_calls):
    _, net = pair(learn_sigma=False)
    net.guidance_channels = 2
    noise = torch.randn(2, 2, 8, 8)

    def trajectory():
        return Trajectory(net, torch.tensor([0, 3]), steps=4)

    images = hk.compile(denoise, mode="gated")(trajectory(), noise)
    assert len(gelu_calls) >= 4 * 3
    torch.testing.assert_close(images, denoise(trajectory(), noise), rtol=1e-3, atol=1e-3)
