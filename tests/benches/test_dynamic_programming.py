"""bench/step_search.py: dynamic programming finds what trying every choice finds."""

import json
import random
import sys
from itertools import combinations

import pytest

from bench import step_search
from harmonica_dit.methods import trunk_forecast


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


def test_every_choice_has_its_row(monkeypatch, tmp_path):
    monkeypatch.setattr(step_search, "RESULTS", tmp_path)
    draw, steps = random.Random(0), range(step_search.STEPS)
    errors = {(a, b, s): draw.random() for b in steps for a in (range(b) if b else (None,)) for s in steps if s > b}
    monkeypatch.setattr(step_search, "forecast_errors", lambda net: (errors, [1.0] * len(steps)))
    monkeypatch.setattr(step_search, "step_search", lambda net, T, *_, **__: trunk_forecast(net, T, every=4))
    monkeypatch.setattr(sys, "argv", ["step_search.py", "--samples", "2"])
    step_search.main()
    rows = {row["method"]: row for row in json.loads((tmp_path / "step-search-cpu.json").read_text())["rows"]}
    assert rows["every third"]["computed"] == [0, 3, 6, 9, 12, 15, 18] and rows["searched"]["computed"][1] == 4
    assert tuple(rows["dynamic programming"]["computed"]) == step_search.least_sum(errors, [1.0] * len(steps), 7)
    assert all(row["error"] > 0 and row["flops_speedup"] > 2 for row in rows.values()) and len(rows) == 4
