"""What the generic adapter leaves out or refuses, and that an error or another thread leaves no trace."""

import threading

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from harmonica_dit.pipelines.adapters.generic import GenericAdapter, GenericCache
from support.generic_models import arguments_at, make, random_row, state, values
from support.hook_oracle import Oracle
from support.odd_models import Toy


@torch.no_grad()
def test_trace_orders_branches_and_leaves_out_what_cannot_be_reused():
    toy = Toy(None, "skipped", "in place", "output", "twice")
    toy.blocks.append(toy.blocks[0])  # one block at two places
    adapter = GenericAdapter(toy)
    assert adapter.branch_names[:2] == ("blocks.0.ff", "blocks.0.attn") and len(adapter.branch_names) == 10
    x = torch.randn(2, 4)
    adapter.trace(x)
    assert adapter.branch_names == ("blocks.0.attn", "blocks.0.ff", "blocks.1.ff", "blocks.2.attn", "blocks.2.ff",
                                    "blocks.3.ff", "blocks.4.attn", "blocks.4.ff")
    assert adapter.left_out == {"blocks.1.attn": "is not called",
                                "blocks.3.attn": "its output is not float tensors"}
    assert adapter.trunk_left_out == "blocks.0 is called 2 times in a forward" and adapter.trunk_flops is None
    cache, oracle = adapter.new_cache(), Oracle(toy, adapter.branch_names)
    row = (False, False, True, True, True, False, True, False)  # blocks.0 and blocks.4.ff run twice in a forward
    for s, now in enumerate(((True,) * 8, row, row)):
        x = torch.randn(2, 4)
        expected = oracle_of(oracle, toy, x, now)
        assert torch.equal(adapter(x, row=now, cache=cache), expected), s
    with pytest.raises(TypeError, match="none of its branches can be reused"):
        GenericAdapter(Toy("skipped"), ["blocks.0.attn"]).trace(x)


def oracle_of(oracle, toy, x, row):
    class Listed(nn.Module):  # values() takes what a diffusers model returns
        def forward(self):
            return [toy(x)]

    oracle.transformer = wrapped = Listed()
    wrapped.get_submodule = toy.get_submodule
    return oracle({}, lambda k, fresh, held: (fresh, True) if row[k] else (held[-1], False)).view_as(x)


@torch.no_grad()
@pytest.mark.parametrize("odd, error, said", [
    ("skipped", RuntimeError, "was called 0 times"), ("output", TypeError, "returned dict")])
def test_without_a_trace_such_a_branch_is_refused_when_it_shows(odd, error, said):
    toy = Toy(None, odd)
    adapter, cache, before = GenericAdapter(toy), GenericCache(), state(toy)
    x = torch.randn(2, 4)
    plain = toy(x)
    assert torch.equal(adapter(x), plain)
    with pytest.raises(error, match=f"blocks.1.attn: {said}.*trace"):
        adapter(x, cache=cache)
    assert state(toy) == before
    with pytest.raises(RuntimeError, match="did not finish.*cache.reset"):
        adapter(x, cache=cache)


@torch.no_grad()
def test_another_number_of_calls_than_was_stored_is_refused():
    toy = Toy("twice")
    adapter, x = GenericAdapter(toy), torch.randn(2, 4)
    for first, then, said in (("twice", None, "called 1 times in this forward, expected 2"),
                              (None, "twice", "more often than in the forward that stored")):
        cache, toy.blocks[0].odd = adapter.new_cache(), first
        adapter(x, cache=cache)
        toy.blocks[0].odd = then
        with pytest.raises(RuntimeError, match=f"blocks.0.ff.*{said}"):
            adapter(x, row=(False, True), cache=cache)


@torch.no_grad()
def test_arguments_are_checked_before_anything_runs():
    transformer, arguments = make("SanaTransformer2DModel")
    adapter = GenericAdapter(transformer)
    K, cache = len(adapter.branch_names), adapter.new_cache()

    def check_refusal(error, said, arguments=arguments, **options):
        with pytest.raises(error, match=said):
            adapter(**arguments, **options)

    check_refusal(ValueError, "row: got 2 entries", row=(True, False), cache=cache)
    check_refusal(ValueError, "reuses branches; pass cache", row=(False,) * K)
    check_refusal(ValueError, "holds no output of branch 0", row=(False,) * K, cache=cache)
    check_refusal(TypeError, "cache: got int", cache=3)
    check_refusal(ValueError, "threshold: got 2", threshold=2)
    check_refusal(ValueError, "forecast_weights: got 1", cache=cache, forecast_weights=(1.0,))
    adapter(**arguments, cache=cache)
    held = cache.nbytes
    assert held > 0
    check_refusal(ValueError, "last two computed outputs", row=(False,) * K, forecast_weights=(1.0,) * K, cache=cache)
    doubled = {name: torch.cat([value, value]) for name, value in arguments.items()}
    check_refusal(ValueError, "cache: holds a forward of", doubled, row=(False,) * K, cache=cache)
    cache.reset()
    adapter(**doubled, cache=cache)
    assert cache.nbytes == 2 * held
    with pytest.raises(ValueError, match="history: got 5"):
        adapter.new_cache(5)
    with pytest.raises(TypeError, match="Sequential has no list of blocks"):
        GenericAdapter(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="has no submodule 'blocks.0.attn'"):
        GenericAdapter(transformer, ["blocks.0.attn"])
    toy = Toy(None)
    toy.blocks.append(toy.blocks[0])
    with pytest.raises(ValueError, match="two of the names are one module"):
        GenericAdapter(toy, ["blocks.0.attn", "blocks.1.attn"])


def test_compiled_blocks_and_gradient_checkpointing_are_refused():
    transformer, arguments = make("SD3Transformer2DModel")
    adapter = GenericAdapter(transformer)
    cache, K = adapter.new_cache(), len(adapter.branch_names)
    transformer.enable_gradient_checkpointing()
    adapter(**arguments, cache=cache)
    for row in (torch.rand(K), random_row(K, 0)):
        with pytest.raises(ValueError, match="disable_gradient_checkpointing"):
            adapter(**arguments, row=row, cache=cache)
    with torch.no_grad():
        adapter(**arguments, row=random_row(K, 0), cache=cache)
    transformer.transformer_blocks[1].compile()
    for made in (adapter, GenericAdapter(transformer)):
        with pytest.raises(ValueError, match=r"transformer_blocks.1: has been compiled.*_blocks\[0\].attn.compile"):
            made(**arguments, cache=made.new_cache())
    transformer.compile()
    with pytest.raises(ValueError, match=r"compiled as a whole.*set its ._compiled_call_impl to None.*\[0\].compile"):
        GenericAdapter(transformer)


@torch.no_grad()
def test_an_error_inside_leaves_nothing_behind_and_other_hooks_stay():
    transformer, arguments = make("AuraFlowTransformer2DModel")
    add_hook_to_module(transformer.single_transformer_blocks[0].attn, ModelHook())  # replaces its forward
    adapter, before = GenericAdapter(transformer), state(transformer)
    hooked = vars(transformer.single_transformer_blocks[0].attn)["forward"]
    plain = values(transformer(**arguments))
    cache = adapter.new_cache()
    assert torch.equal(values(adapter(**arguments, cache=cache)), plain)
    assert vars(transformer.single_transformer_blocks[0].attn)["forward"] is hooked

    def fail(*_):
        raise KeyboardInterrupt

    handle = transformer.single_transformer_blocks[1].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        adapter(**arguments, row=random_row(len(adapter.branch_names), 1), cache=cache)
    handle.remove()
    assert state(transformer) == before and torch.equal(values(transformer(**arguments)), plain)
    with pytest.raises(RuntimeError, match="did not finish"):
        adapter(**arguments, cache=cache)


def test_threads_share_a_transformer():
    transformer, arguments = make("LTXVideoTransformer3DModel")
    adapters = [GenericAdapter(transformer), GenericAdapter(transformer)]
    K = len(adapters[0].branch_names)
    before = state(transformer)

    @torch.no_grad()
    def run_steps(i):
        if i == 2:  # one that knows nothing of rows
            return [values(transformer(**arguments_at(arguments, s))) for s in range(12)]
        cache = adapters[i].new_cache()
        rows = [None, *(random_row(K, 10 * i + s) for s in range(1, 12))]
        return [values(adapters[i](**arguments_at(arguments, s), row=rows[s], cache=cache)) for s in range(12)]

    expected = [run_steps(i) for i in range(3)]
    found = [None] * 3
    threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, run_steps(i))) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for i in range(3) for a, b in zip(expected[i], found[i]))
    assert state(transformer) == before
