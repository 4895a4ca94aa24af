"""`enable_cache` on a transformer with hooks: offloading, casting, quantization."""

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import DiTPipeline

import harmonica_dit
from support.enable_checks import check_refusal, last_output, run_with_hooks
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


def test_the_hooks_of_offloading_are_set_anew_on_the_transformer_itself(dit, monkeypatch):
    """diffusers does so at the end of a call, with whatever `pipe.transformer` is then."""
    seen = []
    monkeypatch.setattr(DiTPipeline, "maybe_free_model_hooks", lambda self: seen.append(self.transformer))
    harmonica_dit.enable_cache(dit, random_schedule(dit.transformer))
    run(dit)
    assert len(seen) == 1 and seen[0] is vars(dit)["transformer"]


def test_offloading_of_single_modules(dit, sigma):
    """accelerate's sequential offload: DiT's weights lie in layers that are called; PixArt's blocks own some."""
    schedule = random_schedule(dit.transformer)
    expected = run_with_hooks(dit, schedule)
    for pipe in (dit, sigma):
        cpu_offload(pipe.transformer, "cpu")
    assert dit.transformer.proj_out_2.weight.is_meta
    harmonica_dit.enable_cache(dit, schedule)
    assert_close(run(dit), expected)
    check_refusal(sigma, ValueError, "transformer_blocks.0: has a replaced forward .*enable_model_cpu_offload",
                  random_schedule(sigma.transformer))


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_diffusers_group_offload_is_refused(sigma, level):
    sigma.transformer.enable_group_offload(torch.device("cpu"), offload_type=level, num_blocks_per_group=1)
    check_refusal(sigma, ValueError, "transformer_blocks.*: has a replaced forward|its forward has been replaced",
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


def test_another_replaced_forward_is_refused(dit):
    dit.transformer.forward = dit.transformer.forward
    check_refusal(dit, ValueError, "pipe.transformer: its forward has been replaced", random_schedule(dit.transformer))
