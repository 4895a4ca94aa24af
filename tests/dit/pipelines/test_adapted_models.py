"""`enable_cache` on transformers that something has been put on, before or after: LoRA, quantization, hooks, casts."""

import gc
import weakref

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import FirstBlockCacheConfig, MagCacheConfig, apply_first_block_cache, apply_mag_cache
from peft import LoraConfig

import harmonica_dit
from harmonica_kernels.cache import Memory
from support import lora
from support.cached_calls import STEPS, check_by_hooks, every_second, every_second_of, with_cache
from support.generic_models import state
from support.many_pipes import PIPES
from support.pipes import names_of, random_schedule
from support.tolerance import assert_close

LAYERS = r".*\.(to_q|to_k|to_v|to_out\.0|proj_out|proj_mlp|ff\.net\.0\.proj|linear)"
BOTH = pytest.mark.parametrize("name", ["flux", "pixart-sigma"])  # the generic path and the fused one


@pytest.fixture
def flux():
    return PIPES["flux"], PIPES["flux"].pipe()


@BOTH
def test_a_lora_that_was_injected(name):
    entry, pipe = PIPES[name], PIPES[name].pipe()
    lora.inject(pipe.transformer, LAYERS)
    check_by_hooks(entry, pipe)


@BOTH
def test_a_peft_model_as_the_transformer(name):
    entry, pipe = PIPES[name], PIPES[name].pipe()
    lora.inject(pipe.transformer, LAYERS)
    expected, pipe = with_cache(entry, pipe), entry.pipe()
    inside, pipe.transformer = pipe.transformer, lora.wrap(pipe.transformer, LAYERS)
    harmonica_dit.enable_cache(pipe, 1.7)
    assert torch.equal(entry.call(pipe, steps=STEPS), expected)
    with pipe.transformer.disable_adapter():
        without = entry.call(pipe, steps=STEPS)
    harmonica_dit.disable_cache(pipe)
    # of a layer that a LoRA is on, disabled too, the fused path takes bias and GELU one by one
    assert_close(without, with_cache(entry, entry.pipe()))
    assert "forward" not in vars(inside)


def test_diffusers_own_calls_for_a_lora(flux):
    """Each of them after the cache was enabled and used."""
    entry, pipe = flux
    transformer, before = pipe.transformer, with_cache(entry, pipe)
    config = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "proj_mlp"], init_lora_weights=False)
    for change, without in ((lambda: transformer.add_adapter(config, "a"), False), (transformer.disable_lora, True),
                            (transformer.enable_lora, False), (transformer.fuse_lora, False),
                            (transformer.unfuse_lora, False), (lambda: transformer.set_adapters(["a"], [0.2]), False),
                            (lambda: transformer.delete_adapters("a"), True)):
        harmonica_dit.enable_cache(pipe, 1.7)
        entry.call(pipe, steps=STEPS)
        change()
        found = entry.call(pipe, steps=STEPS)
        harmonica_dit.disable_cache(pipe)
        assert torch.equal(found, with_cache(entry, pipe))
        assert ((found - before).norm() < 1e-4 * before.norm()) == without  # fusing rounds


def test_a_lora_scale_in_the_call_is_changed_by_a_callback(flux):
    """From then on nothing that the old scale made is reused."""
    entry, pipe = flux
    lora.inject(pipe.transformer, LAYERS)
    scale = {"scale": 1.0}

    def rescale(pipe, step, timestep, given):
        if step == 3:
            scale["scale"] = 0.3
        return given

    harmonica_dit.enable_cache(pipe, 1.7)
    entry.call(pipe, steps=STEPS, joint_attention_kwargs=scale, callback_on_step_end=rescale)
    streams = harmonica_dit.summary(pipe).streams
    assert [stream.steps for stream in streams] == [4] * 4 and all(stream.reused for stream in streams)
    assert [sum(stream.fallbacks.values()) for stream in streams] == [0, 0, 1, 1]


def changed_in_the_middle(entry, pipe, config, change):
    """The number of streams, where a callback changes the model after step 2; the next call is as any."""
    def callback(pipe, step, timestep, given):
        if step == 2:
            change(pipe.transformer)
        return given

    harmonica_dit.enable_cache(pipe, config)
    assert entry.call(pipe, steps=STEPS, callback_on_step_end=callback).isfinite().all()
    streams = harmonica_dit.summary(pipe).streams
    after = entry.call(pipe, steps=STEPS)
    harmonica_dit.disable_cache(pipe)
    assert torch.equal(after, with_cache(entry, pipe, config))
    return len(streams)


@pytest.mark.parametrize("unit", ["trunk", "branch"])
def test_modules_that_are_exchanged_in_the_middle(flux, unit):
    """A LoRA in single-stream blocks, whose branch is a linear layer; a first, a last and an additional block."""
    entry, pipe = flux
    other = entry.pipe(seed=1).transformer
    config = 1.7 if unit == "trunk" else every_second_of(pipe.transformer)

    def first(model):
        model.transformer_blocks[0] = other.transformer_blocks[0]

    def last(model):
        model.single_transformer_blocks[-1] = other.single_transformer_blocks[-1]

    for change in (first, last):
        assert changed_in_the_middle(entry, pipe, config, change) == 4
    assert changed_in_the_middle(entry, pipe, config, lambda model: lora.inject(model, LAYERS)) == 4
    if unit == "trunk":  # a schedule of branches knows nothing of it, and it is computed
        more = lambda model: model.single_transformer_blocks.append(other.single_transformer_blocks[0])
        assert changed_in_the_middle(entry, pipe, config, more) == 4


@pytest.mark.parametrize("name", ["flux", "pixart-sigma", "dit"])
def test_blocks_that_are_exchanged_or_added_between_calls(name):
    entry, pipe = PIPES[name], PIPES[name].pipe()
    others = [PIPES[name].pipe(seed=seed).transformer.transformer_blocks[0] for seed in (1, 2)]
    blocks = pipe.transformer.transformer_blocks
    schedule = every_second_of(pipe.transformer) if name == "flux" else None
    for change in (lambda: blocks.__setitem__(0, others[0]), lambda: blocks.append(others[1])):
        for config in (1.7, schedule or 1.7):
            harmonica_dit.enable_cache(pipe, config)
            entry.call(pipe, steps=STEPS)
            change()
            found = entry.call(pipe, steps=STEPS)
            harmonica_dit.disable_cache(pipe)
            assert torch.equal(found, with_cache(entry, pipe, config))
    if name != "flux":
        harmonica_dit.enable_cache(pipe, random_schedule(pipe.transformer, STEPS))
        entry.call(pipe, steps=STEPS)
        blocks.append(others[0])
        with pytest.raises(ValueError, match=f"the model .* has {len(names_of(pipe.transformer))}"):
            entry.call(pipe, steps=STEPS)


@pytest.mark.parametrize("name", ["flux", "sd3", "z-image"])
def test_int8_weights_on_the_generic_path(name):
    torchao = pytest.importorskip("torchao.quantization")
    entry, pipe = PIPES[name], PIPES[name].pipe()
    plain = with_cache(entry, pipe)
    harmonica_dit.enable_cache(pipe, 1.7)
    torchao.quantize_(pipe.transformer, torchao.Int8WeightOnlyConfig())
    found = entry.call(pipe, steps=STEPS)
    harmonica_dit.disable_cache(pipe)
    assert torch.equal(found, with_cache(entry, pipe)) and not torch.equal(found, plain)
    check_by_hooks(entry, pipe)


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_layerwise_casting_on_the_generic_path(name):
    entry, pipe = PIPES[name], PIPES[name].pipe()
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    check_by_hooks(entry, pipe)


@pytest.mark.parametrize("name", ["flux", "wan", "dit", "pixart-sigma"])
def test_model_offload_set_and_removed_at_any_time(name):
    """accelerate's hook: set before and after, removed between two calls, and in a call, as diffusers does at its end.
    """
    entry, pipe = PIPES[name], PIPES[name].pipe()
    expected, forward = with_cache(entry, pipe), type(pipe.transformer).forward
    harmonica_dit.enable_cache(pipe, 1.7)
    _, hook = cpu_offload_with_hook(pipe.transformer, "cpu")
    found = [entry.call(pipe, steps=STEPS)]
    harmonica_dit.enable_cache(pipe, 1.7)
    found.append(entry.call(pipe, steps=STEPS))
    hook.remove()
    found.append(entry.call(pipe, steps=STEPS))

    def at_the_end(*_):
        nonlocal hook
        hook.remove()
        _, hook = cpu_offload_with_hook(pipe.transformer, "cpu")

    _, hook = cpu_offload_with_hook(pipe.transformer, "cpu")
    handle = pipe.transformer.register_forward_hook(at_the_end)
    found.append(entry.call(pipe, steps=STEPS))
    handle.remove()
    harmonica_dit.disable_cache(pipe)
    hook.remove()
    assert all(torch.equal(image, expected) for image in found)
    assert pipe.transformer.forward.__func__ is forward and "cache_context" not in vars(pipe.transformer)


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "sana"])
@pytest.mark.parametrize("unit", ["trunk", "branch"])
def test_sequential_offload_on_the_generic_path(name, unit):
    entry, pipe = PIPES[name], PIPES[name].pipe()
    config = 1.7 if unit == "trunk" else every_second_of(pipe.transformer)
    expected = with_cache(entry, pipe, config)
    cpu_offload(pipe.transformer, "cpu", offload_buffers=True)
    assert next(pipe.transformer.parameters()).is_meta
    assert torch.equal(with_cache(entry, pipe, config), expected)


def test_another_cache_by_its_function(flux):
    """diffusers' `apply_...`, which its `is_cache_enabled` does not see: found before anything runs, also later."""
    entry, pipe = flux
    harmonica_dit.enable_cache(pipe, 1.7)
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="transformer_blocks.0: another cache is on it .fbc_leader_block_hook."):
        entry.call(pipe)
    pipe = entry.pipe()
    apply_mag_cache(pipe.transformer, MagCacheConfig(num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS))
    with pytest.raises(ValueError, match="another cache is on it .mag_cache"):
        harmonica_dit.enable_cache(pipe, 1.7)


@pytest.mark.parametrize("name", ["flux", "wan", "aura-flow", "z-image"])
@pytest.mark.parametrize("unit", ["trunk", "branch"])
def test_bfloat16_on_the_generic_path_is_as_near_the_truth(name, unit):
    """Forecasts included: at most twice as far from what float32 gives as the plain pipeline is."""
    entry = PIPES[name]
    rounded, exact = entry.pipe(), entry.pipe()
    rounded.transformer.to(torch.bfloat16)
    exact.transformer.load_state_dict(rounded.transformer.state_dict())
    config = 1.7 if unit == "trunk" else every_second_of(exact.transformer)

    def error(run):
        return (run(rounded).float() - run(exact)).norm()

    plain = error(lambda pipe: entry.call(pipe, steps=STEPS))
    assert 0 < error(lambda pipe: with_cache(entry, pipe, config)) <= 2 * plain


@pytest.mark.parametrize("name", ["flux", "sd3", "wan-of-two", "pixart-sigma"])
@pytest.mark.parametrize("unit", ["trunk", "branch"])
def test_no_cache_outlives_its_call(name, unit, monkeypatch):
    """On both paths they are freed at once, not when the garbage collector comes."""
    made, new = [], Memory.__init__
    monkeypatch.setattr(Memory, "__init__", lambda self, *a: made.append(weakref.ref(self)) or new(self, *a))
    entry, pipe = PIPES[name], PIPES[name].pipe()
    fused = name == "pixart-sigma"
    config = 1.7 if unit == "trunk" else every_second(names_of(pipe.transformer)) if fused else every_second_of(
        pipe.transformer)
    harmonica_dit.enable_cache(pipe, config)
    gc.collect()
    gc.disable()
    try:
        entry.call(pipe, steps=STEPS)
        assert len(made) >= entry.calls and not any(cache() is not None for cache in made)
    finally:
        gc.enable()


def test_disabling_leaves_nothing_on_any_object(flux):
    entry, pipe = flux
    lora.inject(pipe.transformer, LAYERS)
    _, hook = cpu_offload_with_hook(pipe.transformer, "cpu")
    plain = entry.call(pipe, steps=STEPS)

    def objects():
        return (state(pipe.transformer), type(pipe), sorted(vars(pipe)), type(pipe.scheduler),
                sorted(vars(pipe.scheduler)), [type(module) for module in pipe.transformer.modules()])

    before = objects()
    for config in (1.7, every_second_of(pipe.transformer)):
        assert not torch.equal(with_cache(entry, pipe, config), plain)
        assert objects() == before
    assert torch.equal(entry.call(pipe, steps=STEPS), plain)
