"""What is no pipeline of the usual kind: taken, or said what to pass instead."""

import pytest
import torch
from diffusers.modular_pipelines import FluxAutoBlocks

import harmonica_dit
from harmonica_dit.methods import fora, trunk_forecast, uncached
from harmonica_dit.pipelines.adapters import adapt
from harmonica_dit.pipelines.adapters.generic import GenericAdapter
from support.cached_calls import COMPUTED, STEPS
from support.many_pipes import PIPES
from support.small_pipe import Draw
from support.trunk_by_hooks import trunk_by_hooks


def test_a_pipeline_where_something_else_is_expected():
    pipe = PIPES["flux"].pipe()
    for make in (adapt, GenericAdapter):
        with pytest.raises(TypeError, match="transformer: got FluxPipeline, expected .* pass pipe.transformer"):
            make(pipe)
        with pytest.raises(TypeError, match="transformer: got int, expected a diffusers transformer$"):
            make(3)
    for make in (lambda net: fora(net, 5, every=2), lambda net: trunk_forecast(net, 5, every=2),
                 lambda net: uncached(net, 5)):
        with pytest.raises(TypeError, match=r"net: got FluxPipeline, .* an adapter: adapt\(pipe.transformer\), after"):
            make(pipe)
        with pytest.raises(TypeError, match=r"net: got FluxTransformer2DModel, .*: adapt\(transformer\), after its"):
            make(pipe.transformer)
        with pytest.raises(ValueError, match=r"adapter: has not been traced; call adapter.trace"):
            make(adapt(pipe.transformer))


def test_an_adapter_or_a_denoiser_where_a_pipeline_is_expected():
    for other in (adapt(PIPES["flux"].pipe().transformer), 3, None):
        with pytest.raises(TypeError, match=f"target: got {type(other).__name__}, expected a diffusers pipeline with"):
            harmonica_dit.enable_cache(other, 1.7)


def test_a_wrong_argument_is_told_in_the_pipelines_own_words():
    entry, pipe = PIPES["flux"], PIPES["flux"].pipe()
    harmonica_dit.enable_cache(pipe, 1.7)
    with pytest.raises(TypeError, match=r"FluxPipeline.__call__\(\) got an unexpected keyword argument 'prmpt'"):
        entry.call(pipe, prmpt="a red cat")


def test_a_modular_pipeline():
    """diffusers' pipelines made of blocks: the progress bar is a block's, but the scheduler is heard."""
    blocks, small = FluxAutoBlocks(), PIPES["flux"].pipe()
    for name in list(blocks.sub_blocks):
        if name != "denoise":
            blocks.sub_blocks.pop(name)
    pipe = blocks.init_pipeline()
    pipe.update_components(transformer=small.transformer, scheduler=small.scheduler)

    def call():
        draw = Draw(torch.Generator().manual_seed(0), torch.float32)
        return pipe(height=64, width=96, num_inference_steps=STEPS, generator=draw.generator, output="latents",
                    prompt_embeds=draw(1, 5, 16), pooled_prompt_embeds=draw(1, 12))

    plain, cls = call(), type(pipe)
    with trunk_by_hooks(pipe.transformer, 1, STEPS, COMPUTED):
        expected = call()
    harmonica_dit.enable_cache(pipe, 1.7)
    torch.testing.assert_close(call(), expected)
    assert not torch.equal(expected, plain) and harmonica_dit.summary(pipe).speedup >= 1.7
    harmonica_dit.disable_cache(pipe)
    assert torch.equal(call(), plain) and type(pipe) is cls
