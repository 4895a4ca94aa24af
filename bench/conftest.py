"""What the benchmarks share: candidates timed in turn under pytest-benchmark, and tables of ratios at the end.

    OMP_NUM_THREADS=2 python -m pytest bench/bench_forward.py [-k NAME] [--benchmark-json=FILE]

pytest-benchmark times one function after the other, so a ratio of two of its rows compares two different minutes of a
busy machine. Here one of its rounds runs every candidate once: whatever slows the machine slows all of them alike. The
machine, the versions and the commit, and all that was measured, are in the JSON file.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median, quantiles

import pytest
import torch
from rich.console import Console
from rich.table import Table

WARMUP = 2


@pytest.fixture
def interleaved(benchmark) -> Callable[..., dict[str, float]]:
    """`interleaved(candidates, rounds)` calls every candidate once a round and returns each one's median seconds.

    A candidate is given the round's number, to choose its buffers by. Where it returns a number, that is its seconds;
    otherwise those of the whole call are.
    """
    def run(candidates: dict[str, Callable], rounds: int) -> dict[str, float]:
        times, number = defaultdict(list), 0

        def one_round() -> None:
            nonlocal number
            for name, candidate in candidates.items():
                start = time.perf_counter()
                own = candidate(number)
                times[name].append(time.perf_counter() - start if own is None else own)
            number += 1

        benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=WARMUP)
        measured = {name: values[WARMUP:] for name, values in times.items()}
        spread = {name: quantiles(values, n=4) for name, values in measured.items()}
        benchmark.extra_info.update(seconds=spread, threads=torch.get_num_threads(), torch=torch.__version__)
        return {name: median(values) for name, values in measured.items()}

    return run


@pytest.fixture
def report(benchmark) -> Callable[..., None]:
    """`report(column=value, ...)` adds a row to the table of the test's file, and to the JSON."""
    benchmark.extra_info["rows"] = []
    return lambda **row: benchmark.extra_info["rows"].append(row)


def pytest_terminal_summary(terminalreporter, config) -> None:
    tables = defaultdict(list)
    for one in getattr(config, "_benchmarksession", None).benchmarks if hasattr(config, "_benchmarksession") else ():
        tables[one.fullname.split("::")[0]] += one.extra_info.get("rows", [])
    for file, rows in tables.items():
        table = Table(*rows[0], title=f"{file}, {torch.get_num_threads()} threads, medians of interleaved rounds")
        for row in rows:
            table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
        Console(width=140).print(table)
