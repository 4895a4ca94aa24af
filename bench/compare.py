"""What has changed between two runs of `make bench`, beyond noise: `python -m bench.compare OLD.json NEW.json`.

A candidate is compared by its rounds' ratios to plain PyTorch, the case's yardstick, in the same round: so another load
or speed of the machine cancels. The change is the new median ratio over the old one, with a bootstrap's interval. A
candidate is slower if all of the interval lies above 1 + LEAST: from one process to the next more changes than the
rounds of one show. Exits with 1 if one is slower, with 2 if a file cannot be read, else with 0. Plain PyTorch itself
has nothing to be compared with; its time is shown.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from bench.record import cell, table

LEAST = 0.05
LEVEL = 0.01  # how often an interval may miss
DRAWS = 10_000
FEW = 5  # rounds: of fewer nothing is said
ABOUT = ("processor", "cores", "threads", "python", "versions")  # of the machine_info, what has to be the same
COLUMNS = {
    "what": cell("what"),
    "candidate": cell("candidate"),
    "old / plain": cell("old", "{:.3f}"),
    "new / plain": cell("new", "{:.3f}"),
    "new / old": cell("change", "{:.3f}"),
    "interval": lambda row: "{:.3f} … {:.3f}".format(*row["interval"]) if "interval" in row else "–",
    "": cell("verdict"),
}
CAPTION = "/ plain: the median of the rounds' ratios to plain PyTorch; of plain itself, its milliseconds."


class Entry(NamedTuple):
    """A candidate's rounds, in seconds, and those of its case's yardstick; None where it is that itself."""

    rounds: np.ndarray
    yardstick: np.ndarray | None


Key = tuple[str, str]  # what is done, and the candidate


def read(path: Path) -> tuple[dict[Key, Entry], dict[str, Any]]:
    """The entries of a file that `--benchmark-json` wrote, and what it says of the machine.

    Raises:
        ValueError: it is none of bench_all.py; the message names it.
    """
    try:
        found = json.loads(path.read_text())
        rounds, yardsticks = {}, {}
        for entry in found["benchmarks"]:
            info = entry["extra_info"]
            key = info["what"], info["candidate"]
            rounds[key], yardsticks[key] = np.array(entry["stats"]["data"]), (info["what"], info["yardstick"])
        for key, yardstick in yardsticks.items():
            if rounds[key].shape != rounds[yardstick].shape:
                raise ValueError(f"{': '.join(key)} has not the rounds of {yardstick[1]}")
        return {key: Entry(rounds[key], None if key == yardsticks[key] else rounds[yardsticks[key]])
                for key in rounds}, found["machine_info"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of `make bench`: {type(error).__name__}: {error}") from None


def compare(old: Mapping[Key, Entry], new: Mapping[Key, Entry]) -> list[dict]:
    """A row for each candidate of either."""
    rows = []
    for key in [*old, *(key for key in new if key not in old)]:
        row: dict[str, Any] = dict(what=key[0], candidate=key[1])
        rows.append(row)
        if key not in new:
            row["verdict"] = "missing"
        elif key not in old:
            row["verdict"] = "new"
        elif old[key].yardstick is None or new[key].yardstick is None:
            row |= {name: 1e3 * float(np.median(of[key].rounds)) for name, of in (("old", old), ("new", new))}
        else:
            row |= judge(*(of[key].rounds / of[key].yardstick for of in (old, new)))
    return rows


def judge(old: np.ndarray, new: np.ndarray) -> dict:
    """Of the ratios of all rounds: their medians, the change and its interval, and what it is called."""
    row = dict(old=float(np.median(old)), new=float(np.median(new)), change=float(np.median(new) / np.median(old)))
    if min(len(old), len(new)) < FEW:
        return row | dict(verdict="too few rounds")
    generator = np.random.default_rng(0)
    drawn = [np.median(generator.choice(one, (DRAWS, len(one))), axis=1) for one in (old, new)]
    low, high = np.quantile(drawn[1] / drawn[0], (LEVEL / 2, 1 - LEVEL / 2)).tolist()
    verdict = "slower" if low > 1 + LEAST else "faster" if high < 1 - LEAST else "the same"
    return row | dict(interval=(low, high), verdict=verdict)


def other_machine(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """In words, what the two runs did not have in common."""
    return [f"{name}: {old.get(name)} before, {new.get(name)} now" for name in ABOUT if old.get(name) != new.get(name)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("old", type=Path, help="what --benchmark-json wrote then")
    parser.add_argument("new", type=Path, help="what it has written now")
    asked = parser.parse_args(arguments)
    try:
        (old, before), (new, now) = read(asked.old), read(asked.new)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    rows = compare(old, new)
    Console(width=140).print(table(f"{asked.old} → {asked.new}", CAPTION, COLUMNS, rows))
    for words in other_machine(before, now):
        print(f"another machine: {words}")
    for verdict in ("slower", "faster", "too few rounds", "missing", "new"):
        named = [f"{row['what']}: {row['candidate']}" for row in rows if row.get("verdict") == verdict]
        if named:
            print(f"{verdict} ({len(named)}): {'; '.join(named)}")
    return int(any(row.get("verdict") == "slower" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
