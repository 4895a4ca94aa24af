"""DiT and PixArt through `cached_forward` give what diffusers gives, and under a schedule what hooks give."""

import copy

import pytest
import torch

from harmonica_dit.pipelines.adapters import adapt
from support.fused_models import dit_inputs, pixart_inputs
from support.pipes import HookedCache, random_schedule, random_weights, small_dit, small_pixart
from support.tolerance import assert_close

XL = dict(num_attention_heads=16, attention_head_dim=72, num_layers=1)  # the published models' shapes, one block
DITS = {"small": dict(), "square": dict(out_channels=4, patch_size=4, attention_bias=False), "eps": dict(norm_eps=0.1),
        "DiT-XL/2 256": XL}
PIXARTS = {
    "small": dict(),
    "eps": dict(norm_eps=0.1),
    "micro-conditions": dict(sample_size=128),
    "no caption projection": dict(caption_channels=None, cross_attention_dim=20),
    "no text": dict(cross_attention_dim=None, caption_channels=None),
    "alpha 1024": XL | dict(sample_size=128, cross_attention_dim=1152, caption_channels=4096),
    "sigma 2K": XL | dict(sample_size=256, cross_attention_dim=1152, caption_channels=4096, interpolation_scale=4,
                          use_additional_conditions=False),
}


def check_nothing_reused(model, inputs):
    adapter = adapt(model)
    with torch.no_grad():
        expected = model(**inputs).sample
        cache = adapter.new_cache()
        for options in ({}, dict(cache=cache), dict(cache=cache, row=(True,) * len(adapter.branches))):
            assert_close(adapter(**inputs, **options).sample, expected)


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
            assert_close(adapter(**other, cache=cache).sample[0], adapter(**inputs, cache=cache).sample[0])


def test_called_like_the_transformer(small):
    model, inputs = small
    adapter = adapt(model)
    with torch.no_grad():
        expected = model(**inputs)
        assert type(adapter(**inputs)) is type(expected)
        output = adapter(**inputs, return_dict=False)
        assert isinstance(output, tuple) and len(output) == 1
        first = inputs.pop("hidden_states")
        assert_close(adapter(first, **inputs, return_dict=False)[0], expected.sample)


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


def run_steps(forward, inputs, steps, dtype):
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
            results["hooks", dtype] = run_steps(lambda s, now, net=net: net(**now).sample, inputs, 7, dtype)
        if dtype == torch.float64:
            continue
        adapter = adapt(net)
        cache = adapter.new_cache(schedule.history)
        with torch.no_grad():
            results["ours", dtype] = run_steps(
                lambda s, now, adapter=adapter, cache=cache: adapter(
                    **now, row=schedule.rows[s], forecast_weights=schedule.forecast_weights[s], cache=cache).sample,
                inputs, 7, dtype)
    truth = results["hooks", torch.float64]
    assert_close(results["ours", torch.float32], truth)

    def error(who):
        return (results[who, torch.bfloat16] - truth).norm()

    assert error("ours") <= 1.25 * error("hooks") < 0.2 * truth.norm()


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


@torch.no_grad()
def test_a_cache_of_another_transformer(small):
    """Also where the adapters are several, what counts is the transformer."""
    model, inputs = small
    first, again, other = adapt(model), adapt(model), adapt(random_weights(copy.deepcopy(model)))
    cache, row = first.new_cache(), (False,) * len(first.branches)
    expected = first(**inputs, cache=cache).sample
    message = "cache: holds a forward of {0} at .*, got one of {0} at .*, another model".format(type(model).__name__)
    for options in (dict(row=row), {}):
        with pytest.raises(ValueError, match=message):
            other(**inputs, cache=cache, **options)
    assert torch.equal(again(**inputs, cache=cache, row=row).sample, expected)


def test_a_trajectory_that_changes_its_mode(small):
    model, inputs = small
    adapter = adapt(model)
    cache = adapter.new_cache()
    with torch.inference_mode():
        adapter(**inputs, cache=cache)
    with torch.no_grad(), pytest.raises(ValueError, match=r"torch\.inference_mode\(\), got one under torch\.no_grad"):
        adapter(**inputs, cache=cache)


def test_gradients_through_several_cached_steps_are_refused(small):
    model, inputs = small
    adapter = adapt(model.requires_grad_(True))
    cache, x = adapter.new_cache(), inputs["hidden_states"]
    some = tuple(k % 2 == 0 for k in range(len(adapter.branches)))
    for row in (None, some, tuple(not compute for compute in some)):
        x = adapter(**inputs | dict(hidden_states=x), row=row, cache=cache).sample[:, :4]
    with pytest.raises(RuntimeError, match=r"Call backward\(\) after each step"):
        x.sum().backward()
