"""bench/step_search.py: dynamic programming finds what trying every choice finds."""

import random
from itertools import combinations

import pytest

from bench import step_search


@pytest.mark.parametrize("seed", range(3))
def test_dynamic_programming_finds_the_least_sum(monkeypatch, seed):
    monkeypatch.setattr(step_search, "STEPS", 7)
    draw = random.Random(seed)
    weights = [draw.random() for _ in range(7)]
    errors = {(a, b, s): draw.random() for b in range(7) for a in (range(b) if b else (None,)) for s in range(b + 1, 7)}

    def total(chosen):
        """Each step that is not computed, forecast from the last two that are."""
        cost = 0.0
        for s in set(range(7)) - set(chosen):
            before = [None, *(c for c in chosen if c < s)]
            cost += weights[s] * errors[before[-2], before[-1], s]
        return cost

    best = min(((0, *rest) for rest in combinations(range(1, 7), 3)), key=total)
    assert step_search.least_sum(errors, weights, 4) == best
