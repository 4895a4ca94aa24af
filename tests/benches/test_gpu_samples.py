"""The launches of a sample on a GPU, and the back end of attention that the models are given."""

import json
import os
import sys

import pytest
import torch

from bench import sdt_loops, sdt_models
from bench.gpu import attention, commands, kernels, models, sdt
from bench.gpu.record import Record


@pytest.fixture
def launches(monkeypatch, tmp_path):
    """launches(part, measure, count): how often each timed candidate adds to count, and launches said."""
    def run(part, measure, count):
        found = []

        def time(self, group, candidates, *_, launches=1, **__):
            for candidate in candidates.values():
                count.clear()
                candidate()
                found.append((len(count), launches))
            return dict.fromkeys(candidates, 1e-6)

        monkeypatch.setattr(Record, "time", time)
        with Record(part, tmp_path, tiny=True) as record:
            record.tiny = False
            measure(record)
        return found
    return run


def test_a_sample_of_attention_has_many_launches(monkeypatch, launches):
    count = []

    def sdpa(q, k, v):
        count.append(1)
        return q

    monkeypatch.setattr(attention, "back_ends", lambda tiny: {"PyTorch's choice": sdpa})
    found = launches("attention", lambda record: attention.measure(record, 2, 4, 2, 8), count)
    assert found == [(64, 64)]


def test_a_sample_of_large_kernels_has_as_many(monkeypatch, launches):
    count, small = [], torch.zeros(1)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: small)
    case = kernels.Case(1 << 28, 2, count.append, count.append, lambda: [])
    found = launches("kernels", lambda record: kernels.measure(record, "large", case), count)
    assert found[:2] == [(64, 64)] * 2 and {said for _, said in found} == {64}


@pytest.fixture
def fastest(tmp_path):
    """A folder in which the part `attention` found flash the fastest."""
    (tmp_path / "attention.json").write_text(json.dumps(dict(notes=dict(fastest="flash"))))
    return tmp_path


def test_the_gated_part_is_given_the_fastest_back_end(fastest, monkeypatch):
    given = []
    monkeypatch.setattr(commands, "call", lambda record, steps, environment: given.append(environment))
    with Record("gated", fastest, tiny=True) as record:
        commands.gated(record)
    monkeypatch.undo()
    assert given == [{"HARMONICA_ATTENTION": "flash"}]
    with Record("gated", fastest, tiny=True) as record:
        commands.call(record, {"says": [sys.executable, "-c", "from bench.gpu import gated; print(gated.ATTENTION)"]},
                      environment=given[0] | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert record.content["notes"]["says"]["output"] == ["flash"]


def test_sdt_trains_with_it_in_bfloat16(fastest, monkeypatch):
    built = []
    monkeypatch.setattr(sdt, "Problem", lambda *arguments: built.append(arguments))
    with Record("sdt", fastest, tiny=True) as record:
        for dtype in ("bfloat16", "float32"):
            sdt.problem(record, dtype, 1, 2)
    assert [arguments[-1] for arguments in built] == ["flash", "sdpa"], "it takes no float32"


def test_a_problem_s_own_model_has_the_back_end(monkeypatch):
    given = []
    DiT = sdt_models.DiT
    monkeypatch.setattr(sdt_models, "DiT", lambda attention, **config: given.append(attention) or DiT(**config))
    sdt_loops.Problem("DiT-S/8", 1, 2, 1, "bfloat16", "cpu", "flash")
    assert given == ["flash"]


def test_no_model_is_made_without_a_back_end():
    with pytest.raises(TypeError, match="attention"):
        models.model(True, torch.device("cpu"))
