"""diffusers' DiT and PixArt run through `cached_forward` give what diffusers gives, and under a schedule what a slow
cache of hooks on diffusers' modules gives."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

import harmonica_kernels as hk
import harmonica_kernels.ops as ops
from harmonica_dit.pipelines.adapters import adapt, fused
from support.pipes import HookedCache, random_schedule, random_weights, small_dit, small_pixart

XL = dict(num_attention_heads=16, attention_head_dim=72, num_layers=2)  # the published models' shapes, few layers
DITS = {"small": dict(), "square": dict(out_channels=4, patch_size=4, attention_bias=False), "eps": dict(norm_eps=0.1),
        "DiT-XL/2 256": XL}
PIXARTS = {
    "small": dict(),
    "eps": dict(norm_eps=0.1),
    "micro-conditions": dict(sample_size=128),
    "no caption projection": dict(caption_channels=None, cross_attention_dim=20),
    "no text": dict(cross_attention_dim=None, caption_channels=None),
    "alpha 256": XL | dict(sample_size=32, cross_attention_dim=1152, caption_channels=4096),
    "alpha 1024": XL | dict(sample_size=128, cross_attention_dim=1152, caption_channels=4096),
    "sigma 2K": XL | dict(sample_size=256, cross_attention_dim=1152, caption_channels=4096, interpolation_scale=4,
                          use_additional_conditions=False),
}


def dit_inputs(model, B=3):
    side = model.config.sample_size
    return dict(hidden_states=torch.randn(B, 4, side, side), timestep=torch.randint(0, 1000, (B,)),
                class_labels=torch.tensor([1000, 3, 17])[:B])


def pixart_inputs(model, B=3, height=10, width=6, tokens=9):
    inputs = dict(hidden_states=torch.randn(B, 4, height, width), timestep=torch.randint(0, 1000, (B,)),
                  encoder_attention_mask=(torch.arange(tokens) < torch.tensor([[1], [4], [tokens]])[:B]).long(),
                  encoder_hidden_states=torch.randn(B, tokens, model.config.caption_channels or 20))
    if model.use_additional_conditions:
        size = torch.tensor([[512.0, 768.0]])
        inputs["added_cond_kwargs"] = dict(resolution=size.repeat(B, 1), aspect_ratio=torch.full((B, 1), 2 / 3))
    return inputs


def close(got, expected, tolerance=1e-5):
    """To rounding: the largest difference in units of the largest value."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(params=["dit", "pixart"])
def small(request):
    model = small_dit() if request.param == "dit" else small_pixart()
    return model, dit_inputs(model) if request.param == "dit" else pixart_inputs(model)


def check_nothing_reused(model, inputs):
    adapter = adapt(model)
    with torch.no_grad():
        expected = model(**inputs).sample
        cache = adapter.new_cache()
        for options in ({}, dict(cache=cache), dict(cache=cache, row=(True,) * len(adapter.branches))):
            close(adapter(**inputs, **options).sample, expected)


@pytest.mark.parametrize("changes", DITS.values(), ids=DITS)
def test_dit_with_nothing_reused(changes):
    model = small_dit(**changes) if changes is not XL else random_weights(small_dit(**changes, sample_size=32), 0.02)
    check_nothing_reused(model, dit_inputs(model))


@pytest.mark.parametrize("changes", PIXARTS.values(), ids=PIXARTS)
def test_pixart_with_nothing_reused(changes):
    model = small_pixart(**changes)
    if "num_layers" in changes:
        random_weights(model, 0.02)
    inputs = pixart_inputs(model, height=16, width=12)
    if model.config.cross_attention_dim is None:
        del inputs["encoder_hidden_states"], inputs["encoder_attention_mask"]
    check_nothing_reused(model, inputs)


@pytest.mark.parametrize("mask", ["none", "bias", "bool", "self"])
def test_masks(mask):
    model = small_pixart()
    inputs = pixart_inputs(model)
    if mask == "none":
        del inputs["encoder_attention_mask"]
    elif mask == "bias":
        inputs["encoder_attention_mask"] = torch.randn(3, 1, 9)
    elif mask == "bool":
        inputs["encoder_attention_mask"] = inputs["encoder_attention_mask"].bool()
    else:
        inputs["attention_mask"] = (torch.arange(15) < torch.tensor([[2], [9], [15]])).long()
    check_nothing_reused(model, inputs)


def test_a_mask_reaches_the_bodies():
    """What it hides has no say: with and without cache."""
    model = small_pixart()
    adapter, inputs = adapt(model), pixart_inputs(model)
    other = inputs | dict(encoder_hidden_states=inputs["encoder_hidden_states"].clone())
    other["encoder_hidden_states"][0, 1:] = 100.0
    with torch.no_grad():
        for cache in (None, adapter.new_cache()):
            close(adapter(**other, cache=cache).sample[0], adapter(**inputs, cache=cache).sample[0])


def test_called_like_the_transformer(small):
    model, inputs = small
    adapter = adapt(model)
    with torch.no_grad():
        expected = model(**inputs)
        assert type(adapter(**inputs)) is type(expected)
        output = adapter(**inputs, return_dict=False)
        assert isinstance(output, tuple) and len(output) == 1
        first = inputs.pop("hidden_states")
        close(adapter(first, **inputs, return_dict=False)[0], expected.sample)


def test_names_and_fingerprint(small):
    model, _ = small
    adapter = adapt(model)
    modules = dict(model.named_modules())
    called = []
    handles = [modules[name].register_forward_hook(lambda *_, name=name: called.append(name))
               for name in adapter.branch_names]
    with torch.no_grad():
        model(**small[1])
    for handle in handles:
        handle.remove()
    assert adapter.branch_names == tuple(called)
    assert adapter.transformer is model and len(adapter.branches) == len(called)
    assert adapter.architecture == {"class": type(model).__name__, "K": len(called), "D": 24}


def walk(forward, inputs, steps, dtype):
    """The outputs at a few steps whose inputs do not depend on them."""
    generator = torch.Generator().manual_seed(3)
    outputs = []
    for s in range(steps):
        x = inputs["hidden_states"] + torch.randn(inputs["hidden_states"].shape, generator=generator)
        now = inputs | dict(hidden_states=x.to(dtype), timestep=inputs["timestep"] - 20 * s)
        now |= {name: value.to(dtype) for name, value in now.items() if name == "encoder_hidden_states"}
        outputs.append(forward(s, now))
    return torch.stack(outputs).double()


@pytest.mark.parametrize("forecast", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_schedule_equals_hooks_on_diffusers(small, forecast, seed):
    """Reuse, forecast and computing anew, in float32 to rounding and in bfloat16 as near the truth as diffusers is."""
    model, inputs = small
    inputs["timestep"] = torch.tensor([950, 500, 900])
    schedule = random_schedule(model, 7, 0.4, forecast, seed)
    results = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        net = copy.deepcopy(model).to(dtype)
        with HookedCache(net, schedule), torch.no_grad():
            results["hooks", dtype] = walk(lambda s, now, net=net: net(**now).sample, inputs, 7, dtype)
        if dtype == torch.float64:
            continue
        adapter = adapt(net)
        cache = adapter.new_cache(schedule.history)
        with torch.no_grad():
            results["ours", dtype] = walk(
                lambda s, now, adapter=adapter, cache=cache: adapter(
                    **now, row=schedule.rows[s], forecast_weights=schedule.forecast_weights[s], cache=cache).sample,
                inputs, 7, dtype)
    truth = results["hooks", torch.float64]
    close(results["ours", torch.float32], truth)

    def error(who):
        return (results[who, torch.bfloat16] - truth).norm()

    assert error("ours") <= 1.25 * error("hooks") < 0.2 * truth.norm()


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


@pytest.mark.parametrize("plain", [True, False])
def test_hoisted_modulation_is_the_steps_own(plain):
    """Any steps of a trajectory at once, also where an adaLN's linear has a hook and is evaluated whole."""
    model = small_dit()
    if not plain:
        model.transformer_blocks[1].norm1.linear.register_forward_hook(lambda module, args, output: output * 2)
    adapter, inputs = adapt(model), dit_inputs(model)
    schedule, timesteps = random_schedule(model, 7, 0.4), (999, 800, 650, 500, 310, 100, 3)
    results = []
    for hoisted in (False, True):
        cache = adapter.new_cache(schedule.history)
        with torch.no_grad():
            for s, t in enumerate(timesteps):
                inputs["timestep"] = torch.full((3,), t)
                if s in (0, 3):
                    window = slice(s, 3 if s == 0 else 7)
                    made = list(adapter.hoist(schedule.rows[window], timesteps[window], **inputs))
                more = made.pop(0) if hoisted else {}
                results.append(adapter(**inputs, **more, cache=cache, row=schedule.rows[s],
                                       forecast_weights=schedule.forecast_weights[s]).sample)
                if hoisted:
                    close(results[-1], results[s])
                    for k, compute in enumerate(schedule.rows[s]):
                        assert (more["modulation"].shift[k] is None) == (not compute)


def test_modulation_is_hoisted_in_slices(monkeypatch):
    """Of as many steps as HOISTED bytes can hold, and one at least, each when it is asked for."""
    model = small_dit()
    adapter, inputs = adapt(model), dit_inputs(model)
    steps, embedded = 5, []
    model.transformer_blocks[0].norm1.emb.register_forward_hook(lambda module, args, _: embedded.append(len(args[0])))
    row_bytes = (3 * 4 + 2) * 3 * 24 * 4  # of a step: K = 4 branches, B = 3, D = 24, float32
    for at_once, slices in ((2, [2, 2, 1]), (0, [1] * 5), (5, [5])):
        monkeypatch.setattr("harmonica_dit.pipelines.adapters.dit.HOISTED", at_once * row_bytes)
        embedded.clear()
        with torch.no_grad():
            hoisted = adapter.hoist(((True,) * 4,) * steps, (999, 700, 500, 300, 3), **inputs)
            asked = [len(embedded) for _ in hoisted]
            modulation = next(adapter.hoist(((True,) * 4,), (999,), **inputs))["modulation"]
        assert embedded[:-2] == [3 * n for n in slices for _ in range(2)]  # for the block, and for the final layer
        assert asked == [2 * (i + 1) for i, n in enumerate(slices) for _ in range(n)]
        assert sum(row.nbytes for rows in modulation for row in rows) == row_bytes


def test_hoisted_keys_and_values():
    """Of the cross-attentions that a row computes, and that are diffusers' own."""
    model = small_pixart(num_layers=3)
    adapter, inputs = adapt(model), pixart_inputs(model)
    blocks = model.transformer_blocks
    row = tuple(name != "transformer_blocks.2.attn2" for name in adapter.branch_names)
    with torch.no_grad():
        first = list(adapter.hoist((row, row), (900, 800), **inputs))
        assert set(first[1]["keys_values"]) == {blocks[0].attn2, blocks[1].attn2}
        blocks[0].attn2.set_processor(Loud())
        expected = model(**inputs).sample
        more = next(adapter.hoist(((True,) * 9,), (900,), **inputs))
        assert set(more["keys_values"]) == {blocks[1].attn2, blocks[2].attn2}
        close(adapter(**inputs, **more, cache=adapter.new_cache()).sample, expected)


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


def written(model, inputs, monkeypatch):
    """How many outputs a forward writes straight into the cache; it must agree with diffusers."""
    adapter, count, real = adapt(model), [], fused.write_linear
    monkeypatch.setattr(fused, "write_linear", lambda *a: count.append(1) or real(*a))
    with torch.no_grad():
        expected = model(**inputs).sample
        close(adapter(**inputs, cache=adapter.new_cache()).sample, expected)
    return len(count)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Loud(AttnProcessor):
    def __call__(self, *args, **kwargs):
        return 3 * super().__call__(*args, **kwargs)


def test_what_changes_a_branch_is_honoured(small, monkeypatch):
    """The last linear is written into the cache only where nothing has been put on it; everything else is called."""
    model, inputs = small
    K = len(adapt(model).branches)
    assert written(model, inputs, monkeypatch) == K
    block = model.transformer_blocks[0]
    block.ff.net[-1].register_forward_hook(lambda module, args, output: output + 1)
    assert written(model, inputs, monkeypatch) == K - 1
    block.attn1.to_out[0].__class__ = Doubled
    assert written(model, inputs, monkeypatch) == K - 2
    block = model.transformer_blocks[1]
    block.attn1.set_processor(Loud())
    assert written(model, inputs, monkeypatch) == K - 3
    block.ff.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    assert written(model, inputs, monkeypatch) == K - 4


def test_bias_and_gelu_are_one_pass_where_there_is_a_kernel(monkeypatch):
    """Only in feed-forwards that are exactly a linear layer with bias and the tanh form, with nothing put on them."""
    calls, op = [], ops.bias_gelu
    monkeypatch.setattr(ops, "FUSED", ("cpu",))
    monkeypatch.setattr(ops, "bias_gelu", lambda *args: calls.append(1) or op(*args))

    def fused_in(model, inputs):
        calls.clear()
        written(model, inputs, monkeypatch)
        return len(calls)

    model = small_dit()
    inputs, (first, second, *_) = dit_inputs(model), model.transformer_blocks
    N = len(model.transformer_blocks)
    assert fused_in(model, inputs) == N
    first.ff.net[0].register_forward_hook(lambda module, args, output: output + 1)
    assert fused_in(model, inputs) == N - 1
    second.ff.net[0].proj.__class__ = Doubled
    assert fused_in(model, inputs) == N - 2
    model = small_dit(activation_fn="gelu")
    assert fused_in(model, dit_inputs(model)) == 0


def test_gradients(small):
    """Of the input and of every weight, as diffusers gives them."""
    model, inputs = small
    model.requires_grad_(True)
    grads = []
    for forward in (model, adapt(model)):
        inputs["hidden_states"] = inputs["hidden_states"].detach().requires_grad_()
        model.zero_grad()
        forward(**inputs).sample.square().mean().backward()
        grads.append([inputs["hidden_states"].grad] + [p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) > 30
    largest = max(grad.abs().max() for grad in grads[0])  # that of a key's bias is 0 but for rounding
    for theirs, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * largest.item())


def test_a_soft_row_trains(small):
    model, inputs = small
    adapter = adapt(model)
    cache = adapter.new_cache()
    with torch.no_grad():
        adapter(**inputs, cache=cache)
    row = torch.full((len(adapter.branches),), 0.5, requires_grad=True)
    inputs["hidden_states"] = inputs["hidden_states"] * 0.9
    adapter(**inputs, row=row, cache=cache).sample.square().mean().backward()
    assert row.grad.abs().min() > 0


def test_autocast(small):
    model, inputs = small
    adapter = adapt(model)
    with torch.no_grad():
        truth = model(**inputs).sample
        with torch.autocast("cpu", torch.bfloat16):
            theirs, ours = model(**inputs).sample, adapter(**inputs, cache=adapter.new_cache()).sample
    assert ours.dtype == theirs.dtype
    assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm()


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
        close(adapter(**inputs, cache=adapter.new_cache()).sample, expected)


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
