"""The commands `harmonica bench models`, `caches` and `quantized`."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from harmonica_dit.files import check_file

console = Console()
app = typer.Typer(no_args_is_help=True, help="Measure: on the CPU, on random weights, candidates in turn, medians. "
                                             "OMP_NUM_THREADS sets the threads.")

Json = Annotated[Path | None, typer.Option(help="Writes rows, spread, machine, versions and commit here.")]
Rounds = Annotated[int, typer.Option(help="Each runs every candidate once; one more does not count.")]
Steps = Annotated[int, typer.Option(help="Steps of a trajectory, T.")]
Cur = Annotated[float, typer.Option(help="Cache utilization ratio of the schedule, drawn at random.")]
Heads = Annotated[int | None, typer.Option(help="Attention heads, in place of a number that a CPU can bear.")]
Layers = Annotated[int | None, typer.Option(help="Blocks of each kind, in place of the real depth.")]


@app.command()
def models(
    names: Annotated[list[str] | None, typer.Argument(help="Models, such as dit-xl-2-256.  [default: all but "
                                                           "pixart-alpha-1024, which takes long]")] = None,
    steps: Steps = 5,
    cur: Cur = 0.56,
    rounds: Rounds = 5,
    heads: Heads = None,
    layers: Layers = None,
    json: Json = None,
) -> None:
    """diffusers' transformers, cached against plain: speedup in FLOPs and on the clock, memory, error."""
    from .models import CAPTION, COLUMNS, MODELS, bench_models

    names = names or [name for name in MODELS if name != "pixart-alpha-1024"]
    report(bench_models, COLUMNS, CAPTION, json, names=names, steps=steps, cur=cur, rounds=rounds, heads=heads,
           layers=layers)


@app.command()
def caches(steps: Steps = 10, rounds: Rounds = 5, heads: Heads = None, layers: Layers = None,
           json: Json = None) -> None:
    """cache-dit and diffusers' own caches beside ours on a DiTPipeline, the work skipped made equal."""
    from .caches import CAPTION, COLUMNS, bench_caches

    report(bench_caches, COLUMNS, CAPTION, json, steps=steps, rounds=rounds, heads=heads, layers=layers)


@app.command()
def quantized(steps: Steps = 10, cur: Cur = 0.56, rounds: Rounds = 5, heads: Heads = None, layers: Layers = None,
              json: Json = None) -> None:
    """PixArt-α: speedup and error of quantization alone, of a router's schedule alone and of both."""
    from .quantized import CAPTION, COLUMNS, bench_quantized

    report(bench_quantized, COLUMNS, CAPTION, json, steps=steps, cur=cur, rounds=rounds, heads=heads, layers=layers)


def report(bench: Callable[..., Iterable[dict]], columns: dict, caption: str, path: Path | None, **options) -> None:
    """Measures with these options, prints the table and, where there is a path, writes each row there as it comes."""
    from .measure import settings, table, write_report

    if path is not None:
        check_file(path)
    about = settings(**options)
    rows = []
    for row in bench(**options):
        rows.append(row)
        if path is not None:
            write_report(path, bench.__name__, about, rows)
    threads = "1 thread" if about["threads"] == 1 else f"{about['threads']} threads"
    console.print(table(f"{about['processor']}, {threads}, load {about['load'][0]:.1f}", caption, columns, rows))
