"""bench/curve.py: one that was stopped goes on, and refuses to mix what was measured differently."""

import json
import runpy
import sys

import pytest
import torch


def test_the_curve_goes_on_where_it_stopped(tmp_path, monkeypatch):
    out = tmp_path / "curve.json"

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["curve.py", "--samples", "4", "--steps", "3", "--batch", "2", "--fewer", "2",
                                          "--threads", str(torch.get_num_threads()), "--out", str(out), "--work",
                                          str(tmp_path / "work"), *more])
        monkeypatch.delitem(sys.modules, "bench.curve", raising=False)  # runpy warns of what is imported already
        runpy.run_module("bench.curve", run_name="__main__")
        return json.loads(out.read_text())["rows"]

    first = run("--fora")
    assert [row["name"] for row in first] == ["uncached", "2 steps"]
    second = run("--fora", "2")
    timed = {row.pop("wall_speedup") for row in (*first, *second)}  # all named methods are timed anew
    assert all(ratio > 0 for ratio in timed) and second[:2] == first
    assert [row["name"] for row in second[2:]] == ["FORA n=2", "FORA n=2 + forecast"]
    with pytest.raises(ValueError, match="more than one is called 'FORA n=2'"):
        run("--fora", "2", "2")
    with pytest.raises(SystemExit, match="other settings"):
        run("--guidance", "2")
