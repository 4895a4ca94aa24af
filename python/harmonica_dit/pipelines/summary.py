"""What a cache has done in a call, to read or to use."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class StreamSummary:
    """The calls of one stream: those of a step with the same conditioning, such as the prompt's.

    steps: calls of the transformer. computed, reused: branches, over all calls. forecast: of the reused ones, how many
    were forecast, not repeated. flops, plain_flops: with the cache and without. nbytes: of the cache, at most.
    """

    transformer: str
    name: str
    steps: int = 0
    computed: int = 0
    reused: int = 0
    forecast: int = 0
    flops: float = 0.0
    plain_flops: float = 0.0
    nbytes: int = 0
    fallbacks: Counter = field(default_factory=Counter)  # why steps were computed whole that the schedule would not


@dataclass
class Summary:
    """A call of a pipeline, or a trajectory of a loop. Print it, or take `as_dict()`.

    steps: T. schedule: in words. path: "fused" or "generic". unit: what was reused. left_out: what could not be used,
    each with the reason: branches, which are computed at every step, the trunk, or the fused path.
    """

    steps: int = 0
    schedule: str = ""
    path: str = ""
    unit: str = ""
    left_out: dict[str, str] = field(default_factory=dict)
    streams: list[StreamSummary] = field(default_factory=list)

    @property
    def cur(self) -> float:
        """Cache utilization ratio: reused branches / all."""
        return self._ratio("reused", sum(s.reused + s.computed for s in self.streams))

    @property
    def speedup(self) -> float:
        """FLOPs of the calls without cache / with it, as run."""
        flops = sum(s.flops for s in self.streams)
        return sum(s.plain_flops for s in self.streams) / flops if flops else 1.0

    @property
    def nbytes(self) -> int:
        """Of all caches together, at most."""
        return sum(s.nbytes for s in self.streams)

    def _ratio(self, name: str, total: float) -> float:
        return sum(getattr(s, name) for s in self.streams) / total if total else 0.0

    def as_dict(self) -> dict:
        """Everything as numbers and text."""
        names = ("transformer", "name", "steps", "computed", "reused", "forecast", "flops", "plain_flops", "nbytes")
        return dict(steps=self.steps, schedule=self.schedule, path=self.path, unit=self.unit, cur=self.cur,
                    speedup=self.speedup, nbytes=self.nbytes, left_out=dict(self.left_out),
                    streams=[{name: getattr(s, name) for name in names} | dict(fallbacks=dict(s.fallbacks))
                             for s in self.streams])

    def __str__(self) -> str:
        if not self.streams:
            return "no call yet; a cache's bytes are known from its first forward on"
        lines = [self.schedule or "a schedule that does not say how it was made",
                 f"{self.steps} steps, {self.path} path, by {self.unit}: {self.cur:.0%} reused, {self.speedup:.2f}x "
                 f"fewer FLOPs, {_bytes(self.nbytes)} of cache"]
        for s in self.streams:
            lines.append(f"  {s.transformer}, {s.name}: {s.steps} calls, {s.computed} branches computed, {s.reused} "
                         f"reused, {s.forecast} of these forecast; {_bytes(s.nbytes)}")
            lines += (f"    computed whole {n} times, because {why}" for why, n in s.fallbacks.items())
        lines += (f"  {name} is not used: {why}" for name, why in self.left_out.items())
        return "\n".join(lines)


def _bytes(n: int) -> str:
    return f"{n / 2**20:.1f} MiB" if n >= 2**20 else f"{n / 2**10:.1f} KiB"
