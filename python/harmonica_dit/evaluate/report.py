"""A comparison as its reader wants it: a progress bar while it runs, then tables, files and pictures."""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from torch import Tensor

from harmonica_dit.files import replacement
from harmonica_dit.progress import progress_bar
from harmonica_dit.sample import decode
from harmonica_dit.sample.schedulers import config_of, make_scheduler, scheduler_name

from .along import errors_along
from .compare import compare
from .heat_maps import plot_schedules
from .named_methods import Method
from .pictures import image_grid
from .plots import metrics_of, plot_along, plot_tradeoff
from .samples import Samples

FOLLOWED, SHOWN = 16, 10  # images: for the errors along the trajectory, in the picture
ALIKE = 1.25  # methods cost about the same up to this ratio of their speedups


def _number(key: str, form: str, unit: str = ""):
    """The cell of a column; a dash where nothing was measured."""
    return lambda row: "–" if row.get(key) is None else format(row[key], form) + unit


COLUMNS = {  # heading -> cell of a row
    "method": lambda row: row["name"],
    "seed": _number("seed", "d"),
    "CUR": _number("cur", ".1%"),
    "FLOPs speedup": _number("flops_speedup", ".2f", "×"),
    "wall clock speedup": _number("wall_speedup", ".2f", "×"),
    "error": _number("error", ".4f"),
    "to accurate": _number("accurate_error", ".4f"),
    "error of latents": _number("latent_error", ".4f"),
    "latents to accurate": _number("accurate_latent_error", ".4f"),
    "label accuracy": _number("label_accuracy", ".1%"),
    "Fréchet distance": _number("frechet", ".2f"),
}
MORE = {  # which a terminal has no room for
    "above uncached (95 %)": lambda row: "–" if row.get("frechet_above") is None else (
        f"{row['frechet_above']:+.2f} ({row['frechet_above_low']:+.2f} … {row['frechet_above_high']:+.2f})"),
    "spatial Fréchet": _number("spatial_frechet", ".2f"),
    "inception score": _number("inception_score", ".2f"),
    "precision": _number("precision", ".3f"),
    "recall": _number("recall", ".3f"),
    "PSNR": _number("psnr", ".1f"),
    "SSIM": _number("ssim", ".3f"),
    "CLIP score": _number("clip_score", ".2f"),
}
CAPTION = ("error: RMSE against the uncached images, pixels in [-1, 1]; to accurate: against a more accurate solution "
           "from the same noise")
LATENTS = "; of latents: unclipped, not decoded"


def cells(rows: Sequence[dict], columns: Mapping = COLUMNS, floor: Mapping | None = None) -> dict[str, list[str]]:
    """Heading -> cells, without the columns that are empty in all rows, nor the seed's of one seed.

    floor: what real images score, a last line.
    """
    found = {heading: [cell(row) for row in rows] for heading, cell in columns.items()}
    if len(set(found["seed"])) == 1:
        del found["seed"]
    last = [] if floor is None else [{"name": f"{floor['samples']:,} real images"} | floor]
    return {heading: column + [columns[heading](row) for row in last] for heading, column in found.items()
            if set(column) != {"–"}}


def caption(rows: Sequence[dict]) -> str:
    return CAPTION + (LATENTS if any(row.get("latent_error") is not None for row in rows) else "")


def print_table(console: Console, rows: Sequence[dict], title: str, floor: Mapping | None = None) -> None:
    """Prints rows of `compare` as a table; what the console has no room for stands in further tables below it."""
    columns = cells(rows, floor=floor)
    first = [heading for heading in ("method", "seed") if heading in columns]
    others = [heading for heading in columns if heading not in first]
    parts: list[list[str]] = [first]
    wide = console.options.update(max_width=sys.maxsize)
    for heading in others:
        longer = [*parts[-1], heading]
        fits = Measurement.get(console, wide, _table(columns, longer)).minimum <= console.width
        if fits or parts[-1] == first:
            parts[-1] = longer
        else:
            parts.append([*first, heading])
    console.print(title, style="bold", soft_wrap=True)
    for part in parts:
        console.print(_table(columns, part))
    console.print(caption(rows), style="italic")


def _table(columns: Mapping[str, list[str]], headings: Sequence[str]) -> Table:
    made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in headings:
        least = max(map(len, [*heading.split(), *columns[heading]]))  # no word of a heading, and no number, is cut
        made.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=heading == "method",
                        min_width=least)
    for line in zip(*(columns[heading] for heading in headings)):
        made.add_row(*line)
    return made


def markdown(rows: Sequence[dict], title: str, floor: Mapping | None = None) -> str:
    """The same and more as a Markdown page."""
    columns = cells(rows, COLUMNS | MORE, floor)
    lines = [list(columns), ["---"] * len(columns), *map(list, zip(*columns.values()))]
    return "\n".join([f"# {title}", "", *(f"| {' | '.join(line)} |" for line in lines), "", caption(rows), ""])


def write(out: Path, net, methods: Sequence[Method], labels: Tensor, rows: Sequence[dict], title: str, *, steps: int,
          guidance: float, scheduler, batch: int, floor: Mapping | None = None) -> None:
    """Writes a comparison into its folder, whose folder samples holds its samples.

    floor: what real images score, see `judging.judged_floor`.

    rows.json has the rows and the settings, table.csv and table.md the same to read, tradeoff.png quality against
    speedup, schedules.png what is computed when, along.png errors along the trajectory, images.png samples of the same
    noise.
    """
    settings = dict(model=net.name, steps=steps, guidance=guidance, scheduler=scheduler_name(scheduler),
                    scheduler_config=config_of(make_scheduler(scheduler, steps, net)),
                    samples=len(labels), dtype=str(next(net.parameters()).dtype).removeprefix("torch."),
                    torch=torch.__version__, floor=floor)
    with replacement(out / "rows.json") as path:
        path.write_text(json.dumps(settings | {"rows": rows}, indent=1) + "\n")
    with replacement(out / "table.csv") as path, open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row))
        writer.writeheader()
        writer.writerows(rows)
    with replacement(out / "table.md") as path:
        path.write_text(markdown(rows, title, floor))
    if metrics_of(rows):
        plot_tradeoff(rows, out / "tradeoff.png", title)
    options = dict(guidance=guidance, scheduler=scheduler)
    kept = Samples(net, labels, out / "samples", batch=batch, **options)
    seed = rows[0]["seed"]
    methods = [kept.as_run(method, seed) for method in methods]
    speedups = {method.name: method.speedup(steps) for method in methods}
    tables = {f"{method.name}: {speedups[method.name]:.2f}×": method.schedule for method in methods
              if method.schedule is not None and method.schedule.cur > 0}
    if tables:
        plot_schedules(tables, out / "schedules.png")
    errors = errors_along(net, methods, labels[:FOLLOWED], steps=steps, seed=seed, **options)
    if errors:
        families = {method.name: method.family for method in methods}
        plot_along(_by_speedup(errors, speedups), families, out / "along.png")
    images = {method.name: decode(net, next(kept.batches(method, seed))[:SHOWN])
              for method in (Method("uncached", "uncached", steps), *methods)}
    if images["uncached"].shape[1] in (1, 3):
        titles = [f"{name}\n{speedups.get(name, 1):.2f}× fewer FLOPs" for name in images]
        image_grid(list(images.values()), titles, out / "images.png")


def _by_speedup(errors: Mapping[str, Sequence[float]], speedups: Mapping[str, float]) -> dict[str, dict]:
    """Errors in groups of methods that cost about the same: heading -> method's name -> its errors."""
    groups: list[list[str]] = []
    for name in sorted(errors, key=speedups.__getitem__):
        if not groups or speedups[name] > ALIKE * speedups[groups[-1][0]]:
            groups.append([])
        groups[-1].append(name)
    return {f"from {speedups[names[0]]:.2f}× fewer FLOPs": {name: errors[name] for name in names} for names in groups}


def compare_with_bar(net, methods: Sequence[Method], labels, **options) -> list[dict]:
    """`compare` with a progress bar on stderr."""
    bar = progress_bar()
    ways = len(methods) + 1 + (options.get("accurate") is not None)
    task = bar.add_task("sampling", total=ways * len(labels) * len(options.get("seeds", (0,))))
    with ExitStack() as stack:

        def progress(done: int) -> None:
            if done == 0:
                stack.enter_context(bar)  # not earlier: a refused argument should leave no bar above its message
            bar.update(task, completed=done)

        return compare(net, methods, labels, progress=progress, **options)
