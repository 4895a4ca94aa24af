"""One part's results, written as they come."""

import json
import os
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench import ROOT
from bench.record import machine, moment, read_output
from bench.timing import quartiles
from harmonica_dit.timing import interleave, medians

from .merge import ratio_line

SPIN = 0.3  # seconds


class Record:
    """FOLDER/PART.json, rewritten as a whole with each addition: a part that is stopped leaves what it had.

    `tiny` marks a dry run on the CPU, whose times mean nothing. `attempt` keeps one failure from ending the part.
    """

    def __init__(self, part: str, folder: Path, tiny: bool):
        self.part, self.tiny, self.path, self.started = part, tiny, Path(folder) / f"{part}.json", time.monotonic()
        self.device = torch.device("cpu" if tiny else "cuda")
        self.failed: dict[str, str] = {}
        self._valid = True  # whether all checks of this attempt held; what is measured otherwise says so
        self._within = 0  # how many attempts
        self.content: dict[str, Any] = dict(
            part=part, finished=False, seconds=0.0, stage="", machine=describe(tiny), ratios=[], rows=[], checks=[],
            samples={}, clocks={}, notes={}, failed=self.failed)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Record":
        self._write()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None:
            self.failed[self.content["stage"] or "start"] = "".join(traceback.format_exception(error))
        self.content["finished"] = error is None
        self._write()

    @contextmanager
    def attempt(self, stage: str):
        """A stage of its own: an exception in it is recorded, and the part goes on. Within another one, what that
        one's checks found holds on, and again afterwards."""
        self.stage(stage)
        before = self._valid
        self._valid = before if self._within else True
        self._within += 1
        try:
            yield
        except Exception:
            self.failed[stage] = traceback.format_exc()
            self._say(f"{stage}: failed\n{self.failed[stage]}")
            self._write()
        finally:
            self._within -= 1
            if self._within:
                self._valid = before

    def stage(self, stage: str) -> None:
        """What is being done now; the last one is in the file of a part that was stopped."""
        self.content["stage"] = stage
        self._write()

    def time(self, group: str, candidates: dict[str, Callable[[], object]], rounds: int, *, launches: int = 1,
             warmup: int = 2) -> dict[str, float]:
        """Times the candidates interleaved and keeps their samples; returns their medians in seconds.

        launches: how many of what is timed one call makes. In a dry run one round has to do.
        """
        if self.tiny:
            rounds, warmup = 1, 0
        spin(self.device)
        found = interleave(candidates, rounds, warmup=warmup, device=self.device)
        seconds = {name: [value / launches for value in values] for name, values in found.items()}
        for name, values in seconds.items():
            self.content["samples"][f"{group}: {name}"] = dict(
                median=median(values), quartiles=quartiles(values), least=min(values), most=max(values),
                count=len(values), unit="s")
        self.content["clocks"][group] = clocks(self.device)
        self._write()
        return medians(seconds)

    def check(self, what: str, error: float, limit: float) -> bool:
        """Keeps a relative error and returns whether it holds. Where it is over its limit or no number, the part has
        failed, and all that is measured until the next attempt is marked as not valid."""
        valid = error <= limit
        self.content["checks"].append(dict(what=what, error=error, limit=limit, valid=valid))
        if not valid:
            self._valid = False
            self.failed[what] = f"relative error {error:.3g}, at most {limit:.3g} was expected"
            self._say(f"{what}: {self.failed[what]}; timed all the same, marked as not valid")
        self._write()
        return valid

    def row(self, **columns: Any) -> None:
        """A line of the part's table."""
        if not self._valid:
            columns["valid"] = False
        self.content["rows"].append(columns)
        self._say(", ".join(f"{name} {format_value(value)}" for name, value in columns.items()))
        self._write()

    def ratio(self, measure: str, value: float, reach: float, at_most: bool = False) -> None:
        """One of the numbers to reach."""
        self.content["ratios"].append(dict(measure=measure, value=value, reach=reach, at_most=at_most,
                                           valid=self._valid))
        self._say(ratio_line(self.content["ratios"][-1]))
        self._write()

    def note(self, name: str, value: Any) -> None:
        """Anything else that belongs to the results."""
        self.content["notes"][name] = value
        self._write()

    def _say(self, line: str) -> None:
        print(f"  {'dry run, no measurement: ' if self.tiny else ''}{line}")

    def _write(self) -> None:
        self.content["seconds"] = time.monotonic() - self.started
        part = self.path.with_suffix(".part")
        part.write_text(without_places(json.dumps(self.content, indent=1)))
        os.replace(part, self.path)


def without_places(text: str) -> str:
    """Text without this machine's folders: files of the project, of packages and of Python by what follows those."""
    known = sysconfig.get_paths()
    folders = {str(ROOT), os.path.dirname(sys.executable), known["purelib"], known["platlib"], known["stdlib"]}
    for folder in sorted(folders, key=len, reverse=True):  # packages may lie inside the project's
        for written in (os.path.relpath(folder, ROOT), folder):  # pytest writes them from the project's on
            text = text.replace(f"{written}/", "") if written != "." else text
    return text


def spin(device: torch.device) -> None:
    """Keeps a GPU busy for so long that its clock has risen: a short sample after a pause would be of a slower one."""
    if device.type == "cpu":
        return
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    until = time.monotonic() + SPIN
    while time.monotonic() < until:
        for _ in range(20):
            a @ a
        torch.cuda.synchronize()


def clocks(device: torch.device) -> str:
    """The SM clock and the power, now; "" on a CPU."""
    return "" if device.type == "cpu" else read_output("nvidia-smi", "--query-gpu=clocks.sm,power.draw",
                                                       "--format=csv,noheader")


def format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def describe(tiny: bool) -> dict[str, Any]:
    """When, where and with what it was measured."""
    found = moment() | machine() | dict(dry_run=tiny)
    if tiny:
        return found | dict(gpu="none: a dry run on the CPU with tiny sizes, its times mean nothing")
    properties = torch.cuda.get_device_properties(0)
    return found | dict(
        gpu=properties.name, driver=read_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), multiprocessors=properties.multi_processor_count,
        l2_bytes=properties.L2_cache_size, memory_bytes=properties.total_memory)
