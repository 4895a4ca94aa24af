"""One part's results, written as they come."""

import json
import os
import platform
import subprocess
import time
import traceback
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from .merge import ROOT, ratio_line


class Record:
    """FOLDER/PART.json, rewritten as a whole with each addition: a part that is stopped leaves what it had.

    `tiny` marks a dry run on the CPU, whose times mean nothing. `attempt` keeps one failure from ending the part.
    """

    def __init__(self, part: str, folder: Path, tiny: bool):
        self.part, self.tiny, self.path, self.started = part, tiny, Path(folder) / f"{part}.json", time.monotonic()
        self.device = torch.device("cpu" if tiny else "cuda")
        self.failed: dict[str, str] = {}
        self.content: dict[str, Any] = dict(
            part=part, finished=False, seconds=0.0, stage="", machine=machine(tiny), ratios=[], rows=[], checks=[],
            samples={}, notes={}, failed=self.failed)
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
        """A stage of its own: an exception in it is recorded, and the part goes on."""
        self.stage(stage)
        try:
            yield
        except Exception:
            self.failed[stage] = traceback.format_exc()
            self._say(f"{stage}: failed\n{self.failed[stage]}")
            self._write()

    def stage(self, stage: str) -> None:
        """What is being done now; the last one is in the file of a part that was stopped."""
        self.content["stage"] = stage
        self._write()

    def samples(self, group: str, seconds: dict[str, list[float]]) -> dict[str, float]:
        """Keeps the candidates' samples; returns their medians in seconds."""
        for name, values in seconds.items():
            self.content["samples"][f"{group}: {name}"] = dict(
                median=median(values), quartiles=quantiles(values, n=4) if len(values) > 1 else values * 3,
                least=min(values), most=max(values), count=len(values), unit="s")
        self._write()
        return {name: median(values) for name, values in seconds.items()}

    def check(self, what: str, error: float, limit: float) -> None:
        """Keeps a relative error; ValueError where it is over its limit or no number: what is wrong is not timed."""
        self.content["checks"].append(dict(what=what, error=error, limit=limit))
        self._write()
        if not error <= limit:
            raise ValueError(f"{what}: relative error {error:.3g}, at most {limit:.3g} was expected")

    def row(self, **columns: Any) -> None:
        """A line of the part's table."""
        self.content["rows"].append(columns)
        self._say(", ".join(f"{name} {shown(value)}" for name, value in columns.items()))
        self._write()

    def ratio(self, measure: str, value: float, reach: float, at_most: bool = False) -> None:
        """One of the numbers to reach."""
        self.content["ratios"].append(dict(measure=measure, value=value, reach=reach, at_most=at_most))
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
        part.write_text(json.dumps(self.content, indent=1))
        os.replace(part, self.path)


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine(tiny: bool) -> dict[str, Any]:
    """Where and with what it was measured."""
    found = dict(date=datetime.now(timezone.utc).isoformat(timespec="seconds"), dry_run=tiny, commit=commit(),
                 python=platform.python_version(), torch=torch.__version__, triton=triton_version())
    if tiny:
        return found | dict(gpu="none: a dry run on the CPU with tiny sizes, its times mean nothing")
    properties = torch.cuda.get_device_properties(0)
    return found | dict(
        gpu=properties.name, driver=output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), multiprocessors=properties.multi_processor_count,
        l2_bytes=properties.L2_cache_size, memory_bytes=properties.total_memory)


def commit() -> str:
    if "HARMONICA_COMMIT" in os.environ:
        return os.environ["HARMONICA_COMMIT"]
    head = output("git", "rev-parse", "HEAD")
    changed = output("git", "status", "--porcelain", "--untracked-files=no")
    return f"{head}, changed" if head != "unknown" and changed not in ("", "unknown") else head


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def output(*command: str) -> str:
    """A command's output, "unknown" where it fails or is not there."""
    try:
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
