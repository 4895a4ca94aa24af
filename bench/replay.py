"""What an interleaved run found, and the clock through which pytest-benchmark reads it."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Measured(NamedTuple):
    """One case of a suite: a set of candidates that were timed together.

    case: its name in tables.
    seconds: each candidate's, round by round.
    rows: of the suite's table, by candidate; what pytest-benchmark keeps with a candidate's times. A candidate "X: Y"
        shares the row of X. A candidate that could not be timed has a row with a `note`.
    """

    case: str
    seconds: dict[str, list[float]]
    rows: dict[str, dict[str, Any]]

    def row(self, candidate: str) -> dict[str, Any]:
        return self.rows.get(candidate) or self.rows.get(candidate.partition(": ")[0], {})


class ReplayClock:
    """A clock on which each round lasts as long as the recorded one. Its method `time` is a timer."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def replay(self, benchmark, seconds: Sequence[float]) -> None:
        """Gives these durations to a `benchmark` fixture whose timer is `time`."""
        durations = iter(seconds)

        def rewind() -> None:
            self.now = 0.0

        def advance() -> None:
            self.now = next(durations)

        benchmark.pedantic(advance, setup=rewind, rounds=len(seconds))
