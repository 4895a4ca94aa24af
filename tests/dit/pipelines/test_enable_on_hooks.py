"""`enable_cache` on a transformer with hooks: offloading, casting, quantization."""

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import FirstBlockCacheConfig

import harmonica_dit
from support.enable_checks import check_refusal, last_output, run_with_hooks
from support.many_pipes import PIPES
from support.pipes import HookedCache, make_pipe, random_schedule, run, small_dit, small_pixart
from support.tolerance import assert_close


def test_module_hooks_on_the_transformer_run(dit):
    harmonica_dit.enable_cache(dit, random_schedule(dit.transformer))
    seen = []
    dit.transformer.register_forward_pre_hook(lambda module, args: seen.append("before"))
    dit.transformer.register_forward_hook(lambda module, args, output: seen.append("after"))
    run(dit)
    assert seen == ["before", "after"] * 6


@pytest.mark.parametrize("first", ["offload", "apply"])
def test_model_offload_is_honoured(dit, first):
    """accelerate's hook, as enable_model_cpu_offload sets it: around every step, on the transformer itself."""
    schedule = random_schedule(dit.transformer)
    expected = run_with_hooks(dit, schedule)
    plain = run(dit)
    if first == "apply":
        harmonica_dit.enable_cache(dit, schedule)
    _, hook = cpu_offload_with_hook(dit.transformer, "cpu")
    if first == "offload":
        harmonica_dit.enable_cache(dit, schedule)
    moved, pre_forward = [], hook.hook.pre_forward
    hook.hook.pre_forward = lambda module, *a, **k: moved.append(module) or pre_forward(module, *a, **k)
    assert_close(run(dit), expected)
    assert len(moved) == 6 and all(module is dit.transformer for module in moved)
    harmonica_dit.disable_cache(dit)
    assert torch.equal(run(dit), plain)


def test_offloading_of_single_modules(dit, sigma):
    """accelerate's sequential offload: DiT's weights lie in layers that are called; PixArt's blocks own some, so that
    its fused path refuses."""
    schedule = random_schedule(dit.transformer)
    expected = run_with_hooks(dit, schedule)
    cpu_offload(dit.transformer, "cpu")
    assert dit.transformer.proj_out_2.weight.is_meta
    harmonica_dit.enable_cache(dit, schedule)
    assert_close(run(dit), expected)
    harmonica_dit.enable_cache(dit, 1.5)
    assert run(dit).isfinite().all() and harmonica_dit.summary(dit).unit == "trunk"
    cpu_offload(sigma.transformer, "cpu")
    harmonica_dit.enable_cache(sigma, random_schedule(sigma.transformer))  # on the generic path


@pytest.mark.parametrize("name", ["flux", "sd3", "wan"])
def test_offloading_of_single_modules_on_the_generic_path(name):
    """Some of these transformers hold weights of their own, the others' first one is not there when they are called."""
    entry = PIPES[name]
    pipe = entry.pipe()
    harmonica_dit.enable_cache(pipe, 1.5)
    expected = entry.call(pipe)
    cpu_offload(pipe.transformer, "cpu")
    assert torch.equal(entry.call(pipe), expected)


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_diffusers_group_offload_is_refused(sigma, level):
    sigma.transformer.enable_group_offload(torch.device("cpu"), offload_type=level, num_blocks_per_group=1)
    check_refusal(sigma, ValueError, "offloaded group by group.*use pipe.enable_model_cpu_offload",
                  random_schedule(sigma.transformer))


def test_layerwise_casting_is_honoured(sigma):
    """diffusers' hooks on single layers: stored in 8 bits, computed in 32."""
    schedule = random_schedule(sigma.transformer)
    exact = run_with_hooks(sigma, schedule)
    sigma.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert sigma.transformer.transformer_blocks[0].ff.net[-1].weight.dtype == torch.float8_e4m3fn
    expected = run_with_hooks(sigma, schedule)
    assert not torch.equal(expected, exact)
    harmonica_dit.enable_cache(sigma, schedule)
    assert_close(run(sigma), expected)


@pytest.mark.parametrize("kind", ["dit", "sigma"])
@pytest.mark.parametrize("first", ["quantize", "apply"])
def test_quantized_by_torchao(kind, first):
    """Int8 weights, and int8 activations too: as diffusers with the same linears, only with branches reused."""
    torchao = pytest.importorskip("torchao.quantization")
    for config in (torchao.Int8WeightOnlyConfig(), torchao.Int8DynamicActivationInt8WeightConfig()):
        transformer = (small_dit if kind == "dit" else small_pixart)(attention_head_dim=16, **(
            {} if kind == "dit" else dict(cross_attention_dim=32)))
        pipe = make_pipe(kind, transformer=transformer)
        schedule = random_schedule(transformer)
        with HookedCache(transformer, schedule):
            exact = last_output(pipe)
        if first == "apply":
            harmonica_dit.enable_cache(pipe, schedule)
        torchao.quantize_(transformer, config)
        if first == "quantize":
            harmonica_dit.enable_cache(pipe, schedule)
        ours = last_output(pipe)
        harmonica_dit.disable_cache(pipe)
        with HookedCache(transformer, schedule):
            theirs = last_output(pipe)
        error = (theirs - exact).norm()
        assert 0 < error < 0.5 * exact.norm()
        if isinstance(config, torchao.Int8WeightOnlyConfig):
            assert_close(ours, theirs)
        else:  # rounding the activations multiplies every difference in their last bits
            assert (ours - exact).norm() <= 1.5 * error


def test_another_replaced_forward_runs(dit):
    """The fused path would pass it by."""
    schedule, forward, calls = random_schedule(dit.transformer), dit.transformer.forward, []
    expected = run_with_hooks(dit, schedule)
    dit.transformer.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    harmonica_dit.enable_cache(dit, schedule)
    assert_close(run(dit), expected)
    assert len(calls) == 6 and harmonica_dit.summary(dit).path == "generic"


def test_hooks_on_a_block_run(dit):
    schedule, calls = random_schedule(dit.transformer), []
    expected = run_with_hooks(dit, schedule)
    dit.transformer.transformer_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    harmonica_dit.enable_cache(dit, schedule)
    assert_close(run(dit), expected)
    assert len(calls) == 6
    assert "the fused path is not used: transformer_blocks.0: has hooks" in str(harmonica_dit.summary(dit))


def test_another_cache_on_the_transformer_is_refused():
    entry = PIPES["flux"]
    pipe = entry.pipe()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="another cache is enabled on it.*transformer.disable_cache()"):
        harmonica_dit.enable_cache(pipe, 1.8)
    pipe.transformer.disable_cache()
    harmonica_dit.enable_cache(pipe, 1.8)
    entry.call(pipe)
