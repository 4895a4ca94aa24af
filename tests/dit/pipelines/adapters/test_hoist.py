"""What depends only on the conditioning is hoisted out of the steps: modulation, keys and values."""

import pytest
import torch
from torch import nn

from harmonica_dit.pipelines.adapters import adapt
from support.fused_models import LoudProcessor, dit_inputs, pixart_inputs
from support.pipes import random_schedule, small_dit, small_pixart
from support.tolerance import assert_close


@pytest.mark.parametrize("put_on", [None, "norm1.linear", "norm1.emb.timestep_embedder.linear_2", "proj_out_1"])
def test_hoisted_modulation_is_the_steps_own(put_on):
    """Any steps of a trajectory at once. If a layer has a hook, it is evaluated whole, and at each step."""
    model = small_dit()
    if put_on is not None:
        inside = model if put_on == "proj_out_1" else model.transformer_blocks[1]
        inside.get_submodule(put_on).register_forward_hook(lambda module, args, output: output * 2)
    adapter, inputs = adapt(model), dit_inputs(model)
    schedule, timesteps = random_schedule(model, 7, 0.4), (999, 800, 650, 500, 310, 100, 3)
    results = []
    for hoisted in (False, True):
        cache = adapter.new_cache(schedule.history)
        with torch.no_grad():
            for s, t in enumerate(timesteps):
                inputs["timestep"] = torch.full((3,), t)
                if s in (0, 3):
                    window = slice(s, 3 if s == 0 else 7)
                    made = list(adapter.hoist(schedule.rows[window], timesteps[window], **inputs))
                more = made.pop(0) if hoisted else {}
                results.append(adapter(**inputs, **more, cache=cache, row=schedule.rows[s],
                                       forecast_weights=schedule.forecast_weights[s]).sample)
                if hoisted:
                    assert_close(results[-1], results[s])
                    assert ("modulation" in more) == (put_on is None)
                if hoisted and put_on is None:
                    for k, compute in enumerate(schedule.rows[s]):
                        assert (more["modulation"].shift[k] is None) == (not compute)


def test_modulation_is_hoisted_in_slices(monkeypatch):
    """Of as many steps as HOISTED bytes can hold, and one at least, each when it is asked for."""
    model = small_dit()
    adapter, inputs = adapt(model), dit_inputs(model)
    steps, embedded = 5, []
    # watched by the weight, because what is put on a module or into its class is asked at each step
    weight, linear = model.transformer_blocks[0].norm1.emb.timestep_embedder.linear_1.weight, nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, *bias: (
        (embedded.append(len(x)) if w is weight else None) or linear(x, w, *bias)))
    row_bytes = (3 * 4 + 2) * 3 * 24 * 4  # of a step: K = 4 branches, B = 3, D = 24, float32
    for at_once, slices in ((2, [2, 2, 1]), (0, [1] * 5), (5, [5])):
        monkeypatch.setattr("harmonica_dit.pipelines.adapters.dit.HOISTED", at_once * row_bytes)
        embedded.clear()
        with torch.no_grad():
            hoisted = adapter.hoist(((True,) * 4,) * steps, (999, 700, 500, 300, 3), **inputs)
            asked = [len(embedded) for _ in hoisted]
            modulation = next(adapter.hoist(((True,) * 4,), (999,), **inputs))["modulation"]
        assert embedded[:-2] == [3 * n for n in slices for _ in range(2)]  # for the block, and for the final layer
        assert asked == [2 * (i + 1) for i, n in enumerate(slices) for _ in range(n)]
        assert sum(row.nbytes for rows in modulation for row in rows) == row_bytes


def test_hoisted_keys_and_values():
    """Of the cross-attentions that a row computes, and that are diffusers' own."""
    model = small_pixart(num_layers=3)
    adapter, inputs = adapt(model), pixart_inputs(model)
    blocks = model.transformer_blocks
    row = tuple(name != "transformer_blocks.2.attn2" for name in adapter.branch_names)
    with torch.no_grad():
        first = list(adapter.hoist((row, row), (900, 800), **inputs))
        assert set(first[1]["keys_values"]) == {blocks[0].attn2, blocks[1].attn2}
        blocks[0].attn2.set_processor(LoudProcessor())
        expected = model(**inputs).sample
        more = next(adapter.hoist(((True,) * 9,), (900,), **inputs))
        assert set(more["keys_values"]) == {blocks[1].attn2, blocks[2].attn2}
        assert_close(adapter(**inputs, **more, cache=adapter.new_cache()).sample, expected)
