"""A ControlNet runs at every step; what it adds between the transformer's blocks is seen at the steps that run them."""

import pytest
import torch

import harmonica_dit
from support.control_pipes import CONTROL_PIPES, controlled
from support.trunk_by_hooks import trunk_by_hooks

STEPS, COMPUTED = 6, 3


@pytest.mark.parametrize("kind", CONTROL_PIPES)
def test_computed_steps_see_the_control_and_what_is_forecast_comes_from_them(kind):
    entry = CONTROL_PIPES[kind]
    pipe = entry.pipe()
    runs = []
    pipe.controlnet.register_forward_hook(lambda *_: runs.append(1))
    with trunk_by_hooks(pipe.transformer, entry.calls, STEPS, COMPUTED):
        expected = controlled(entry, pipe)
    runs.clear()
    harmonica_dit.enable_cache(pipe, 1.7)
    assert torch.equal(controlled(entry, pipe), expected) and harmonica_dit.summary(pipe).cur == 0.5
    assert len(runs) == STEPS
    assert not torch.equal(controlled(entry, pipe, controlnet_conditioning_scale=0.0), expected)
