"""The progress of all long work: what is done, how long it took and how long it will take. It goes to stderr."""

from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .ranks import is_main

# where there is no terminal, in seconds: between two lines, and what takes a line at its end
EVERY, LONG = 30, 2


class Lines(Progress):
    """In place of a bar where there is no terminal: a line now and then, and one at the end of what took some time."""

    def __init__(self, shown: bool, **options):
        super().__init__(disable=True, **options)
        self._shown, self._said = shown, self.get_time()

    def update(self, task_id, **fields) -> None:
        super().update(task_id, **fields)
        task, now = self._tasks[task_id], self.get_time()
        if self._shown and (task.finished and task.elapsed >= LONG or now >= self._said + EVERY):
            self._said = now
            left = "" if task.finished or task.time_remaining is None else f", {_time(task.time_remaining)} left"
            self.console.print(f"{task.completed:.0f} of {task.total:.0f} in {_time(task.elapsed)}{left}: "
                               f"{task.description}", soft_wrap=True, highlight=False, markup=False)


def _time(seconds: float) -> timedelta:
    return timedelta(seconds=int(seconds))


def progress_bar(console: Console | None = None, shown: bool = True) -> Progress:
    """A bar on a console, by default on stderr; not shown, as on every rank but the first, it takes the same calls."""
    shown = shown and is_main()
    console = console or Console(stderr=True)
    # the time left is estimated from the last hour: of a step that takes minutes, rich's 30 seconds hold no two ends
    options = dict(console=console, speed_estimate_period=3600)
    if not console.is_terminal:
        return Lines(shown, **options)
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                    TimeRemainingColumn(), disable=not shown, **options)
