"""bench/resampling.py: every rule has its row, and what is not sampled anew is equal."""

import json
import sys
import warnings

from bench import resampling
from harmonica_dit import load, resample


def test_every_rule_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resampling, "ROUTERS", ("fashion-dit-1.6x",))
    monkeypatch.setattr(sys, "argv", ["resampling.py", "--steps", "4", "--samples", "2", "--out", str(tmp_path / "r")])
    before = resample.LAST
    with warnings.catch_warnings():
        resampling.main()
    assert resample.LAST == before
    found = json.loads((tmp_path / "r").read_text())
    rows = {(row["method"], row["rule"]): row for row in found["rows"]}
    for n in (2, 3):
        resampled, made = (rows[f"FORA n={n} + forecast", rule] for rule in ("resampled, 0.25", "made for it"))
        assert resampled["error"] == made["error"] > 0 and resampled["cur"] == made["cur"]
    assert ("trunk, 2 times", "nearest row") not in rows and ("fashion-dit-1.6x", "made for it") not in rows
    assert len(rows) == 2 * 5 + 2 * 4
    for row in rows.values():
        assert (row["error"] == 0) == (row["cur"] == 0) and row["flops_speedup"] >= 1
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| 4 |")]) == 4


def test_the_nearest_row_is_the_old_rule():
    """At every second timestep of a table that computes every second one."""
    schedule = resampling.replace(resampling.fora(load("fashion-dit"), 20, 2), timesteps=resampling.timesteps(20))
    assert [resampling.nearest(schedule, schedule.timesteps[first::2]).cur for first in (0, 1)] == [0.0, 0.9]
