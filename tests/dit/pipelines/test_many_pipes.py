"""The small pipelines are what their entries say: they run, repeat themselves, and take what they claim to take."""

from functools import cache

import pytest
import torch

from support.many_pipes import PIPES


@cache
def pipe_of(name: str):
    return PIPES[name].pipe()


def every(claim=lambda entry: True):
    """The entries that claim something."""
    return pytest.mark.parametrize("name", [name for name, entry in PIPES.items() if claim(entry)])


def run_and_note(name: str, **changes):
    """The output of a run, and (transformer, rows) of each forward."""
    entry, pipe, forwards = PIPES[name], pipe_of(name), []

    def noting(transformer):
        def hook(_, args, kwargs):
            latents = args[0] if args else kwargs["hidden_states"]
            forwards.append((transformer, len(latents)))
        return getattr(pipe, transformer).register_forward_pre_hook(hook, with_kwargs=True)

    handles = [noting(transformer) for transformer in entry.transformers]
    output = entry.call(pipe, **changes)
    for handle in handles:
        handle.remove()
    assert output.isfinite().all() and output.std() > 0.01
    return output, forwards


@every()
def test_a_run_repeats_itself_to_the_bit(name):
    entry = PIPES[name]
    output, forwards = run_and_note(name)
    assert torch.equal(entry.call(pipe_of(name)), output)
    assert [rows for _, rows in forwards] == [entry.rows] * entry.calls * entry.steps_run(6)
    transformers = [transformer for transformer, _ in forwards]
    assert set(transformers) == set(entry.transformers)
    assert transformers == sorted(transformers)  # of two, the second one runs last


@every()
def test_more_steps_run_and_do_not_explode(name):
    entry = PIPES[name]
    output, forwards = run_and_note(name, steps=10)
    assert len(forwards) == entry.calls * entry.steps_run(10)
    assert output.std() < 2 * entry.call(pipe_of(name)).std()


@every()
def test_the_seeds_decide_the_noise_and_the_weights(name):
    entry = PIPES[name]
    output = entry.call(pipe_of(name), steps=2)
    assert torch.equal(entry.call(entry.pipe(), steps=2), output)
    assert not torch.equal(entry.call(pipe_of(name), steps=2, seed=1), output)
    assert not torch.equal(entry.call(entry.pipe(seed=1), steps=2), output)


@every(lambda entry: entry.guidance)
def test_guidance_is_felt_and_can_be_switched_off(name):
    entry = PIPES[name]
    guided = entry.call(pipe_of(name))
    unguided, forwards = run_and_note(name, **entry.unguided)
    assert [rows for _, rows in forwards] == [1] * entry.steps_run(6)
    assert (guided - unguided).std() > 0.004 * guided.std()


@every(lambda entry: entry.batches)
def test_two_prompts(name):
    entry = PIPES[name]
    one = entry.call(pipe_of(name), steps=3)
    two, forwards = run_and_note(name, steps=3, batch=2)
    assert two.shape == (2 * one.shape[0], *one.shape[1:]) and not torch.equal(two[0], two[1])
    assert [rows for _, rows in forwards] == [2 * entry.rows] * entry.calls * entry.steps_run(3)


@every(lambda entry: entry.copies)
def test_two_images_of_a_prompt(name):
    entry = PIPES[name]
    output, forwards = run_and_note(name, steps=3, **{entry.copies: 2})
    assert len(output) == 2 and not torch.equal(output[0], output[1])
    assert [rows for _, rows in forwards] == [2 * entry.rows] * entry.calls * entry.steps_run(3)


@every(lambda entry: entry.other_size)
def test_another_size(name):
    output, _ = run_and_note(name, steps=3, **PIPES[name].other_size)
    assert output.shape != PIPES[name].call(pipe_of(name), steps=3).shape


@every(lambda entry: entry.own_steps)
def test_steps_that_the_caller_chooses(name):
    entry = PIPES[name]
    for argument, values in entry.own_steps.items():
        output, forwards = run_and_note(name, steps=4, **{argument: values})
        assert len(forwards) == entry.calls * entry.steps_run(4)
        assert not torch.equal(output, entry.call(pipe_of(name), steps=4))


@every(lambda entry: entry.callback)
def test_a_callback_is_told_of_each_step(name):
    entry, told = PIPES[name], []
    entry.call(pipe_of(name), steps=3, **{entry.callback: lambda pipe, step, t, given: told.append(step) or {}})
    assert told == list(range(entry.steps_run(3)))
