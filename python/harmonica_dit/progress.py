"""The progress bar of all long work: what is done, how long it took and how long it will take."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_bar(console: Console | None = None, shown: bool = True) -> Progress:
    """A bar on a console, by default on stdout; not shown, it takes the same calls."""
    # the time left is estimated from the last hour: of a step that takes minutes, rich's 30 seconds hold no two ends
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                    TimeRemainingColumn(), console=console, disable=not shown, speed_estimate_period=3600)
