"""What goes wrong in bench/gpu spoils nothing else."""

import json
import sys

import pytest

from bench.gpu import gated
from bench.gpu.merge import merge
from bench.gpu.record import Record


@pytest.mark.parametrize("ends", [[True, False], [False, True], [False, False], [True, True]])
def test_a_part_that_did_not_end_does_not_replace_one_that_did(tmp_path, ends):
    for number, whole in enumerate(ends):
        with Record("kernels", tmp_path, tiny=True) as record:
            record.note("number", number)
        path = tmp_path / "kernels.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(finished=whole)))
        merge(tmp_path, tmp_path / "results", tiny=True)
    [path] = (tmp_path / "results").glob("*.json")
    kept = json.loads(path.read_text())["parts"]["kernels"]["notes"]["number"]
    assert kept == (0 if ends == [True, False] else 1)


def test_an_interrupt_ends_every_step_of_gated(monkeypatch):
    killed = []

    class Process:
        def __init__(self, step):
            self.step = step

        def communicate(self, *_, **__):
            raise KeyboardInterrupt

        def kill(self):
            killed.append(self.step)

    monkeypatch.setattr(gated, "begin", Process)
    monkeypatch.setattr(sys, "argv", ["gated", "smallest", "dit"])
    with pytest.raises(KeyboardInterrupt):
        gated.main()
    assert killed == ["smallest", "dit"]
