"""Runs a target often: counts what passes the first check, keeps every fault, and looks at time and memory."""

import json
import os
import re
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

HANG = 20, 600  # seconds that an execution may take of the CPU, and by the clock
MEMORY = 512 << 20  # bytes of address space that the executions may take beyond what there is at the beginning
CHUNK = 2000  # examples that hypothesis draws at a time; it remembers all of them


class Outcome(NamedTuple):
    """past: whether the input passed the first check. error: by which it was refused, if it was."""

    past: bool
    error: Exception | None


class Tally:
    """What became of a target's executions.

    folder: where the inputs of faults are kept. executions: after so many `finished` is called.
    """

    def __init__(self, folder: Path, executions: int, finished: Callable[[], None]):
        self.folder, self.executions, self.finished = folder, executions, finished
        self.done = self.past = self.accepted = 0
        self.errors: Counter[str] = Counter()  # by where they are raised
        self.faults: dict[str, str] = {}

    def one(self, run: Callable[[], Outcome], keep: Callable[[], bytes]) -> None:
        """One execution. keep: what repeats it."""
        if self.done == 0:
            self._limit_memory()
        set_timers(*HANG)
        try:
            outcome = run()
        except Exception as error:
            self._fault(error, keep)
        else:
            self.past += outcome.past
            self.accepted += outcome.error is None
            if outcome.error is not None:
                self.errors[f"{type(outcome.error).__name__} in {place(outcome.error)}"] += 1
        set_timers(0, 0)
        self.done += 1
        if self.done == self.executions:
            self.finished()

    def result(self) -> dict:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return dict(executions=self.done, past_first_check=round(self.past / self.done, 3),
                    accepted=round(self.accepted / self.done, 3), errors=dict(sorted(self.errors.items())),
                    faults=list(self.faults.values()), memory_mb=peak >> 10,
                    memory_grown_mb=max(0, peak - self.before) >> 10)

    def _limit_memory(self) -> None:
        self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.RLIM_INFINITY))

    def _fault(self, error: Exception, keep: Callable[[], bytes]) -> None:
        where = f"{type(error).__name__} in {place(error)}"
        if where in self.faults:
            return
        self.faults[where] = f"{where}: {error!s:.300}"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{len(self.faults)}").write_bytes(keep())
        print(f"FAULT {self.faults[where]}", file=sys.stderr)
        traceback.print_exception(error, limit=-6, file=sys.stderr)


def set_timers(of_cpu: float, by_clock: float) -> None:
    """Signals that end the process after so many seconds; 0 sets none."""
    signal.setitimer(signal.ITIMER_PROF, of_cpu)
    signal.setitimer(signal.ITIMER_REAL, by_clock)


def place(error: BaseException) -> str:
    """Where in the code under test an error, or the first that led to it, was raised."""
    while error.__context__ is not None:
        error = error.__context__
    found = [(re.search(r"harmonica_(dit|kernels)/.*", frame.filename), frame.name)
             for frame in traceback.extract_tb(error.__traceback__)]
    return next((f"{file[0]}, {name}" for file, name in reversed(found) if file), "the target")


def write(path: Path, tally: Tally) -> None:
    path.write_text(json.dumps(tally.result()))


def fuzz_files(target: Callable, change: Callable, file: str, corpus: Path, folder: Path, out: Path,
               executions: int, seed: int) -> None:
    """By atheris, which keeps the inputs that reach new code in `folder`; it ends the process."""
    import atheris

    def finished():
        write(out, tally)
        sys.stderr.flush()
        os._exit(0)

    tally, found = Tally(folder / "faults", executions, finished), folder / "corpus"
    found.mkdir(parents=True, exist_ok=True)
    seeds = [file.read_bytes() for file in sorted(corpus.iterdir())]
    place = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))

    def one(data: bytes) -> None:
        path = place / file
        path.write_bytes(data)
        tally.one(lambda: target(path), lambda: data)

    def mutate(data: bytes, largest: int, seed: int) -> bytes:
        random = Random(seed)
        made = change(random.choice((data, random.choice(seeds))), random)  # of a whole file most get far
        return made if len(made) <= largest else data

    os.chdir(place)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    atheris.Setup([sys.argv[0], f"-seed={seed}", "-max_len=65536", "-len_control=0", "-timeout=0", "-rss_limit_mb=0",
                   "-verbosity=0", "-reduce_inputs=0", str(found), str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()


def fuzz_arguments(target: Callable, strategy, folder: Path, out: Path, executions: int, seed: int) -> None:
    """By hypothesis."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    tally = Tally(folder / "faults", executions, lambda: None)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.chdir(tempfile.mkdtemp(prefix="fuzz-"))
    chunk = 0
    while tally.done < executions:

        @seeded(seed + chunk)
        @settings(max_examples=min(CHUNK, executions - tally.done), deadline=None, database=None,
                  phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(strategy)
        def many(drawn):
            if tally.done < executions:
                tally.one(lambda: target(drawn), lambda: repr(drawn).encode("utf-8", "surrogatepass"))

        many()
        chunk += 1
    write(out, tally)
