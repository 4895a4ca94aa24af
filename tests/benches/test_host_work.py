"""bench/host_work.py: a replay of a stand-in is timed, and the graph is recorded once."""

import json

import torch

from bench import host_work
from harmonica_kernels.graphs import captured


def test_replays_are_timed(monkeypatch, tmp_path):
    monkeypatch.setitem(captured.RECORDERS, "cpu", None)  # put back afterwards
    monkeypatch.setattr(host_work, "RESULTS", tmp_path)
    recorded, record = [], host_work.Recorder.record
    monkeypatch.setattr(host_work.Recorder, "record",
                        lambda *args, **options: recorded.append(args) or record(*args, **options))
    host_work.main()
    found = json.loads((tmp_path / "host-work-cpu.json").read_text())
    assert 1 < found["microseconds"] < 1e5 and found["parameters"] == 292 and found["replays"] > 100
    assert 1 <= len(recorded) < 5 and torch.is_grad_enabled()
