"""The parts that are commands: the build, the tests, the sanitizer, and the device-gated benchmark."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec

from bench import ROOT

from .needs import program
from .record import Record

TAIL = 400  # lines of a command's output that are kept
FAREWELL = 6  # seconds in which commands that were interrupted may say where
PYTEST = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-W", "default", "-p", "no:cacheprovider", "-p",
          "bench.gpu.at_once", "-o", "faulthandler_timeout=40", "-m", "gpu"]
TRITON = "tests/kernels/triton_kernels/test_triton.py"
GATED = ("smallest", "dit", "bodies", "cublas", "change", "memory")  # what matters most first


def run(record: Record) -> None:
    {"build": build, "tests": tests, "sanitizer": sanitizer, "gated": gated}[record.part](record)


def build(record: Record) -> None:
    """Without CUDA where it cannot be built with it: most parts need no more, and all need some. A dry run builds only
    where nothing has been built."""
    built = record.tiny and find_spec("harmonica_kernels._C") is not None
    if not built and not compile_extension(record, "build/cmake-gpu", limit=130):
        record.row(warning="THE EXTENSION IS BUILT WITHOUT CUDA: what is gated on the device cannot run")
        compile_extension(record, "build/cmake-gpu-without-cuda", "-DCMAKE_CUDA_COMPILER=", ", without CUDA")
    call(record, {"info": [sys.executable, "-m", "harmonica_kernels"]})


def compile_extension(record: Record, folder: str, option: str = "", name: str = "",
                      limit: float | None = None) -> bool:
    """By CMake itself: an old setuptools there cannot read pyproject.toml. Whether the extension is in its place."""
    from pybind11 import get_cmake_dir

    started = time.monotonic()
    cmake, ninja = (program(name) or name for name in ("cmake", "ninja"))
    commands = {
        "configure": [cmake, "-S", ".", "-B", folder, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
                      f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-Dpybind11_DIR={get_cmake_dir()}", *filter(None, [option])],
        "compile": [ninja, "-C", folder],  # which ends its compilers when it is ended
        "install": [cmake, "--install", folder, "--prefix", "harmonica_kernels"]}
    return all(call(record, {f"{step}{name}": command}, limit=limit and limit - (time.monotonic() - started))
               for step, command in commands.items())


def tests(record: Record) -> None:
    """Those of a GPU, side by side where xdist is, since most of their time is Triton's compiler's."""
    if record.tiny:
        wanted = ["--collect-only", TRITON]
    else:
        wanted = ["--durations=5", "--continue-on-collection-errors", *gpu_tests()]
        if find_spec("xdist"):
            wanted += ["-n", "12"]
    call(record, {"pytest -m gpu": [*PYTEST, *wanted]}, none_collected=record.tiny)


def gpu_tests() -> list[str]:
    """The files that have some; to collect all others would take long, and some cannot be imported there."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")
                  if "pytest.mark.gpu" in path.read_text())


def sanitizer(record: Record) -> None:
    """memcheck and racecheck, at once since each leaves most of the GPU idle, on the kernels' tests, small but for one,
    and on the smallest gated graph.

    What the part `tests` compiled, with the same HARMONICA_TEST_SEED, is not compiled again. Without PyTorch's pool of
    memory, whose blocks hold neighbours, more of what is out of bounds is seen.
    """
    tool = shutil.which("compute-sanitizer")
    if tool is None and not record.tiny:
        raise FileNotFoundError("compute-sanitizer is not on the PATH; it comes with CUDA's toolkit")
    pytest = [*PYTEST, "-k", "not addresses_beyond", TRITON]
    commands = {name: [tool, "--tool", name, "--error-exitcode", "9", *pytest] for name in ("memcheck", "racecheck")}
    commands["smallest gated graph"] = [sys.executable, "-m", "bench.gpu.gated", "sanitizer"]
    if record.tiny:
        commands = {name: [*pytest, "--version"] for name in commands}
    call(record, commands, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def gated(record: Record) -> None:
    """gated.py, which prints a line of JSON for each finding; a dry run only imports it."""
    from . import models  # which needs what the part `build` builds

    arguments = ["-c", "from bench.gpu import gated; print('imported:', *gated.LIMITS)"] if record.tiny else [
        "-m", "bench.gpu.gated", *GATED]
    try:
        call(record, {"gated": [sys.executable, *arguments]},
             environment={"HARMONICA_ATTENTION": models.attention(record.path.parent)})
    finally:  # stopped as well
        for finding in findings(record.content["notes"].get("gated", dict(output=[]))["output"]):
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
         environment: dict[str, str] | None = None, limit: float | None = None) -> bool:
    """Runs the commands side by side; each may fail by itself. Whether all went well.

    none_collected: pytest may find nothing. limit: seconds, after which those that still run are ended.
    """
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
            process.wait(limit and max(0.0, started + limit - time.monotonic()))
    except subprocess.TimeoutExpired:
        for process, _ in running.values():
            process.terminate()
    finally:  # stopped as well, and then the commands were too
        until, well = time.monotonic() + FAREWELL, True
        for name, (process, path) in running.items():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            status = process.poll()
            process.kill()
            lines = path.read_text(errors="replace").splitlines()
            record.note(name, dict(status=status, output=lines[-TAIL:]))
            record.row(command=name, status=status, seconds=time.monotonic() - started, last=lines[-1] if lines else "")
            if status != 0 and not (none_collected and status == 5):
                well = False
                record.failed[name] = "\n".join(lines[-TAIL:])
                print(*lines, sep="\n")
    return well
