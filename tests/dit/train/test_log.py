"""The log of a training: its progress bar."""

import io

import pytest
from rich.console import Console

from harmonica_dit.progress import progress_bar
from harmonica_dit.train import log as module
from harmonica_dit.train.log import COLUMNS, Log

LINE = dict.fromkeys(COLUMNS, 0.0)


def test_the_bar_counts_trajectories_from_where_the_training_goes_on():
    with Log(None, total=5, first=2, progress=False) as log:
        for done in (3, 4):
            log.line(**LINE)
            assert [(task.completed, task.total) for task in log._bar.tasks] == [(done, 5)]


@pytest.mark.parametrize("total, terminal, lines", [(3, False, ["2 of 3", "3 of 3"]), (300, False, ["3 of 300"]),
                                                    (3, True, [])])
def test_in_a_file_the_bar_is_lines_with_the_time_left(monkeypatch, total, terminal, lines):
    """Trajectories of 100 seconds each, 1 of which is done already."""
    text, clock = io.StringIO(), iter(range(0, 100_000, 50))
    console = Console(file=text, width=200, get_time=lambda: next(clock), force_terminal=terminal)
    monkeypatch.setattr(module, "progress_bar", lambda shown: progress_bar(console, shown))
    with Log(None, total=total, first=1, progress=True) as log:
        for _ in range(2):
            log.line(**LINE | dict(importance=0.25, beta=1e-3))
    found = [line for line in text.getvalue().splitlines() if "trajectories" in line]
    assert [line.split(" trajectories")[0] for line in found] == lines
    assert terminal or " left: " in found[-1] and "λ 0.25  β 0.001" in found[-1]
