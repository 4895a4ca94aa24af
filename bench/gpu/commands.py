"""The parts that are commands: the build, the tests, the sanitizer, and the device-gated benchmark."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec

from .merge import ROOT
from .record import Record

TAIL = 120  # lines of a command's output that are kept
PYTEST = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-m", "gpu"]


def run(record: Record) -> None:
    {"build": build, "tests": tests, "sanitizer": sanitizer, "gated": gated}[record.part](record)


def build(record: Record) -> None:
    wanted = ["--name"] if record.tiny else ["build_ext", "--inplace"]
    call(record, {"build_ext": [sys.executable, "setup.py", *wanted]})
    call(record, {"info": [sys.executable, "-m", "harmonica_kernels"]})


def tests(record: Record) -> None:
    # tests of what is not installed there cannot be collected; the others run, side by side where xdist is, since most
    # of their time is Triton's compiler's
    wanted = ["--collect-only", "tests/kernels/test_triton.py"] if record.tiny else ["--durations=5", "tests"]
    if find_spec("xdist") and not record.tiny:
        wanted += ["-n", "8"]
    call(record, {"pytest -m gpu": [*PYTEST, "--continue-on-collection-errors", *wanted]}, none_collected=record.tiny)


def sanitizer(record: Record) -> None:
    """memcheck and racecheck, at once since each leaves most of the GPU idle, on the kernels' tests: small but for one.

    What the part `tests` compiled, with the same HARMONICA_TEST_SEED, is not compiled again. Without PyTorch's pool of
    memory, whose blocks hold neighbours, more of what is out of bounds is seen.
    """
    tool = shutil.which("compute-sanitizer")
    if tool is None and not record.tiny:
        raise FileNotFoundError("compute-sanitizer is not on the PATH; it comes with CUDA's toolkit")
    pytest = [*PYTEST, "-k", "not addresses_beyond", "tests/kernels/test_triton.py"]
    commands = {name: [tool, "--tool", name, "--error-exitcode", "9", *pytest] for name in ("memcheck", "racecheck")}
    if record.tiny:
        commands = {name: [*pytest, "--version"] for name in commands}
    call(record, commands, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def gated(record: Record) -> None:
    """bench/gpu_gated.py, which prints a line of JSON for each finding; a dry run only reads it in."""
    read = "import runpy; print('read:', *runpy.run_path('bench/gpu_gated.py')['LIMITS'])"
    try:
        call(record, {"gpu_gated.py": [sys.executable, *(["-c", read] if record.tiny else ["bench/gpu_gated.py"])]})
    finally:  # stopped as well
        for finding in findings(record.content["notes"].get("gpu_gated.py", dict(output=[]))["output"]):
            record.row(**finding)
            if "gated_by_captured" in finding:
                reach = 1.15 if finding["rows"] == 2 else 1.05
                record.ratio(f"{finding['rows']} rows, device-gated / captured", finding["gated_by_captured"], reach,
                             at_most=True)


def findings(lines: list[str]) -> list[dict]:
    """Those lines that are JSON objects."""
    found = []
    for line in lines:
        with suppress(ValueError):
            found.append(json.loads(line))
    return [finding for finding in found if isinstance(finding, dict)]


def call(record: Record, commands: dict[str, list[str]], none_collected: bool = False,
         environment: dict[str, str] | None = None) -> None:
    """Runs the commands side by side; each may fail by itself. none_collected: pytest may find nothing."""
    record.stage(", ".join(commands))
    started, running = time.monotonic(), {}
    for name, command in commands.items():
        path = record.path.with_name(f"{record.part}-{name.replace(' ', '_')}.log")
        with path.open("w") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                       env=os.environ | (environment or {}))
        running[name] = process, path
    try:
        for process, _ in running.values():
            process.wait()
    finally:  # stopped as well
        for name, (process, path) in running.items():
            lines, status = path.read_text(errors="replace").splitlines(), process.poll()
            record.note(name, dict(status=status, output=lines[-TAIL:]))
            record.row(command=name, status=status, seconds=time.monotonic() - started, last=lines[-1] if lines else "")
            if status != 0 and not (none_collected and status == 5):
                record.failed[name] = "\n".join(lines[-TAIL:])
                print(record.failed[name])
