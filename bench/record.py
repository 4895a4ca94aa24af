"""Where and with what something was measured, and tables of it in the terminal."""

import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from bench import ROOT
from harmonica_dit.timing import processor

PACKAGES = ("torch", "triton", "diffusers", "torchao", "cache-dit", "harmonica-kernels")


def machine() -> dict[str, Any]:
    """The processor, and the versions of what runs on it."""
    return dict(processor=processor(), cores=os.cpu_count(), threads=torch.get_num_threads(),
                python=platform.python_version(), versions={name: installed_version(name) for name in PACKAGES})


def moment() -> dict[str, Any]:
    """The time (UTC), the machine's load, and the commit."""
    return dict(date=datetime.now(timezone.utc).isoformat(timespec="seconds"), load=list(os.getloadavg()),
                commit=commit())


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """The commit of this checkout, marked where tracked files have changed since; "unknown" where it has no .git.

    $HARMONICA_COMMIT names it where the tree came without one.
    """
    named = os.environ.get("HARMONICA_COMMIT")
    return named or read_output("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def read_output(*command: str) -> str:
    """A command's output, "unknown" where it fails or is not there."""
    try:
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def cell(key: str, form: str = "{}", empty: str = "–") -> Callable[[dict], str]:
    """The cell of a row's value: `form` formats it; a row without it gets `empty`."""
    return lambda row: empty if row.get(key) is None else form.format(row[key])


def table(title: str, caption: str, columns: Mapping[str, Callable[[dict], str]], rows: Sequence[dict]) -> Group:
    """The rows as a table: a column for each heading and what makes its cells, and the rows' notes below."""
    made = Table()
    for number, heading in enumerate(columns):
        made.add_column(heading, justify="right" if number else "left", overflow="fold")
    for row in rows:
        made.add_row(*(make(row) for make in columns.values()))
    first = next(iter(columns.values()))
    notes = dict.fromkeys(f"{first(row)}: {row['note']}" for row in rows if row.get("note"))
    return Group(Text(title, "bold"), made, Text("\n".join([caption, *notes])))
