"""bench/paired.py: the difference of two ways' trainings, and its interval."""

import json
import sys

import pytest
import torch

from bench import paired


def test_equal_trainings_do_not_differ_and_common_noise_cancels():
    """Draws that both ways share widen no interval; the value is that of the means over trainings."""
    common, own = torch.randn(200, dtype=torch.float64), 0.01 * torch.randn(200, dtype=torch.float64)
    one = [(dict(error=2.0), dict(error=2 + common + own)), (dict(error=4.0), dict(error=4 + common - own))]
    other = [(dict(error=1.0), dict(error=1 + common)), (dict(error=1.5), dict(error=1.5 + common))]
    found = paired.difference(one, other, "error")
    assert found["above"] == 1.75 and found["low"] == pytest.approx(1.75) == found["high"]
    assert (found["one"], found["other"]) == ([2.0, 4.0], [1.0, 1.5])
    alone = paired.difference(one[:1], other, "error")
    assert alone["low"] < 0.75 < alone["high"] and alone["high"] - alone["low"] < 0.1
    assert paired.difference(one, one, "error")["above"] == 0


def test_files_are_judged_on_the_same_noise(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paired, "RESULTS", tmp_path)
    monkeypatch.setattr(paired, "COLUMNS", ("error",))
    monkeypatch.setattr(sys, "argv", ["paired.py", "--folder", str(tmp_path), "--samples", "4", "--name", "mine",
                                      "--one", "fashion-dit-1.6x", "--other", "fashion-dit-2.0x"])
    paired.main()
    found = json.loads((tmp_path / "paired-cpu.json").read_text())["mine"]
    assert (found["samples"], found["one"], found["other"]) == (4, ["fashion-dit-1.6x"], ["fashion-dit-2.0x"])
    assert found["error"]["above"] < 0 and "error: -" in capsys.readouterr().out
