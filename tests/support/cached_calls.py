"""Calls of a small pipeline with a cache for a speedup, and what they have to be, by hooks."""

import torch

import harmonica_dit
from harmonica_dit import Schedule
from harmonica_dit.flops import Flops
from harmonica_dit.pipelines.adapters.generic import GenericAdapter
from support.trunk_by_hooks import trunk_by_hooks

SPEEDUP, STEPS, COMPUTED = 1.7, 8, 4  # of the small pipelines


def with_cache(entry, pipe, config=SPEEDUP, **call):
    """The output of a call with a cache that is enabled for it."""
    harmonica_dit.enable_cache(pipe, config)
    try:
        return entry.call(pipe, **dict(steps=STEPS) | call)
    finally:
        harmonica_dit.disable_cache(pipe)


def check_by_hooks(entry, pipe, **call):
    """The cache gives what forward hooks on the last block give; and something else than the plain pipeline."""
    found = with_cache(entry, pipe, **call)
    with trunk_by_hooks(pipe.transformer, entry.calls, STEPS, COMPUTED):
        expected = entry.call(pipe, steps=STEPS, **call)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert not torch.equal(found, entry.call(pipe, steps=STEPS, **call))


def every_second(names, steps=STEPS) -> Schedule:
    """A schedule by branches, forecast to first order."""
    K = len(names)
    compute = (torch.arange(steps) % 2 == 0)[:, None].repeat(1, K)
    return Schedule(compute, tuple(names), Flops((1.0,) * K, 1.0), torch.ones(steps, K))


def every_second_of(transformer, steps=STEPS) -> Schedule:
    """`every_second` of a transformer on the generic path."""
    return every_second(GenericAdapter(transformer).branch_names, steps)
