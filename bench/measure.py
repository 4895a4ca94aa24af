"""What the benchmarks share: candidates timed in turn, and a report in the terminal and in a JSON file."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from harmonica_dit.files import replacement
from harmonica_dit.flops import Flops
from harmonica_dit.schedule import Schedule

PACKAGES = ("torch", "diffusers", "torchao", "cache-dit", "harmonica-kernels")


class Bar:
    """A progress bar on stderr for a list of measurements."""

    def __init__(self, total: int):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> "Bar":
        self._bar.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._bar.__exit__(*error)

    def say(self, what: str) -> None:
        self._bar.update(self._task, description=what)

    def advance(self, rounds: int = 1) -> None:
        self._bar.advance(self._task, rounds)


def interleaved(candidates: Mapping[str, Callable[[], object]], rounds: int, bar: Bar) -> dict[str, list[float]]:
    """Seconds of every candidate's call in each of the rounds, after one round that does not count.

    A round calls every candidate once: whatever slows the machine slows all of them alike. The bar advances by
    rounds + 1.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            if number:
                seconds[name].append(time.perf_counter() - start)
        bar.advance()
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: median(values) for name, values in seconds.items()}


def spread(seconds: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Each candidate's lower quartile, median and upper quartile, in seconds."""
    return {name: quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
            for name, values in seconds.items()}


def random_schedule(branches: Sequence[str], flops: Flops, steps: int, cur: float, seed: int = 0) -> Schedule:
    """Reuses a share `cur` of the T·K entries, to the nearest entry, drawn at random from the rows after the first."""
    check_cur(cur, steps)
    K = len(branches)
    reused = round(cur * steps * K)
    order = torch.randperm((steps - 1) * K, generator=torch.Generator().manual_seed(seed))
    compute = torch.ones(steps, K, dtype=torch.bool)
    compute[1:].view(-1)[order[:reused]] = False
    return Schedule(compute, tuple(branches), flops, origin=f"random, CUR {cur:.0%}")


def check_cur(cur: float, steps: int) -> None:
    if not 0 <= cur <= (steps - 1) / steps:
        raise ValueError(f"cur: got {cur}, expected 0 to {(steps - 1) / steps:.4g}, for the first of {steps} steps has "
                         "nothing to reuse")


def check_counts(**counts: int | None) -> None:
    """Refuses numbers below 1."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")


def random_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn anew, at a scale that keeps activations near 1: none is zero, so no branch is hidden."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        std = 0.3 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
        parameter.data.normal_(std=std, generator=generator)
    return model.eval().requires_grad_(False)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference over that of what is wanted."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def settings(**options) -> dict:
    """The machine, its load, the versions and the commit that a report was made with."""
    return dict(date=datetime.now(timezone.utc).isoformat(timespec="seconds"), device="cpu", processor=processor(),
                cores=os.cpu_count(), threads=torch.get_num_threads(), load=list(os.getloadavg()),
                python=platform.python_version(), versions={name: installed(name) for name in PACKAGES},
                commit=commit(), **options)


def write_report(path: Path, name: str, settings: dict, rows: Sequence[dict]) -> None:
    settings = settings | dict(load_at_end=list(os.getloadavg()))
    with replacement(path) as temporary:
        temporary.write_text(json.dumps(dict(benchmark=name, settings=settings, rows=list(rows)), indent=1) + "\n")


def table(title: str, caption: str, columns: Mapping[str, Callable[[dict], str]], rows: Sequence[dict]) -> Table:
    """The rows as a rich table, a column for each heading and how its cell is made, and the rows' notes below."""
    first = next(iter(columns.values()))
    notes = [f"{first(row)}: {row['note']}" for row in rows if row.get("note")]
    made = Table(title=title, title_justify="left", title_style="bold", caption="\n".join([caption, *notes]),
                 caption_justify="left")
    for number, heading in enumerate(columns):
        made.add_column(heading, justify="right" if number else "left", overflow="fold")
    for row in rows:
        made.add_row(*(cell(row) for cell in columns.values()))
    return made


def cell(key: str, form: str, empty: str = "–") -> Callable[[dict], str]:
    """The cell of a row's number: `form` formats it; a row without it gets `empty`."""
    return lambda row: empty if row.get(key) is None else form.format(row[key])


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout that this file lies in, marked where files have changed since; None without one."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=Path(__file__).parent,
                              capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


@contextmanager
def forward_clocks(modules: Sequence[Sequence[nn.Module]], seconds: list[float]):
    """Adds to seconds[k] the time spent in calls of modules[k], until the block ends."""
    started: list[float] = []

    def start(*_) -> None:
        started.append(time.perf_counter())

    def stop(k: int) -> None:
        seconds[k] += time.perf_counter() - started.pop()

    handles = [handle for k, group in enumerate(modules) for module in group
               for handle in (module.register_forward_pre_hook(start),
                              module.register_forward_hook(lambda *_, k=k: stop(k)))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
