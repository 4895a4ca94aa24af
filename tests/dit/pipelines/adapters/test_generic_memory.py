"""What a generic adapter keeps is its own: modules and callers may write into what was returned. And whose it is."""

import pytest
import torch
from torch import nn

from harmonica_dit.forecaster import taylor
from harmonica_dit.pipelines.adapters import adapt
from harmonica_dit.pipelines.adapters.generic import GenericAdapter
from harmonica_kernels import TrunkWeights
from support.generic_models import make
from support.odd_models import Toy
from support.pipes import small_dit, small_pixart

WEIGHTS = taylor([True, True, False], 1).weights([True, True, False])


class Static(nn.Module):
    """Returns the memory that it returned before, as a CUDA graph does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = nn.Sequential(inner)
        self.o = None

    def forward(self, x):
        o = self.inner(x)
        if self.o is None:
            self.o = o.clone()
        return self.o.copy_(o)


def steps(adapter, xs, unit, rows, weights=(None,) * 3, between=None):
    cache, found = adapter.new_cache(2, unit), []
    for x, row, w in zip(xs, rows, weights):
        found.append(adapter(x, row=row, forecast_weights=w, cache=cache).clone())
        if between is not None:
            adapter.transformer(between)
    return found


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("unit", ["branch", "trunk"])
def test_outputs_in_memory_that_is_overwritten(unit, mode):
    """By the next forward, of this trajectory or of another one between two steps."""
    with mode():
        plain, xs = Toy(None, None), list(torch.randn(3, 2, 4))
        static = Toy(None, None)
        static.load_state_dict(plain.state_dict())
        for block in static.blocks:
            block.ff, block.attn = Static(block.ff), Static(block.attn)
        static.blocks[1] = block if unit == "branch" else nn.Sequential(Static(static.blocks[1]))
        found = []
        for toy in (plain, static):
            adapter = GenericAdapter(toy)
            if unit == "trunk":
                adapter.trace(xs[0])
                assert not adapter.trunk_left_out
                rows, weights = (None, None, False), WEIGHTS
            else:
                K = len(adapter.branch_names)
                rows, weights = (None, None, (False,) * K), (None, None, (0.5,) * K)
            found.append(steps(adapter, xs, unit, rows, weights, between=torch.randn(2, 4)))
        assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_outputs_that_the_caller_changes_in_place(mode):
    """It does so again with what is reused."""
    with mode():
        toy, x = Toy("in place", None), torch.randn(2, 4)
        adapter, plain = GenericAdapter(toy), toy(x)
        adapter.trace(x)
        assert not adapter.left_out
        K, cache = len(adapter.branch_names), adapter.new_cache()
        for row in (None, (False,) * K, (False,) * K):
            assert torch.equal(adapter(x, row=row, cache=cache), plain)


class TwoHeads(Toy):
    """What it returns depends on the first block by another way than through the last."""

    def forward(self, x):
        first = self.blocks[0](x)
        return self.blocks[1](first) + first


@torch.no_grad()
def test_a_trunk_that_is_not_all_is_found_out():
    adapter, x = GenericAdapter(TwoHeads(None, None)), torch.randn(2, 4)
    with pytest.raises(ValueError, match="cannot reuse: adapter.trace.* has not looked yet"):
        adapter(x, cache=adapter.new_cache(1, "trunk"))
    adapter.trace(x)
    assert "depends on more than the output of blocks.1" in adapter.trunk_left_out
    with pytest.raises(ValueError, match="cannot reuse: what the model returns depends on more"):
        adapter(x, cache=adapter.new_cache(1, "trunk"))
    adapter(x, cache=adapter.new_cache())


@torch.no_grad()
def test_arguments_of_the_trunk_are_checked_before_anything_runs():
    toy, x = Toy(None, None), torch.randn(2, 4)
    adapter = GenericAdapter(toy)
    adapter.trace(x)
    cache, ran = adapter.new_cache(2, "trunk"), []
    toy.register_forward_pre_hook(lambda *_: ran.append(1))
    for said, options in (("row: got False, but the cache holds no state yet", dict(row=False)),
                          ("row: got .* with a cache of the trunk, expected None or False", dict(row=(True,) * 4)),
                          ("forecast_weights: of 2 states, the cache holds 0", dict(forecast_weights=WEIGHTS[2]))):
        with pytest.raises(ValueError, match=said):
            adapter(x, cache=cache, **options)
    with pytest.raises(TypeError, match="forecast_weights: got tuple, expected TrunkWeights"):
        adapter(x, cache=cache, forecast_weights=(1.0,))
    assert not ran
    adapter(x, cache=cache)
    weights = WEIGHTS[2]._replace(tokens=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="weigh what enters a step, which this adapter does not see"):
        adapter(x, cache=cache, row=False, forecast_weights=weights)


def test_a_cache_of_another_model_mode_or_autocast_is_refused():
    (first, arguments), (second, _) = make("FluxTransformer2DModel"), make("FluxTransformer2DModel")
    A, B = GenericAdapter(first), GenericAdapter(second)
    K = len(A.branch_names)
    reused = dict(row=(False,) * K)
    with torch.no_grad():
        cache = A.new_cache()
        A(**arguments, cache=cache)
        with pytest.raises(ValueError, match=f"cache: holds a forward of .*{id(first):#x}.*got .*{id(second):#x}"):
            B(**arguments, cache=cache, **reused)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="got one under autocast to"):
            A(**arguments, cache=cache, **reused)
        A(**arguments, cache=cache, **reused)
        cache.reset()
        with torch.inference_mode():
            A(**arguments, cache=cache)
        with pytest.raises(ValueError, match="holds a forward under torch.inference_mode.*got one under torch.no_grad"):
            A(**arguments, cache=cache, **reused)


def test_gradients_do_not_pass_through_reused_branches():
    """So a forward that would leave part of them out is refused."""
    toy, x = Toy(None, None), torch.randn(2, 4)
    adapter = GenericAdapter(toy)
    cache, reused = adapter.new_cache(), (False, True, True, True)
    adapter(x, cache=cache)
    with pytest.raises(RuntimeError, match="a gradient would have to pass through.*torch.no_grad()"):
        adapter(x, row=reused, cache=cache)
    with torch.no_grad():
        adapter(x, row=reused, cache=cache)
    toy.requires_grad_(False)
    cache.reset()
    adapter(x, cache=cache)
    adapter(x, row=reused, cache=cache)


def test_gradients_pass_through_the_trunks_states():
    """Those of a forecast in the latents of both steps that it is made from, and through a computed step's correction.
    """
    toy = Toy(None, None).double().requires_grad_(False)
    adapter = GenericAdapter(toy)
    adapter.trace(torch.randn(2, 4).double())

    def run(first, second, states):
        cache = adapter.new_cache(2, "trunk")
        adapter(first, cache=cache)
        corrected = adapter(second, forecast_weights=TrunkWeights(states[:1], None, -states[0]), cache=cache)
        return corrected + adapter(first, row=False, forecast_weights=TrunkWeights(states), cache=cache)

    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 4), (2, 4), (2, 4))]
    torch.autograd.gradcheck(run, inputs)
    assert all(gradient.abs().max() > 1e-3 for gradient in torch.autograd.grad(run(*inputs).sum(), inputs))


@pytest.mark.parametrize("model", ["FluxTransformer2DModel", "WanTransformer3DModel", "DiT", "PixArt"])
@pytest.mark.parametrize("unit", ["branch", "trunk"])
@torch.no_grad()
def test_a_full_caches_bytes_are_known_beforehand(model, unit):
    if model in ("DiT", "PixArt"):
        transformer, arguments = (small_dit if model == "DiT" else small_pixart)(), dict(
            hidden_states=torch.randn(2, 4, 8, 8), timestep=torch.tensor([9, 9]))
        arguments |= dict(class_labels=torch.tensor([1, 2])) if model == "DiT" else dict(
            encoder_hidden_states=torch.randn(2, 3, 20), added_cond_kwargs=dict(resolution=None, aspect_ratio=None))
    else:
        transformer, arguments = make(model)
    adapter = adapt(transformer)
    with pytest.raises(ValueError, match="adapter: has not been traced"):
        adapter.cache_nbytes(2, unit)
    adapter.trace(**arguments)
    cache = adapter.new_cache(2, unit)
    for _ in range(2):
        adapter(**arguments, cache=cache)
    assert cache.nbytes == adapter.cache_nbytes(2, unit) > 0
