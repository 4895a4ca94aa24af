"""Everything that is made to be fast, beside its peers: ops, steps, whole models, pipelines, training.

    make bench                                   # on the cores that are there: up to ten minutes on two
    make bench OPTIONS=--full                    # more cases, three times the rounds
    python -m pytest bench/bench_all.py [-k residual_norm] [--full] [--rounds 9] [--benchmark-json=FILE]
    python -m bench.compare OLD.json NEW.json    # what has changed beyond noise

The cases are those of bench/cases/. All candidates of a case are timed in the same rounds, after they have been found
to agree; what a rival cannot do is a note below the table.
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch

from bench.cases import measure, models, ops, pipelines, training
from bench.record import cell
from bench.replay import Measured

CASES = {case.name: case for case in (*ops.CASES, *models.CASES, *pipelines.CASES, *training.CASES)}
PAIRS = [pytest.param(case.name, name, id=f"{case.name}-{name}") for case in CASES.values() for name in case.names]
pytestmark = pytest.mark.filterwarnings("ignore")  # others' code may warn, which is no failure of theirs
MORE = 3  # times the rounds, with --full
TINY = dict(rounds=1, warmup=0)
COLUMNS = {
    "what": cell("what"),
    "candidate": cell("candidate"),
    "ms": cell("ms", "{:.4g}"),
    "quartiles": lambda row: f"{row['low_ms']:.4g} … {row['high_ms']:.4g}" if "ms" in row else "–",
    "/ ours": cell("over_ours", "{:.2f}"),
    "/ plain": cell("over_plain", "{:.3f}"),
    "differs": cell("difference", "{:.0e}"),
}
CAPTION = """/ ours, / plain: the candidate's time over that of ours and of plain PyTorch, median of the rounds' ratios.
"X: Y" is the way Y of doing a variant X, over our way of it; our way of X itself is over ours without it.
differs: from the candidate that it must agree with, relative (root mean square): plain, or the variant's first way."""


@pytest.fixture(scope="module")
def measured(pytestconfig, settings) -> Callable[[str], Measured]:
    """A function that measures a case of this name, once for all of its candidates.

    A fixture with the case as its parameter would be made anew for each pair of case and candidate.
    """
    tiny, more = pytestconfig.getoption("tiny"), MORE if pytestconfig.getoption("full") else 1

    @cache
    def run(name: str) -> Measured:
        try:
            return measure(CASES[name], tiny, **settings(TINY, rounds=more * CASES[name].rounds, warmup=1))
        finally:
            torch.compiler.reset()  # else the graphs of one case count towards the limit of the next
    return run


@pytest.mark.parametrize("case, candidate", PAIRS)
def test_all(measured, replay, pytestconfig, case, candidate):
    if CASES[case].full and not pytestconfig.getoption("full"):
        pytest.skip("takes long; --full runs it")
    replay(measured(case), candidate)
