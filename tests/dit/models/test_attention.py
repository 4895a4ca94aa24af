"""The back ends of a DiT's attention, and their refusals."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

import harmonica_dit
import harmonica_kernels as hk
from harmonica_dit.models import DiT, dit
from support.plain_dit import PlainDiT

SMALL = dict(input_size=8, patch_size=2, in_channels=2, hidden_size=24, depth=3, num_heads=3, num_classes=5)


def test_xformers(monkeypatch):
    """By name; it is given [B, N, heads, D/heads]. Here a stand-in, for the package itself needs a GPU."""
    seen = []

    def memory_efficient_attention(q, k, v):
        seen.append(q.shape)
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhnm,bmhd->bnhd", weights.softmax(-1), v)

    ops = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    plain = PlainDiT(**SMALL).eval().requires_grad_(False)
    for p in plain.parameters():
        p.normal_(std=0.2)
    net = DiT(**SMALL, attention="xformers").eval().requires_grad_(False)
    net.load_state_dict(plain.state_dict())
    x, t, y = torch.randn(4, 2, 8, 8), torch.randint(0, 1000, (4,)), torch.arange(4)
    with torch.no_grad():
        torch.testing.assert_close(net(x, t, y, cache=hk.FeatureCache()), plain(x, t, y), rtol=1e-4, atol=1e-4)
    assert seen == [(4, 16, 3, 8)] * 3
    with pytest.raises(ValueError, match="attention: xformers needs a CUDA device, got cpu"):
        harmonica_dit.load("fashion-dit", attention="xformers")


def test_back_ends_without_a_kernel_are_refused_at_load(monkeypatch):
    """Here flash attention, on the CPU in float32; xformers has none if it was built for another PyTorch."""
    with pytest.raises(ValueError, match="attention: cudnn cannot run torch.float32 on cpu .*leave the default, sdpa"):
        harmonica_dit.load("fashion-dit", attention="cudnn")

    def no_operator(*_):
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward` with inputs:\n query")

    monkeypatch.setattr(dit, "attention_back_end", lambda name: no_operator)
    with pytest.raises(ValueError, match="attention: flash .*: No operator found .*with inputs:; leave the default"):
        harmonica_dit.load("fashion-dit", attention="flash")

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dit, "attention_back_end", lambda name: no_memory)
    with pytest.raises(torch.OutOfMemoryError):  # which another back end would not help
        harmonica_dit.load("fashion-dit", attention="flash")


def test_attention_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.delitem(sys.modules, "xformers.ops", raising=False)
    with pytest.raises(ImportError, match='"xformers" needs the package xformers .*"sdpa"'):
        DiT(**SMALL, attention="xformers")
    with pytest.raises(ValueError, match="attention: got 'fast', expected one of 'sdpa', 'flash'"):
        DiT(**SMALL, attention="fast")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["sdpa", "flash", "cudnn", "xformers"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_back_ends_on_a_gpu(name, dtype):
    """DiT-XL's head dim, 72, included."""
    if name == "xformers":
        pytest.importorskip("xformers.ops")
        try:
            harmonica_dit.load("fashion-dit", attention=name, dtype=dtype, device="cuda")
        except ValueError as error:
            assert "attention: xformers cannot run" in str(error)
            pytest.skip(str(error))
    for d in (64, 72):
        qkv = torch.randn(2, 50, 3, 4, d, device="cuda", dtype=dtype)
        q, k, v = qkv.unbind(2)
        want = F.scaled_dot_product_attention(*(part.double().transpose(1, 2) for part in (q, k, v))).transpose(1, 2)
        torch.testing.assert_close(dit.attention_back_end(name)(q, k, v).double(), want, rtol=0.02, atol=0.02)
