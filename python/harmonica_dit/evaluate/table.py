"""A comparison in the terminal: a progress bar while it runs, then one table."""

from collections.abc import Sequence
from contextlib import ExitStack

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from harmonica_dit.progress import progress_bar

from .compare import compare
from .named_methods import Method

COLUMNS = {  # heading -> cell of a row
    "method": lambda row: row["name"],
    "CUR": lambda row: f"{row['cur']:.1%}",
    "FLOPs speedup": lambda row: f"{row['flops_speedup']:.2f}×",
    "wall clock speedup": lambda row: f"{row['wall_speedup']:.2f}×",
    "error": lambda row: f"{row['error']:.4f}",
    "to accurate": lambda row: "–" if row.get("accurate_error") is None else f"{row['accurate_error']:.4f}",
    "label accuracy": lambda row: "–" if row["label_accuracy"] is None else f"{row['label_accuracy']:.1%}",
    "Fréchet distance": lambda row: "–" if row["frechet"] is None else f"{row['frechet']:.2f}",
}


def table(rows: Sequence[dict], title: str) -> Table:
    """Rows of `compare` as a rich table, without the columns that are empty in all rows."""
    made = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left",
                 title_style="bold", caption_justify="left",
                 caption="error: RMSE against the uncached images, pixels in [-1, 1]; to accurate: against a more "
                         "accurate solution from the same noise")
    cells = {heading: [cell(row) for row in rows] for heading, cell in COLUMNS.items()}
    cells = {heading: column for heading, column in cells.items() if set(column) != {"–"}}
    for heading in cells:
        least = max(map(len, [*heading.split(), *cells[heading]]))  # no word of a heading, and no number, is cut
        made.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=heading == "method",
                        min_width=least)
    for line in zip(*cells.values()):
        made.add_row(*line)
    return made


def compare_with_bar(net, methods: Sequence[Method], labels, **options) -> list[dict]:
    """`compare` with a progress bar on stderr."""
    bar = progress_bar(Console(stderr=True))
    ways = len(methods) + 1 + (options.get("accurate") is not None)
    task = bar.add_task("sampling", total=ways * len(labels))
    with ExitStack() as stack:

        def progress(done: int) -> None:
            if done == 0:
                stack.enter_context(bar)  # not earlier: a refused argument should leave no bar above its message
            bar.update(task, completed=done)

        return compare(net, methods, labels, progress=progress, **options)
