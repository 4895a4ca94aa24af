"""The progress of long work: a bar on a terminal, lines where there is none."""

import io

import pytest
from rich.console import Console

from harmonica_dit import progress as module
from harmonica_dit.progress import progress_bar


@pytest.fixture
def work():
    """Does so many of four things, and gives what was written meanwhile."""

    def run(things=4, seconds=20, **options):
        text, now = io.StringIO(), [0.0]
        console = Console(file=text, width=200, get_time=lambda: now[0], **options.pop("console", {}))
        with progress_bar(console, **options) as bar:
            task = bar.add_task("a description", total=4)
            for _ in range(things):
                now[0] += seconds
                bar.update(task, advance=1, description="loss 0.1")
        return text.getvalue()

    return run


def test_in_a_file_it_is_a_line_now_and_then(work):
    assert work().splitlines() == ["2 of 4 in 0:00:40, 0:00:40 left: loss 0.1", "4 of 4 in 0:01:20: loss 0.1"]
    assert work(1) == work(seconds=0.4) == ""


def test_on_a_terminal_it_is_a_bar(work):
    text = work(console=dict(force_terminal=True))
    assert "4/4" in text and "4 of 4" not in text


def test_not_shown_it_says_nothing(work):
    assert work(shown=False) == ""


def test_it_is_on_stderr(capsys, monkeypatch):
    monkeypatch.setattr(module, "LONG", 0)
    with progress_bar() as bar:
        bar.update(bar.add_task("work", total=1), advance=1)
    assert capsys.readouterr() == ("", "1 of 1 in 0:00:00: work\n")
