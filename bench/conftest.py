"""What the suites share: an entry of pytest-benchmark for each candidate, and tables of ratios at the end.

    OMP_NUM_THREADS=2 python -m pytest bench/bench_forward.py [-k NAME] [--benchmark-json=FILE]
    pytest-benchmark compare FILE OTHER

pytest-benchmark times one function after the other, so two of its entries would come from two different minutes of a
busy machine. The suites therefore time all candidates of a case together, in interleaved rounds, in a fixture that
lives as long as the case does. Each candidate is then a test of its own, which hands its recorded times to its
`benchmark` fixture: the marker `benchmark(timer=…)` gives that fixture a clock which every round moves on by just the
recorded duration. So each entry in the terminal, in the JSON file and in `pytest-benchmark compare` is one candidate's,
and a candidate is compared with itself in another run.

The candidates of a case are a group of pytest-benchmark's table. A candidate's row in the table of ratios is its
`extra_info`. Threads, versions, load and commit are in the JSON file too.
"""

import argparse
from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from bench.record import machine, moment, table
from bench.replay import Measured, ReplayClock
from harmonica_dit.timing import processor

CLOCK = ReplayClock()
CASES = pytest.StashKey[dict]()
ASKED = ("rounds", "steps", "heads", "layers", "cur")  # the options that replace a suite's own value
START = pytest.StashKey[dict]()


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from 1 on")
    return int(text)


def pytest_addoption(parser) -> None:
    group = parser.getgroup("harmonica", "the suites of bench/; each has its own defaults")
    for name, what in (("rounds", "each runs every candidate once"), ("steps", "of a trajectory, T"),
                       ("heads", "attention heads, in place of a number that a CPU can bear"),
                       ("layers", "blocks of each kind, in place of the real depth")):
        group.addoption(f"--{name}", type=count, metavar="N", help=what)
    group.addoption("--cur", type=float, metavar="SHARE", help="cache utilization ratio of schedules drawn at random")
    group.addoption("--full", action="store_true", help="what takes long as well, and more rounds of bench_all.py")
    group.addoption("--tiny", action="store_true", help="small sizes and one round: a dry run, which measures nothing")


def pytest_configure(config) -> None:
    config.stash[CASES] = {}
    config.stash[START] = moment()


def pytest_itemcollected(item) -> None:
    item.add_marker(pytest.mark.benchmark(timer=CLOCK.time))


@pytest.fixture(scope="session")
def settings(pytestconfig) -> Callable[..., dict]:
    """`settings(dict(rounds=1, …), rounds=5, …)`: a suite's defaults, or else its tiny sizes, or what was asked for."""
    def choose(tiny: dict, **defaults) -> dict:
        chosen = defaults | (tiny if pytestconfig.getoption("tiny") else {})
        asked = {name: pytestconfig.getoption(name) for name in defaults if name in ASKED}
        return chosen | {name: value for name, value in asked.items() if value is not None}
    return choose


@pytest.fixture
def replay(benchmark, request) -> Callable[[Measured, str], None]:
    """`replay(measured, candidate)` makes that candidate's times the entry of this test, and keeps its case's rows for
    the table of its file. The test of a candidate that could not be timed is skipped."""
    def run(measured: Measured, candidate: str) -> None:
        request.config.stash[CASES].setdefault(request.module, {})[measured.case] = measured
        row = measured.row(candidate)
        if candidate not in measured.seconds:
            pytest.skip(row["note"])
        benchmark.group = f"{request.path.name}: {measured.case}"
        benchmark.extra_info.update(row)
        CLOCK.replay(benchmark, measured.seconds[candidate])

    return run


def pytest_benchmark_generate_machine_info() -> dict:
    return machine()


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    """What is not any one candidate's: when, at which commit, beside which load; and who could not be timed."""
    output_json["start"], output_json["end"] = config.stash[START], moment()
    output_json["not_timed"] = {f"{measured.case}: {name}": row["note"]
                                for cases in config.stash[CASES].values() for measured in cases.values()
                                for name, row in measured.rows.items() if name not in measured.seconds}


def pytest_terminal_summary(config) -> None:
    load = config.stash[START]["load"][0]
    for suite, cases in config.stash[CASES].items():
        rows = [row for measured in cases.values() for row in measured.rows.values()]
        title = f"{suite.__name__}: {processor()}, threads {torch.get_num_threads()}, load {load:.1f}"
        Console(width=140).print(table(title, suite.CAPTION, suite.COLUMNS, rows))
