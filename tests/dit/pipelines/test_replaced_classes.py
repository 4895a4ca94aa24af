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
