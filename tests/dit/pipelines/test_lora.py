"""LoRA by peft on a pipeline with a schedule: put on before or after `enable_cache`, and changed while a call runs."""

import copy

import pytest
import torch

import harmonica_dit
from support import lora
from support.enable_checks import last_output, run_with_hooks
from support.pipes import HookedCache, random_schedule, run
from support.tolerance import assert_close

LAYERS = r".*\.(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|norm1\.linear)|caption_projection\.linear_1"


CHANGES = (lambda model: lora.inject(model, LAYERS), lambda model: lora.set_scale(model, 0.5),
           lambda model: lora.enable(model, False), lambda model: lora.enable(model, True), lora.merge)


@pytest.mark.parametrize("first", ["cache", "lora"])
def test_put_on_scaled_disabled_and_merged_between_calls(pipe, first):
    """In float64: a random LoRA at its full scale can amplify float32's rounding a thousand times."""
    pipe = pipe.to(torch.float64)
    plain, schedule, changes = copy.deepcopy(pipe), random_schedule(pipe.transformer), list(CHANGES)
    if first == "lora":
        put_on = changes.pop(0)
        put_on(pipe.transformer), put_on(plain.transformer)
    harmonica_dit.enable_cache(pipe, schedule)
    for change in changes:
        change(pipe.transformer), change(plain.transformer)
        with HookedCache(plain.transformer, schedule):
            expected = last_output(plain)
        assert_close(last_output(pipe), expected, 1e-4)


def test_the_scale_is_changed_while_a_call_runs(sigma):
    """By the pipeline's callback after a step: the text's keys and values are those of the new scale from then on."""
    lora.inject(sigma.transformer, LAYERS)
    schedule = random_schedule(sigma.transformer)

    def rescale(step, t, latents):
        lora.set_scale(sigma.transformer, 1.0 if step == 5 else 1.0 - 0.3 * step)

    expected = run_with_hooks(sigma, schedule, callback=rescale)
    harmonica_dit.enable_cache(sigma, schedule)
    assert_close(run(sigma, callback=rescale), expected, 1e-4)
    harmonica_dit.disable_cache(sigma)
