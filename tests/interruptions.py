"""Kills trainings and comparisons again and again, and compares what they end with: `make interruptions`.

    python -m tests.interruptions [--kills 60] [--seed 0] [--out FILE.json]

Each work runs once to its end. Then it runs in another folder and is ended by SIGKILL, with all its processes: at a
random moment, or as soon as a temporary file is seen, which is while a file is being written. After each kill every
file that has its final name must be whole. The same call goes on, until it has been killed often enough and may end.
What it leaves must then be what the first run left, to the bit but for times.
"""

import argparse
import csv
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.progress import Progress

import harmonica_dit
from bench import RESULTS
from bench.record import machine, moment
from harmonica_dit.evaluate import compare
from harmonica_dit.evaluate.catalogue import make_methods
from harmonica_dit.files import load_tensors, replacement

STEPS = 6
MADE_AT_ONCE = ("seconds", "wall_speedup", "process", "run")  # what differs between two runs that end alike
load = partial(harmonica_dit.load, "fashion-dit")


def train_router(out: Path) -> None:
    harmonica_dit.train_router(load(), steps=STEPS, target_speedup=1.5, trajectories=12, batch=2, out=out,
                               progress=False)


def train_forecaster(out: Path) -> None:
    harmonica_dit.train_forecaster(load(), 1.9, steps=STEPS, target="accurate", iterations=12, images=60, held_out=20,
                                   batch=4, out=out, progress=False)


def compare_methods(out: Path, processes: int = 1) -> None:
    net = load()
    methods = make_methods(net, ("fora", "trunk", "first-block"), (1.8,), steps=STEPS, guidance=1.5, scheduler="ddim")
    rows = compare(net, methods, torch.arange(24) % 10, steps=STEPS, batch=4, folder=out / "samples",
                   processes=processes, load=load)
    with replacement(out / "rows.json") as made:
        made.write_text(json.dumps([{name: value for name, value in row.items() if name not in MADE_AT_ONCE}
                                    for row in rows]))


WORKS: dict[str, Callable[[Path], None]] = {
    "a router's training": train_router,
    "a forecaster's training": train_forecaster,
    "a comparison": compare_methods,
    "a comparison by two processes": partial(compare_methods, processes=2),
}


@dataclass
class Life:
    """A run of a work in a process group of its own."""

    work: Callable[[Path], None]
    folder: Path

    def __post_init__(self):
        self.folder.mkdir(exist_ok=True)
        self.began, self.pid = time.monotonic(), os.fork()
        os.setpgid(self.pid, 0)  # by parent and child, so that it is done whoever runs first
        if self.pid == 0:
            status = 1
            try:
                with open(self.folder.with_suffix(".log"), "a") as log:
                    os.dup2(log.fileno(), 1)
                    os.dup2(log.fileno(), 2)
                self.work(self.folder)
                status = 0
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
            finally:
                os._exit(status)

    def ended(self) -> bool:
        """Whether it has come to its own end. Raises SystemExit if that was an error."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid and status:
            raise SystemExit(f"{self.folder.name}: failed after an interruption, see {self.folder.with_suffix('.log')}")
        return bool(pid)

    def kill(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def run(work: Callable[[Path], None], folder: Path) -> float:
    """To its end; the seconds."""
    life = Life(work, folder)
    while not life.ended():
        time.sleep(0.01)
    return time.monotonic() - life.began


def interrupt(work: Callable[[Path], None], folder: Path, seconds: float, draw: random.Random) -> str | None:
    """Runs it until it is killed; says at what, or None if it ended before."""
    at_a_file = draw.random() < 0.5
    life, files = Life(work, folder), draw.randrange(1, 6)  # the number of the temporary file that it is killed at
    end, seen = life.began + draw.uniform(0.05, 0.6) * seconds, set()
    while not life.ended():
        if at_a_file:
            seen |= {path for path in folder.rglob(".*") if path.is_file()}
            if len(seen) >= files:
                life.kill()
                return "a file"
        elif time.monotonic() > end:
            life.kill()
            return "a moment"
        time.sleep(0.0005)
    return None


def contents(folder: Path) -> dict[str, object]:
    """What a folder holds but for times, temporary files and events; every file with its final name is read whole."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix == ".safetensors":
            tensors, about = load_tensors(path)
            found[name] = ({key: (t.dtype, t.tolist()) for key, t in tensors.items()},
                           {key: value for key, value in about.items() if key not in MADE_AT_ONCE})
        elif path.suffix == ".csv":
            with open(path, newline="") as rows:
                found[name] = [{key: value for key, value in row.items() if key not in MADE_AT_ONCE}
                               for row in csv.DictReader(rows)]
        elif path.suffix == ".json":
            found[name] = json.loads(path.read_text())
        elif path.suffix == ".png":
            found[name] = path.read_bytes()
    return found


def leftovers(folder: Path) -> list[str]:
    """Temporary files and locks."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*")
            if path.is_file() and (path.name.startswith(".") or path.suffix == ".lock")]


def measure(name: str, kills: int, draw: random.Random, place: Path, tick: Callable[[], None]) -> dict:
    """Kills a work so often, over as many runs of it as that takes."""
    work, whole = WORKS[name], place / "whole"
    seconds = run(work, whole)
    expected, at, runs = contents(whole), dict.fromkeys(("a file", "a moment"), 0), 0
    while sum(at.values()) < kills:
        runs += 1
        folder, lives = place / f"run-{runs}", 0
        while lives < 12 and sum(at.values()) < kills:
            if (where := interrupt(work, folder, seconds, draw)) is None:
                break
            at[where], lives = at[where] + 1, lives + 1
            contents(folder)  # raises if a file is not whole
            tick()
        run(work, folder)
        found = contents(folder)
        differing = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        if differing or leftovers(folder):
            raise SystemExit(f"{name}: ended otherwise than without interruptions: {differing + leftovers(folder)}")
    return dict(work=name, seconds=round(seconds, 2), files=len(expected), runs=runs, kills=sum(at.values()),
                while_writing=at["a file"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=60, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "interruptions.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    draw, rows = random.Random(args.seed), []
    with Progress() as bar:
        task = bar.add_task("killing", total=args.kills)
        for i, name in enumerate(WORKS):
            share = args.kills * (i + 1) // len(WORKS) - args.kills * i // len(WORKS)
            with tempfile.TemporaryDirectory() as place:
                rows.append(measure(name, share, draw, Path(place), lambda: bar.advance(task)))
    with replacement(args.out) as made:
        made.write_text(json.dumps(machine() | moment() | dict(seed=args.seed, rows=rows), indent=1) + "\n")
    print("| work | runs | kills | while a file was written | ended as the uninterrupted run |")
    print("|---" * 5 + "|")
    for row in rows:
        print(f"| {row['work']} | {row['runs']} | {row['kills']} | {row['while_writing']} | all, "
              f"{row['files']} files |")


if __name__ == "__main__":
    main()
