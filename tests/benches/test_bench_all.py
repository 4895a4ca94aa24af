"""bench_all.py's cases, at tiny sizes and without compiling: nothing is timed whose candidates do not agree."""

import subprocess
import sys

import pytest
import torch

from bench import ROOT, bench_all, cases, sdt_models
from bench.cases import OURS, PLAIN, Candidate, Case, measure, models, ops, pipelines
from bench.pipelines.rivals import RIVALS, Rival

BY_KIND = {name.split(" [")[0].split(",")[0]: name for name in bench_all.CASES}  # one of each
PIPELINE = "DiTPipeline of fashion-dit"  # which has a test of its own


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(ops, "compiled", lambda function: function)
    monkeypatch.setattr(models, "compile_each", lambda blocks: None)
    monkeypatch.setattr(pipelines, "compile_each", lambda blocks: None)
    monkeypatch.setattr(pipelines, "OTHERS", ("diffusers MagCache",))
    monkeypatch.setattr(sdt_models, "HEADS", 1)


@pytest.mark.filterwarnings("ignore:reuses nothing")
@pytest.mark.parametrize("name", [name for kind, name in BY_KIND.items() if kind != PIPELINE])
def test_every_kind_of_case_is_measured(uncompiled, name):
    case = bench_all.CASES[name]
    if "DiTPipeline" in name:
        case = case._replace(names=(*case.names[:3], "diffusers MagCache"))
    found = measure(case, tiny=True, **bench_all.TINY)
    assert tuple(found.seconds) == tuple(found.rows) == case.names and OURS in case.names
    for candidate, row in found.rows.items():
        assert row["over_plain"] == pytest.approx(found.seconds[candidate][0] / found.seconds[PLAIN][0])
        assert row["note"] is None and row["difference"] <= 2 and row["what"] == name and row["candidate"] == candidate


def test_a_case_is_measured_once_for_all_of_its_candidates(tmp_path):
    """Else their times would be of different rounds."""
    program = """if True:
        import pytest, sys
        from bench import bench_all
        measure, names = bench_all.measure, []
        bench_all.measure = lambda case, *args, **options: names.append(case.name) or measure(case, *args, **options)
        status = pytest.main(["bench/bench_all.py", "--tiny", "-q", "-k", "bias_gelu", "-p", "no:cacheprovider",
                              "-o", "filterwarnings="])
        print("measured:", len(names), len(set(names)))
        sys.exit(status)"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    times, cases = map(int, done.stdout.split("measured:")[1].split())
    assert times == cases > 1


def test_every_case_has_a_name_of_its_own_and_begins_with_the_yardstick():
    every = [*ops.CASES, *models.CASES, *pipelines.CASES, *bench_all.training.CASES]
    assert len(bench_all.CASES) == len(every) and {case.names[0] for case in every} == {PLAIN}
    assert sum(case.full for case in every) == 3 and set(pipelines.OTHERS) <= set(RIVALS)


def made(**candidates) -> Case:
    return Case("some", tuple(candidates), lambda tiny: candidates, 1)


def test_ratios_are_of_the_same_rounds(monkeypatch):
    found = dict(plain=[1.0, 2.0, 9.0], ours=[1.0, 1.0, 3.0], theirs=[8.0, 8.0, 8.0])
    monkeypatch.setattr(cases, "interleave", lambda calls, rounds, warmup: found)
    one = Candidate(lambda: torch.ones(2), times=2)
    rows = measure(made(plain=one, ours=one, theirs=one), False, 3, 0).rows
    assert rows["theirs"]["ms"] == 4000 and rows["ours"]["low_ms"] == 500
    assert rows["theirs"]["over_ours"] == 8 and rows["theirs"]["over_plain"] == 4 and rows["ours"]["over_plain"] == 0.5


@pytest.mark.parametrize("found", [1.001, torch.nan])
def test_nothing_is_timed_where_ours_is_wrong(found):
    """And a rival that is wrong, or fails, is not timed."""
    called = []

    def counted(value):
        return Candidate(lambda: called.append(1) or torch.full((3,), value))

    def fail():
        raise RuntimeError("no\nway")

    with pytest.raises(AssertionError, match="ours: AssertionError: differs from plain by (0.001|nan), expected at"):
        measure(made(plain=counted(1.0), ours=counted(found)), False, 5, 1)
    assert len(called) == 2
    wrong, failing = Candidate(lambda: torch.full((3,), found), rival=True), Candidate(fail, rival=True)
    result = measure(made(plain=counted(1.0), wrong=wrong, failing=failing, ours=counted(1.0)), False, 5, 1)
    assert result.seconds.keys() == {"plain", "ours"} and result.rows["ours"]["note"] is None
    assert result.rows["failing"]["note"] == "failing: RuntimeError: no way"
    assert "wrong: AssertionError: differs from plain" in result.rows["wrong"]["note"]
    with pytest.raises(AssertionError, match="ours: RuntimeError: no way"):
        measure(made(plain=counted(1.0), ours=Candidate(fail)), False, 5, 1)


def test_several_results_are_all_compared():
    one, other = (Candidate(lambda last=last: [torch.ones(2), torch.tensor(last)]) for last in (1.0, 2.0))
    with pytest.raises(AssertionError, match="differs from plain by 1, "):
        measure(made(plain=one, ours=other), False, 1, 0)
    measure(made(plain=one, ours=Candidate(other.call, like=None), more=Candidate(other.call, like="ours")), False, 1,
            0)


@pytest.mark.parametrize("name, beside", [
    ("plain", "ours"), ("ours", "ours"), ("trunk: plain", "trunk: ours"), ("trunk: ours", "ours"), ("X: Y", "ours")])
def test_a_candidate_stands_beside_ours_of_its_variant(name, beside):
    assert cases.ours_beside(name, {"ours": 0, "trunk: ours": 0}) == beside


def test_a_cache_that_changes_what_it_computes_is_not_timed(uncompiled, monkeypatch):
    """Set so that it computes everything, it must give the plain pipeline's images."""
    def louder(pipe, steps):
        pipe.transformer.register_forward_hook(lambda module, args, output: type(output)(1.1 * output.sample))

    others = ("diffusers MagCache", "louder", "absent")
    monkeypatch.setitem(RIVALS, "louder", Rival(louder, {}, {}))
    monkeypatch.setitem(RIVALS, "absent", Rival(louder, {}, {}, package="no-such-package"))
    monkeypatch.setattr(pipelines, "OTHERS", others)
    case = bench_all.CASES[BY_KIND[PIPELINE]]
    with pytest.warns(UserWarning, match="reuses nothing"):
        rows = measure(case._replace(names=(*case.names[:3], *others)), tiny=True, **bench_all.TINY).rows
    assert "with everything computed" in rows["louder"]["note"] and "ms" not in rows["louder"]
    assert rows["absent"]["note"] == "absent: ImportError: no-such-package is not installed"
    assert rows[OURS]["ms"] > 0 and rows["diffusers MagCache"]["ms"] > 0
