"""What the suites of bench/ share: an entry of pytest-benchmark a candidate, the options, the tables, the clock."""

import importlib
import json

import pytest
import torch

from bench import ROOT
from bench.timing import branch_seconds, quartiles, relative_error
from harmonica_dit.timing import interleave

pytest_plugins = "pytester"
QUICK = "-pno:hypothesispytest"  # imported anew, it takes a second
SUITE = """
    import pytest
    from bench.record import cell
    from bench.replay import Measured

    COLUMNS = {"who": cell("who"), "ratio": cell("ratio", "{:.2f}")}
    CAPTION = "what it means"

    @pytest.fixture(scope="module", params=["small", "large"])
    def measured(request, settings):
        ours = dict(who=request.param, ratio=0.5) | settings(dict(steps=2, rounds=1), steps=5, rounds=5)
        return Measured(request.param, {"ours": [0.3, 0.1, 0.7], "ours: twice": [0.6, 0.2, 1.4], "plain": [0.9]},
                        {"ours": ours, "absent": dict(who="absent", note="not installed")})

    @pytest.mark.parametrize("candidate", ["plain", "ours", "ours: twice", "absent", "absent: twice"])
    def test_it(measured, replay, candidate):
        replay(measured, candidate)
"""


@pytest.fixture(scope="module")
def runs() -> dict:
    """What `run_suite` has found so far, by options."""
    return {}


@pytest.fixture
def run_suite(pytester, runs, monkeypatch):
    """Runs SUITE as one of bench/ with these options; the result, and the JSON file where there is one."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # in a process among others nothing would be measured

    def run(*options):
        if options not in runs:
            pytester.makeconftest("from bench.conftest import *")
            pytester.makepyfile(SUITE)
            path = pytester.path / "found.json"
            result = pytester.runpytest_inprocess(QUICK, f"--benchmark-json={path}", *options)
            runs[options] = result, json.loads(path.read_text()) if path.exists() and path.stat().st_size else None
        return runs[options]
    return run


def test_an_entry_is_one_candidates_own_rounds(run_suite):
    result, found = run_suite()
    result.assert_outcomes(passed=6, skipped=4)
    entries = {(entry["group"].split()[-1], entry["params"]["candidate"]): entry for entry in found["benchmarks"]}
    recorded = {"ours": [0.3, 0.1, 0.7], "ours: twice": [0.6, 0.2, 1.4], "plain": [0.9]}
    assert entries.keys() == {(case, name) for case in ("small", "large") for name in recorded}
    for (case, name), entry in entries.items():
        assert entry["stats"]["data"] == recorded[name] and entry["stats"]["iterations"] == 1
        assert entry["extra_info"].get("who") == (None if name == "plain" else case)


def test_the_file_says_where_when_and_who_is_missing(run_suite):
    _, found = run_suite()
    about = found["machine_info"]
    assert about["threads"] == torch.get_num_threads() and about["cores"] >= 1 and about["versions"]["torch"]
    assert len(found["start"]["load"]) == len(found["end"]["load"]) == 3 and found["start"]["commit"]
    assert found["not_timed"] == {"small: absent": "not installed", "large: absent": "not installed"}


def test_the_tables_show_every_row_and_note(run_suite):
    result, _ = run_suite()
    result.stdout.fnmatch_lines(["*small*0.50*", "*absent*–*", "*large*0.50*", "*absent*–*", "what it means",
                                 "absent: not installed"])


@pytest.mark.parametrize("options, steps, rounds", [((), 5, 5), (("--tiny",), 2, 1), (("--tiny", "--steps=7"), 7, 1)])
def test_what_is_asked_for_goes_before_tiny_sizes_and_defaults(run_suite, options, steps, rounds):
    _, found = run_suite(*options)
    infos = [entry["extra_info"] for entry in found["benchmarks"] if entry["params"]["candidate"] == "ours"]
    assert [(info["steps"], info["rounds"]) for info in infos] == [(steps, rounds)] * 2


@pytest.mark.parametrize("option", ["--rounds=0", "--heads=0", "--layers=-1", "--steps=1.5"])
def test_a_count_below_one_is_refused(run_suite, option):
    result, _ = run_suite(option)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*argument --*: got *, expected a whole number from 1 on"])


@pytest.fixture(scope="module")
def suites() -> set[str]:
    """The files of the suites, imported: `pytester` forgets what is imported inside it, but torch cannot come twice.
    """
    found = {path.name for path in (ROOT / "bench").glob("bench_*.py")}
    for name in found:
        importlib.import_module(f"bench.{name.removesuffix('.py')}")
    return found


def test_the_folder_collects_every_suite_and_plain_pytest_none(suites, pytester, pytestconfig):
    result = pytester.runpytest_inprocess(QUICK, "--collect-only", "-q", "--rootdir", ROOT, "-c",
                                          ROOT / "pyproject.toml", ROOT / "bench")
    found = {line.split("::")[0] for line in result.outlines if "::" in line}
    assert {line.rsplit("/")[-1] for line in found} == suites
    assert pytestconfig.getini("testpaths") == ["tests"] and not list((ROOT / "tests").rglob("bench_*.py"))


def test_what_takes_long_is_left_out_unasked(suites, pytester):
    result = pytester.runpytest_inprocess(QUICK, "--tiny", "-k", "alpha-1024", "--rootdir", ROOT, "-c",
                                          ROOT / "pyproject.toml", ROOT / "bench/bench_models.py")
    result.assert_outcomes(skipped=4, deselected=40)


def test_a_round_calls_every_candidate_once_in_turn():
    called, now = [], 0.0

    def candidate(name, seconds):
        def call():
            nonlocal now
            called.append(name)
            now += seconds * len(called)
        return call

    found = interleave({"a": candidate("a", 1), "b": candidate("b", 10)}, rounds=2, warmup=1, clock=lambda: now)
    assert called == ["a", "b"] * 3 and found == {"a": [3, 5], "b": [40, 60]}


def test_quartiles_of_few_values():
    assert quartiles([3.0]) == [3, 3, 3] and quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == [2, 3, 4]


def test_a_relative_error_is_of_the_norms():
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
    assert relative_error(torch.tensor([torch.nan]), torch.ones(1)) != relative_error(torch.ones(1), torch.ones(1)) == 0


def test_a_schedules_branches_take_what_is_computed():
    assert branch_seconds([(True, True, True), (False, True, False), (True, False, False)], [1, 10, 100]) == 122
