"""`enable_cache` where somebody has put a method of their own into diffusers' or torch's classes: it runs."""

import functools

import pytest
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from diffusers.models.activations import GELU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormZero
from torch import nn

import harmonica_dit
from harmonica_dit.models.plain_modules import is_own
from harmonica_dit.pipelines.adapters import adapt
from harmonica_dit.pipelines.adapters.generic import GenericAdapter
from support.enable_checks import run_with_hooks
from support.pipes import make_pipe, random_schedule, run
from support.tolerance import assert_close

CLASSES = [(Attention, "forward"), (AttnProcessor2_0, "__call__"), (FeedForward, "forward"), (GELU, "forward"),
           (nn.Linear, "forward"), (BasicTransformerBlock, "forward"), (AdaLayerNormZero, "forward"),
           (nn.LayerNorm, "forward"), (DiTTransformer2DModel, "forward"), (PixArtTransformer2DModel, "forward")]
PASSED_BY = (BasicTransformerBlock, AdaLayerNormZero, nn.LayerNorm)  # by the fused path


def substitute(cls, name):
    """Does something else with the first argument, and looks like the method that it replaces."""
    method = getattr(cls, name)

    def mix(x):
        return x + 0.3 * x.roll(1, -1)

    @functools.wraps(method)
    def changed(self, first, *args, **kwargs):
        if cls is not AttnProcessor2_0:
            return method(self, mix(first), *args, **kwargs)
        return method(self, first, mix(args[0]), *args[1:], **kwargs)  # first comes the attention

    return changed


@pytest.mark.parametrize("kind", ["dit", "sigma"])
@pytest.mark.parametrize("cls, name", CLASSES, ids=[cls.__name__ for cls, _ in CLASSES])
@pytest.mark.parametrize("first", ["cache", "substitute"])
def test_a_method_put_in_the_place_of_another(kind, cls, name, first, monkeypatch):
    pipe = make_pipe(kind)
    schedule = random_schedule(pipe.transformer)
    plain = run_with_hooks(pipe, schedule)
    if first == "cache":
        harmonica_dit.enable_cache(pipe, schedule)
        assert_close(run(pipe), plain)
        assert harmonica_dit.summary(pipe).path == "fused" and is_own(cls, name)
    monkeypatch.setattr(cls, name, substitute(cls, name))
    assert not is_own(cls, name)
    if first == "substitute":
        harmonica_dit.enable_cache(pipe, schedule)
    found, summary = run(pipe), harmonica_dit.summary(pipe)
    harmonica_dit.disable_cache(pipe)
    expected = run_with_hooks(pipe, schedule)
    assert_close(found, expected)
    used = any(type(module) is cls for module in pipe.transformer.modules()) or cls is AttnProcessor2_0
    assert used == ((expected - plain).abs().max() > 1e-4)
    if used and cls in PASSED_BY:
        assert f"put in the place of {cls.__name__}'s" in summary.left_out["the fused path"]
    assert summary.path == ("generic" if used and (cls in PASSED_BY or issubclass(cls, type(pipe.transformer)))
                            else "fused")


def test_a_subclass_with_a_forward_of_its_own():
    class Halves(DiTTransformer2DModel):
        def forward(self, hidden_states, **others):
            return super().forward(hidden_states / 2, **others)

    class Named(DiTTransformer2DModel):
        """Changes nothing."""

    pipe = make_pipe("dit")
    schedule = random_schedule(pipe.transformer)
    for cls, path in ((Halves, "generic"), (Named, "fused")):
        pipe.transformer.__class__ = cls
        expected = run_with_hooks(pipe, schedule)
        harmonica_dit.enable_cache(pipe, schedule)
        assert_close(run(pipe), expected)
        assert harmonica_dit.summary(pipe).path == path
        assert isinstance(adapt(pipe.transformer), GenericAdapter) == (path == "generic")


@pytest.mark.parametrize("kind, place", [("dit", "transformer_blocks.0.norm3"), ("dit", "norm_out"),
                                         ("dit", "transformer_blocks.1.norm1.norm"), ("sigma", "norm_out"),
                                         ("sigma", "transformer_blocks.0.norm1")])
def test_norms_with_weights(kind, place):
    """Put in place of those without, which the fused path does itself."""
    pipe = make_pipe(kind)
    schedule = random_schedule(pipe.transformer)
    parent, _, name = place.rpartition(".")
    norm = nn.LayerNorm(24, eps=pipe.transformer.get_submodule(place).eps)
    for p in norm.parameters():
        nn.init.normal_(p)
    harmonica_dit.enable_cache(pipe, schedule)
    run(pipe)
    setattr(pipe.transformer.get_submodule(parent), name, norm.requires_grad_(False))
    found, summary = run(pipe), harmonica_dit.summary(pipe)
    harmonica_dit.disable_cache(pipe)
    assert_close(found, run_with_hooks(pipe, schedule))
    assert summary.left_out["the fused path"].startswith(f"{place}: has weights, which would not run")


@pytest.mark.parametrize("changes, said", [
    (dict(cross_attention_dim=24), "a cross-attention"), (dict(norm_type="ada_norm"), "the norms of ada_norm"),
    (dict(positional_embeddings="sinusoidal", num_positional_embeddings=64), "other inputs of its attentions")])
def test_blocks_of_another_kind(changes, said):
    """Of the class that the adapter knows, but with more in them."""
    transformer = make_pipe("dit").transformer
    other = dict(activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
                 norm_elementwise_affine=False, attention_bias=True) | changes
    block = BasicTransformerBlock(24, 3, 8, **other)
    if "norm_type" in changes:  # so that no norm's class tells it
        block.norm1, block.norm3 = transformer.transformer_blocks[0].norm1, transformer.transformer_blocks[0].norm3
    transformer.transformer_blocks[1] = block
    with pytest.raises(ValueError, match=f"transformer_blocks.1: has {said}, which would not run"):
        adapt(transformer)
