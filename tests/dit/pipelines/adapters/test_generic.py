"""The generic adapter on diffusers' classes, against the plain model and an oracle made of forward hooks."""

from collections import Counter, defaultdict
from contextlib import contextmanager

import pytest
import torch

from harmonica_dit.flops import flop_counter
from harmonica_dit.pipelines.adapters import adapt
from harmonica_dit.pipelines.adapters.generic import GenericAdapter
from support.generic_models import MODELS, arguments_at, make, random_row, state, values
from support.hook_oracle import Oracle, forecast, over


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return make(request.param)


@torch.no_grad()
def test_computing_everything_is_the_plain_forward_to_the_bit(model):
    transformer, arguments = model
    adapter, before = adapt(transformer), state(transformer)
    assert type(adapter) is GenericAdapter and adapter.transformer is transformer
    plain = transformer(**arguments)
    K = len(adapter.branch_names)
    for row, cache in ((None, None), (None, adapter.new_cache()), ((True,) * K, adapter.new_cache(2)),
                        ((True,) * K, None)):
        output = adapter(**arguments, row=row, cache=cache)
        assert type(output) is type(plain) and torch.equal(values(output), values(plain))
    assert state(transformer) == before


@torch.no_grad()
def test_hard_rows_equal_the_oracle_and_reused_modules_do_not_run(model):
    transformer, arguments = model
    adapter = GenericAdapter(transformer)
    flops = adapter.trace(**arguments)
    assert not adapter.left_out and min(flops.branches) > 0
    names, K, before = adapter.branch_names, len(adapter.branch_names), state(transformer)
    cache, oracle = adapter.new_cache(2), Oracle(transformer, names)
    for s in range(5):
        row = (True,) * K if s < 2 else random_row(K, s)
        e = tuple(0.0 if compute or k % 2 else 0.3 * s for k, compute in enumerate(row)) if s > 2 else None
        step = arguments_at(arguments, s)

        def decide(k, fresh, held, row=row, e=e):
            if row[k]:
                return fresh, True
            return (forecast(e[k], *held) if e is not None and e[k] else held[-1]), False

        expected = oracle(step, decide)
        assert torch.equal(values(adapter(**step, row=row, forecast_weights=e, cache=cache)), expected), s
    for last in (row, (False,) * K):
        reused = [transformer.get_submodule(name) for name, compute in zip(names, last) if not compute]
        reused += [transformer.get_submodule(name.replace("proj_out", "attn")) for name, compute in zip(names, last)
                   if name.endswith(".proj_out") and not compute]
        with watch_calls(reused) as called, flop_counter() as counter:
            adapter(**step, row=last, cache=cache)
        assert reused and not called
        computed = sum(number for number, compute in zip(flops.branches, last) if compute)
        assert counter.get_total_flops() == flops.fixed + computed
    assert state(transformer) == before


@torch.no_grad()
def test_a_forecast_of_higher_order_equals_the_oracle(model):
    transformer, arguments = model
    adapter = GenericAdapter(transformer)
    adapter.trace(**arguments)
    K = len(adapter.branch_names)
    cache, oracle, weights = adapter.new_cache(3), Oracle(transformer, adapter.branch_names), (3.0, -3.0, 1.0)
    kept = defaultdict(list)  # of each branch and each of its calls in a forward, the newest last
    for s in range(4):
        step, calls = arguments_at(arguments, s), Counter()

        def decide(k, fresh, held, s=s, calls=calls):
            calls[k] += 1
            mine = kept[k, calls[k]]
            if s < 3:
                mine.append(fresh)
                return fresh, True
            return over(lambda a, b, c: weights[0] * c + weights[1] * b + weights[2] * a, *mine), False

        expected = oracle(step, decide)
        row, e = ((True,) * K, None) if s < 3 else ((False,) * K, (weights,) * K)
        torch.testing.assert_close(values(adapter(**step, row=row, forecast_weights=e, cache=cache)), expected)


@contextmanager
def watch_calls(modules):
    """The modules inside these that are called."""
    called = []
    handles = [inner.register_forward_pre_hook(lambda inner, _: called.append(inner))
               for module in modules for inner in module.modules() if inner is not module]
    yield called
    for handle in handles:
        handle.remove()


def test_soft_rows_and_their_gradients_equal_the_oracle(model):
    transformer, arguments = model
    adapter = GenericAdapter(transformer)
    names, K = adapter.branch_names, len(adapter.branch_names)
    cache, oracle = adapter.new_cache(2), Oracle(transformer, names)
    noise = torch.Generator().manual_seed(0)
    for s in range(4):
        r, e = torch.rand(K, generator=noise), torch.randn(K, generator=noise)
        mine, theirs = ([row.clone().requires_grad_() for row in (r, e)] for _ in range(2))
        step = arguments_at(arguments, s)

        def decide(k, fresh, held, s=s, r=theirs[0], e=theirs[1]):
            if s == 0:
                return fresh, True
            held = [over(torch.Tensor.detach, o) for o in held]
            old = forecast(e[k], *held) if len(held) == 2 else held[-1]
            return over(lambda f, o: r[k] * f + (1 - r[k]) * o, fresh, old), r[k].item() > 0.5

        expected = oracle(step, decide)
        soft = {} if s == 0 else dict(row=mine[0], forecast_weights=mine[1], threshold=0.5)
        result = values(adapter(**step, cache=cache, **soft))
        assert torch.equal(result, expected), s
        if s:
            for output in (result, expected):
                output.square().sum().backward()
            for ours, other in zip(mine, theirs):
                torch.testing.assert_close(*(torch.zeros(K) if row.grad is None else row.grad for row in (ours, other)))
    assert (mine[0].grad.abs() > 1e-3).any() and (mine[1].grad.abs() > 1e-3).any()


@pytest.mark.parametrize("name", ["CogVideoXTransformer3DModel", "FluxTransformer2DModel"])
def test_gradients_of_a_soft_row(name):
    transformer, arguments = make(name)
    transformer.double().requires_grad_(False)
    arguments = {name: value.double() for name, value in arguments.items()}
    adapter = GenericAdapter(transformer)
    K = len(adapter.branch_names)
    filled = adapter.new_cache(2)
    with torch.no_grad():
        for s in range(2):
            adapter(**arguments64_at(arguments, s), cache=filled)

    def forward(r, e):
        cache = adapter.new_cache().copy_(filled)
        return values(adapter(**arguments64_at(arguments, 2), row=r, forecast_weights=e, cache=cache))

    inputs = [torch.rand(K, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(forward, inputs, fast_mode=True)


def arguments64_at(arguments, s):
    return {name: value.double() for name, value in arguments_at(arguments, s).items()}


def test_flops_of_a_block_by_hand():
    transformer, arguments = make("WanTransformer3DModel")
    flops = GenericAdapter(transformer).trace(**arguments)
    N, text, D, hidden = 2 * 2 * 3, 3, 24, 32
    one = 4 * 2 * N * D * D + 2 * 2 * N * N * D
    cross = 2 * 2 * (N + text) * D * D + 2 * 2 * N * text * D
    assert flops.branches[:3] == (one, cross, 2 * 2 * N * D * hidden)
    transformer, arguments = make("FluxTransformer2DModel")
    flops = GenericAdapter(transformer).trace(**arguments)
    N, D = 6 + 3, 32
    assert flops.branches[-1] == 2 * N * D * D * (3 + 4 + 5) + 2 * 2 * N * N * D
