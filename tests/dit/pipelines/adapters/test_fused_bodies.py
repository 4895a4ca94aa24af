"""Which modules the fused adapters call, which they fuse or pass by, and what of it they refuse."""

import pytest
import torch
from torch import nn

import harmonica_kernels as hk
import harmonica_kernels.ops as ops
from harmonica_dit.pipelines.adapters import adapt, fused
from support.fused_models import LoudProcessor, dit_inputs, pixart_inputs
from support.pipes import small_dit, small_pixart
from support.tolerance import assert_close


def test_reused_branches_are_not_called_and_only_their_gates_evaluated(small, monkeypatch):
    model, inputs = small
    adapter = adapt(model)
    row = tuple(k % 3 == 1 for k in range(len(adapter.branches)))
    cache, called, rows = adapter.new_cache(), [], []
    linear = torch.nn.functional.linear
    with torch.no_grad():
        adapter(**inputs, cache=cache)
        for name in adapter.branch_names:
            model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
        monkeypatch.setattr(torch.nn.functional, "linear",
                            lambda x, w, b=None: rows.append(len(w) if len(x) else 0) or linear(x, w, b))
        adapter(**inputs, cache=cache, row=row)
    assert called == [name for name, compute in zip(adapter.branch_names, row, strict=True) if compute]
    if type(model).__name__.startswith("DiT"):  # D = 24; of adaLN's six rows three where a branch is computed, else one
        assert rows.count(3 * 24) == rows.count(2 * 24) == 1 and 6 * 24 not in rows  # two: the final layer's


def test_one_fused_call_between_two_computed_bodies(small, monkeypatch):
    model, inputs = small
    adapter = adapt(model)
    calls = []
    real = hk.forward.residual_norm
    with torch.no_grad():
        cache = adapter.new_cache()
        adapter(**inputs, cache=cache)
        monkeypatch.setattr(hk.forward, "residual_norm", lambda *a, **k: calls.append(len(a[1])) or real(*a, **k))
        adapter(**inputs, cache=cache, row=(False, True) + (False,) * (len(adapter.branches) - 2))
    assert calls == [1, len(adapter.branches) - 1]


def count_writes(model, inputs, monkeypatch):
    """How many outputs a forward writes straight into the cache; it must agree with diffusers."""
    adapter, count, real = adapt(model), [], fused.write_linear
    monkeypatch.setattr(fused, "write_linear", lambda *a: count.append(1) or real(*a))
    with torch.no_grad():
        expected = model(**inputs).sample
        assert_close(adapter(**inputs, cache=adapter.new_cache()).sample, expected)
    return len(count)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_changes_a_branch_is_honoured(small, monkeypatch):
    """The last linear is written into the cache only where nothing has been put on it; everything else is called."""
    model, inputs = small
    K = len(adapt(model).branches)
    assert count_writes(model, inputs, monkeypatch) == K
    block = model.transformer_blocks[0]
    block.ff.net[-1].register_forward_hook(lambda module, args, output: output + 1)
    assert count_writes(model, inputs, monkeypatch) == K - 1
    block.attn1.to_out[0].__class__ = Doubled
    assert count_writes(model, inputs, monkeypatch) == K - 2
    block = model.transformer_blocks[1]
    block.attn1.set_processor(LoudProcessor())
    assert count_writes(model, inputs, monkeypatch) == K - 3
    block.ff.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    assert count_writes(model, inputs, monkeypatch) == K - 4


def test_bias_and_gelu_are_one_pass_where_there_is_a_kernel(monkeypatch):
    """Only in feed-forwards that are exactly a linear layer with bias and the tanh form, with nothing put on them."""
    calls, op = [], ops.bias_gelu
    monkeypatch.setattr(ops, "bias_gelu", lambda *args: calls.append(1) or op(*args))

    def count_fusions(model, inputs):
        calls.clear()
        count_writes(model, inputs, monkeypatch)
        return len(calls)

    model = small_dit()
    inputs, (first, second, *_) = dit_inputs(model), model.transformer_blocks
    N = len(model.transformer_blocks)
    assert count_fusions(model, inputs) == N
    first.ff.net[0].register_forward_hook(lambda module, args, output: output + 1)
    assert count_fusions(model, inputs) == N - 1
    second.ff.net[0].proj.__class__ = Doubled
    assert count_fusions(model, inputs) == N - 2
    model = small_dit(activation_fn="gelu")
    assert count_fusions(model, dit_inputs(model)) == 0


def test_what_would_be_passed_by_is_refused(small):
    model, _ = small
    block = model.transformer_blocks[1]
    adapter = adapt(model)
    for module, name in ((block, "transformer_blocks.1: has hooks"), (block.norm1, "norm1: has hooks"),
                         (model.norm_out, "norm_out: has hooks")):
        handle = module.register_forward_hook(lambda *_: None)
        for check in (lambda: adapt(model), adapter.check):
            with pytest.raises(ValueError, match=name):
                check()
        handle.remove()
    block.forward = block.forward
    with pytest.raises(ValueError, match="transformer_blocks.1: has a replaced forward"):
        adapter.check()
    del block.forward
    block.compile(backend="eager")
    with pytest.raises(ValueError, match="transformer_blocks.1: has been compiled"):
        adapter.check()
    block._compiled_call_impl = None
    adapter.check()
    for compiled in (torch.compile(model, backend="eager"), model):
        if compiled is model:
            model.compile(backend="eager")
        with pytest.raises(ValueError, match="transformer: has been compiled"):
            adapt(compiled)


def test_compiled_branches_run(small, monkeypatch):
    model, inputs = small
    with torch.no_grad():
        expected = model(**inputs).sample
        for block in model.transformer_blocks:
            block.ff.compile(backend="eager")
            block.attn1.compile(backend="eager")
        adapter = adapt(model)
        assert_close(adapter(**inputs, cache=adapter.new_cache()).sample, expected)


def test_configurations_without_an_adapter():
    with pytest.raises(ValueError, match="norm_elementwise_affine=True"):
        adapt(small_dit(norm_elementwise_affine=True))
    with pytest.raises(TypeError, match="transformer: got NoneType"):
        adapt(None)
    model = small_pixart(sample_size=128)
    inputs = pixart_inputs(model)
    del inputs["added_cond_kwargs"]
    with pytest.raises(ValueError, match="added_cond_kwargs: got None"):
        adapt(model)(**inputs)
    with pytest.raises(ValueError, match="gligen"):
        adapt(model)(**pixart_inputs(model), cross_attention_kwargs=dict(gligen=dict(objs=None)))
