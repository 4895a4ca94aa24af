"""FLOPs and the trunk's size: counted on a denoiser, and of an adapter what its trace found."""

from types import SimpleNamespace

import pytest
import torch

from harmonica_dit.flops import Flops, count_flops, flop_counter, trunk_costs
from harmonica_dit.methods import fora, trunk_forecast, uncached
from harmonica_dit.models.dit import DiT
from harmonica_dit.pipelines.adapters.generic import GenericAdapter
from support.generic_models import make

METHODS = [lambda net: fora(net, 6, 2, 1), lambda net: fora(net, 6, speedup=1.5),
           lambda net: trunk_forecast(net, 6, every=2), lambda net: trunk_forecast(net, 6, speedup=1.5),
           lambda net: uncached(net, 6)]


@pytest.fixture(params=["stand-in", "GenericAdapter"])
def adapter(request):
    """Traced."""
    if request.param == "stand-in":
        flops, trunk_flops = Flops((300.0, 500.0), 201.0), Flops((400.0, 600.0), 1.0)
        return SimpleNamespace(branch_names=("a", "b"), name="it", architecture={}, flops=flops,
                               trunk_flops=trunk_flops, trunk_size=7, trunk_left_out="it is odd")
    transformer, arguments = make("WanTransformer3DModel")
    found = GenericAdapter(transformer)
    found.trace(**arguments)
    assert found.trunk_size == 12 * 24 and found.trunk_flops.total == found.flops.total
    assert found.trunk_flops.fixed <= found.flops.fixed
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_method_takes_a_traced_adapter(adapter, method):
    made = method(adapter)
    assert (made.branches, made.model, made.steps) == (adapter.branch_names, adapter.name, 6)
    assert made.flops == (adapter.flops if made.unit == "branch" else adapter.trunk_flops)
    assert made.unit == "branch" or made.forecaster.size == adapter.trunk_size


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_that_has_not_been_traced_is_refused(method):
    adapter = GenericAdapter(make("WanTransformer3DModel")[0])
    with pytest.raises(ValueError, match=r"adapter: has not been traced; call adapter.trace\(...\) with the arguments"):
        method(adapter)


def test_a_trunk_that_cannot_be_reused_is_refused(adapter):
    adapter.trunk_size, adapter.trunk_left_out = None, "it is odd"
    assert fora(adapter, 6, 2).steps == 6
    with pytest.raises(ValueError, match="adapter: the trunk of this model cannot be reused: it is odd"):
        trunk_forecast(adapter, 6, every=2)


def test_a_transformer_is_neither():
    with pytest.raises(TypeError, match="net: got Linear, expected a denoiser or an adapter"):
        count_flops(torch.nn.Linear(2, 2))


def test_a_denoiser_is_counted():
    net = DiT(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=4)
    assert trunk_costs(net) == (count_flops(net), 4 * 16) and len(count_flops(net).branches) == 4
    net.flops = Flops((1.0,) * 4, 0.0)  # of a denoiser nothing is believed
    assert count_flops(net) != net.flops


@pytest.mark.parametrize("make", [lambda: torch.nn.MultiheadAttention(32, 2, batch_first=True),
                                  lambda: torch.nn.TransformerEncoderLayer(32, 2, 48, batch_first=True)])
def test_the_kernels_that_torch_fuses_attention_into_are_counted(make):
    module, x, found = make().eval().requires_grad_(False), torch.randn(3, 8, 32), []
    call = (lambda: module(x)) if hasattr(module, "linear1") else (lambda: module(x, x, x, need_weights=False))
    try:
        for fused in (True, False):
            torch.backends.mha.set_fastpath_enabled(fused)
            with flop_counter() as counter:
                call()
            found.append(counter.get_total_flops())
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert found[0] == found[1] > 0
