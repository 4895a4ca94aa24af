"""What a transformer's call is described by, and which later calls are taken for the same."""

import gc
import weakref

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, ZImageTransformer2DModel
from torch import nn

import harmonica_dit
from harmonica_dit.pipelines.calls import Call, is_alike, same_memory, same_values, see
from support.many_pipes import PIPES
from support.own_loops import OwnLoop, make_own

X, TEXT, T = torch.randn(1, 6, 4), torch.randn(1, 3, 16), torch.tensor([0.5])


def call_of(cls, *args, context=None, **kwargs):
    return Call(cls.__new__(cls), None, args, kwargs, context)


def test_arguments_by_place_and_by_name():
    for call in (call_of(FluxTransformer2DModel, X, TEXT, timestep=T, img_ids=X, context="cond"),
                 call_of(FluxTransformer2DModel, timestep=T, img_ids=X, encoder_hidden_states=TEXT, hidden_states=X,
                         context="cond")):
        assert call.latents == [X] and call.timestep is T
        assert call.conditioning == dict(encoder_hidden_states=TEXT, cache_context="cond")
        assert call.others == dict(img_ids=X)
    call = call_of(ZImageTransformer2DModel, [X, X], T, [TEXT], return_dict=False)
    assert call.latents == [X, X] and call.timestep is T
    assert call.conditioning == dict(cap_feats=[TEXT], cache_context=None) and call.others == dict(return_dict=False)


def test_latents_are_floats_and_no_conditioning():
    class Tokens(nn.Module):
        def forward(self, input_ids, text_states, y, vision_tokens, t):
            pass

    call = call_of(Tokens, torch.tensor([1]), TEXT, X, [X, X], 3.0)
    assert call.latents == [X, X] and call.timestep == 3.0 and set(call.others) == {"input_ids"}
    with pytest.raises(ValueError, match="was called without a tensor to denoise; its arguments are input_ids, y"):
        call_of(Tokens, torch.tensor([1]), y=X)


def test_the_signature_has_all_that_a_cache_wants_to_be_the_same():
    def signature(x=X, **more):
        return call_of(FluxTransformer2DModel, x, TEXT, timestep=T, **more).signature

    one = signature()
    assert signature(X + 1) == one and signature(return_dict=False) == one
    assert signature(X.double()) != one and signature(X[:, 1:]) != one and signature(img_ids=X) != one
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert signature() != one
    with torch.autocast("cpu", torch.bfloat16):
        assert signature() != one


SAME = {"number": (1.5, 1.5), "text": ("a", "a"), "none": (None, None), "dict": ({"a": [1, X]}, {"a": (1, X)}),
        "view": (X, X.view(X.shape)), "nothing": ([], ())}
EQUAL = {"copy": (X, X.clone()), "copy in a list": ([X, None], [X.clone(), None])}
OTHER = {"number": (1.5, 2.5), "kind": (1, True), "length": ([X], [X, X]), "names": ({"a": 1}, {"b": 1}),
         "values": (X, X + 1), "shape": (X, X[:, 1:]), "dtype": (X, X.double()), "array": (np.ones(2), np.ones(2)),
         "object": (object(), object()), "tensor and none": (X, None), "dict and list": ({}, [])}


@pytest.mark.parametrize("seen, now, by_memory, by_value", [
    *((*pair, True, True) for pair in SAME.values()), *((*pair, False, True) for pair in EQUAL.values()),
    *((*pair, False, False) for pair in OTHER.values())], ids=[*SAME, *EQUAL, *OTHER])
def test_alike(seen, now, by_memory, by_value):
    assert is_alike(see(seen, copies=True), now, same_memory) == by_memory
    assert is_alike(see(seen, copies=True), now, same_values) == by_value


def test_what_was_written_into_is_not_alike():
    """Even to itself: what it was is gone. A list that was changed is compared with what it held."""
    t, listed = X.clone(), [X]
    seen, seen_list = see(t, copies=True), see(listed, copies=True)
    t[0, 0, 0] += 1
    listed.append(X)
    for tensors in (same_memory, same_values):
        assert not is_alike(seen, t, tensors) and not is_alike(seen, t.clone(), tensors)
        assert not is_alike(seen_list, listed, tensors) and is_alike(seen_list, [X], tensors)


def test_tensors_of_inference_mode_are_compared_with_copies():
    with torch.inference_mode():
        t = torch.randn(3)
        seen, own = see(t, copies=True), see(t, copies=False)
        assert is_alike(seen, t, same_values) and not is_alike(seen, t, same_memory) and is_alike(own, t, same_memory)
        before = t.clone()
        t.neg_()
        assert not is_alike(seen, t, same_values) and is_alike(seen, before, same_values)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's, in Flux's norms
def test_autocast_that_changes_from_step_to_step():
    """The steps of one kind have a cache, those of the other another one."""
    class Casts(OwnLoop):
        def predict(self, x, t, i):
            with torch.autocast("cpu", torch.bfloat16, enabled=i >= 4):
                return super().predict(x, t, i).float()

    pipe = make_own(Casts)
    harmonica_dit.enable_cache(pipe, 1.7)
    pipe()
    streams = harmonica_dit.summary(pipe).streams
    assert [(stream.steps, sum(stream.fallbacks.values())) for stream in streams] == [(4, 0)] * 2 + [(4, 1)] * 2


@pytest.mark.parametrize("name", ["flux", "pixart-sigma"])
def test_a_gradient_that_is_wanted_of_a_late_step(name):
    """As fine-tuning by a reward does: what was reused there would be constant, so the step is computed."""
    transformer = PIPES[name].pipe().transformer.requires_grad_(True)
    if name == "flux":
        given = dict(encoder_hidden_states=TEXT, pooled_projections=torch.randn(1, 12), img_ids=torch.randn(6, 3),
                     txt_ids=torch.zeros(3, 3), guidance=torch.ones(1))
        x = X
    else:
        given, x = dict(encoder_hidden_states=torch.randn(1, 9, 20), return_dict=True), torch.randn(1, 4, 8, 8)

    def last_gradient():
        for t in (1.0, 0.75, 0.5, 0.25):
            with torch.set_grad_enabled(t == 0.25):  # which would be forecast
                output = transformer(hidden_states=x, timestep=torch.tensor([t]), **given).sample
        transformer.zero_grad()
        output.sum().backward()
        return torch.cat([p.grad.flatten() for p in transformer.parameters() if p.grad is not None])

    expected = last_gradient()
    harmonica_dit.enable_cache(transformer, 1.5, timesteps=[1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(last_gradient(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert harmonica_dit.summary(transformer).cur > 0


def test_arguments_that_are_new_at_each_step_are_let_go():
    """They may be as large as a control net's outputs."""
    made = []

    class Controlled(OwnLoop):
        prompts = 1

        def predict(self, x, t, i):
            if i == 3:
                gc.collect()
                self.alive = sum(control() is not None for control in made)
            control = torch.zeros(1, 6, 32)
            made.append(weakref.ref(control))
            return self.forward(x, t, self.texts[0], controlnet_block_samples=[control])

    pipe = make_own(Controlled)
    harmonica_dit.enable_cache(pipe, 1.7)
    pipe()
    assert pipe.alive == 0 and harmonica_dit.summary(pipe).cur == 0.5
