"""Changes one line of the code at a time and sees whether its tests notice: `make mutants`, see docs/testing.md.

Every change is made in a copy of the tree. After Ctrl-C the same command goes on; results are kept in
build/mutants.json for as long as the sources and the change's tests are what they were.
"""

import argparse
import hashlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from candidates import Mutant, draw, named
from report import read_equivalents, write
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from table import NAMED, PARTS, SEED

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / "build" / "mutants.json"
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "demo", "runs", "*.egg-info", "__pycache__")


class Copy:
    """A copy of the tree, in which tests run."""

    def __init__(self, folder: Path, stop: threading.Event):
        self.root, self.stop = folder, stop
        shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
        self.environment = os.environ | {
            "PYTHONPATH": f"{folder}{os.pathsep}{folder / 'python'}", "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1", "HARMONICA_TEST_SEED": str(SEED)}
        where = "import harmonica_kernels._C as c, harmonica_kernels as k, harmonica_dit as d; " \
                "print(c.__file__, k.__file__, d.__file__, sep='\\n')"
        imported = subprocess.run([sys.executable, "-c", where], cwd=folder, env=self.environment, check=True,
                                  text=True, stdout=subprocess.PIPE).stdout.split("\n")[:3]
        if not all(Path(file).is_relative_to(folder) for file in imported):
            sys.exit(f"the tests would import another tree than the copy in {folder}: {imported}")

    def test(self, tests: tuple[str, ...], limit: float) -> tuple[int | None, float, str]:
        """Exit status, None after `limit` seconds; the seconds; and what was printed.

        Raises:
            InterruptedError: it was stopped.
        """
        shutil.rmtree(self.root / ".hypothesis", ignore_errors=True)  # examples that another mutant failed
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"--hypothesis-seed={SEED}",
                   *(f"tests/{test}" for test in tests)]
        begun = time.monotonic()
        with tempfile.TemporaryFile("w+") as printed:
            process = subprocess.Popen(command, cwd=self.root, env=self.environment, stdout=printed,
                                       stderr=subprocess.STDOUT, start_new_session=True)
            while process.poll() is None and time.monotonic() - begun < limit and not self.stop.is_set():
                time.sleep(0.1)
            status = process.poll()
            if status is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if self.stop.is_set():
                raise InterruptedError
            printed.seek(0)
            return status, time.monotonic() - begun, printed.read()

    def try_out(self, mutant: Mutant, tests: tuple[str, ...], limit: float) -> str:
        """"killed", "timed out" or "survived"."""
        file = self.root / mutant.file
        before = file.read_text()
        file.write_text(mutant.text)
        try:
            status, _, _ = self.test(tests, limit)
        finally:
            file.write_text(before)
        return {None: "timed out", 0: "survived"}.get(status, "killed")


class Run:
    """The tests of the unchanged tree, then every mutant, with what an earlier run found out."""

    def __init__(self, copies: list[Copy]):
        self.copies: queue.Queue = queue.Queue()
        for copy in copies:
            self.copies.put(copy)
        self.root, self.stop = copies[0].root, copies[0].stop
        self.found = json.loads(STATE.read_text()) if STATE.exists() else {}
        self.sources = digest(*(file.read_bytes() for file in sorted(self.root.rglob("*"))
                                if file.suffix in (".py", ".so") and not file.name.startswith("test_")
                                and not file.is_relative_to(self.root / "tests" / "mutants")))

    def key(self, tests: tuple[str, ...], *what: str) -> str:
        """What a result stands under: all that it depends on."""
        contents = [(self.root / "tests" / test.partition("::")[0]).read_bytes() for test in tests]
        return digest(self.sources.encode(), *contents, *(text.encode() for text in (*tests, *what)))

    def all(self, jobs: dict, description: str, job) -> dict:
        """Results of job(copy, *arguments) for jobs {key: arguments}; those that are known are not run again."""
        def in_a_copy(arguments):
            copy = self.copies.get()
            try:
                return job(copy, *arguments)
            finally:
                self.copies.put(copy)

        missing = [key for key in jobs if key not in self.found]
        with ThreadPoolExecutor(self.copies.qsize()) as pool, \
                Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                         TextColumn("left:"), TimeRemainingColumn(), speed_estimate_period=600) as progress:
            task = progress.add_task(description, total=len(jobs), completed=len(jobs) - len(missing))
            futures = {pool.submit(in_a_copy, jobs[key]): key for key in missing}
            try:
                for future in as_completed(futures):
                    self.found[futures[future]] = future.result()
                    self.save()
                    progress.advance(task)
            except BaseException:
                self.stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        return {key: self.found[key] for key in jobs}

    def save(self) -> None:
        STATE.parent.mkdir(exist_ok=True)
        temporary = STATE.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.found, indent=0))
        temporary.replace(STATE)


def digest(*parts: bytes) -> str:
    checksum = hashlib.sha256()
    for part in parts:
        checksum.update(hashlib.sha256(part).digest())
    return checksum.hexdigest()[:20]


def unchanged(copy: Copy, test: str) -> float:
    status, seconds, printed = copy.test((test,), 600)
    if status != 0:
        raise RuntimeError(f"tests/{test} fails without any change:\n{printed[-3000:]}")
    return round(seconds, 1)


def main() -> str | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="at a time, of one thread each (2)")
    processes, stop = parser.parse_args().processes, threading.Event()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leaves no more behind than Ctrl-C
    try:
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            return test_all(Run([Copy(Path(folder) / str(i), stop) for i in range(processes)]))
    except KeyboardInterrupt:
        return "stopped; the same command goes on from here"


def test_all(run: Run) -> str | None:
    """Tests the unchanged tree and every mutant, and writes the table. Returns what is left to do, if anything."""
    tests = {file: names for part in PARTS for file, names in part.tests.items()}
    mutants = [mutant for part in PARTS for mutant in draw(run.root, part.name, part.tests, part.draws, SEED)]
    mutants += [named(run.root, *change) for change in NAMED]
    equivalents = read_equivalents(run.root)
    keys = {test: run.key((test,)) for test in sorted({test for names in tests.values() for test in names})}
    seconds = run.all({key: (test,) for test, key in keys.items()}, "unchanged", unchanged)
    jobs = {}
    for mutant in mutants:
        names = tests[mutant.file]
        limit = 30 + 3 * sum(seconds[keys[test]] for test in names)
        jobs[run.key(names, mutant.file, mutant.text)] = mutant, names, limit
    outcomes = run.all(jobs, "mutants", Copy.try_out)
    return write(ROOT, [(mutant, outcomes[key]) for key, (mutant, *_) in jobs.items()], equivalents, SEED)


if __name__ == "__main__":
    sys.exit(main())
