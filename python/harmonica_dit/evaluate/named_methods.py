"""Methods that spend less on a trajectory. Tables and plots know them by name and family."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from diffusers import SchedulerMixin

from harmonica_dit.adaptive import AdaptiveSchedule
from harmonica_dit.fashion import find
from harmonica_dit.flops import count_flops
from harmonica_dit.methods import fora, taylorseer
from harmonica_dit.router import Router, read, schedule_of
from harmonica_dit.sample.sampling import own_scheduler
from harmonica_dit.schedule import Schedule


@dataclass(frozen=True)
class Method:
    """One way to sample.

    Args:
        name: of this setting, such as "FORA n=2". family: of the method, such as "FORA"; it is one line in a plot.
        steps: how often the model is called. The method "fewer steps" has fewer than the uncached run.
        schedule: a `Schedule` for these steps, or an `AdaptiveSchedule`; None computes everything.
        scheduler: of this method, a name or an instance; None is the comparison's.
        net: the model that it samples with, such as a quantized or pruned copy of the comparison's; None is that one.
        net_speedup: FLOPs of a forward of the comparison's model / of one of net; see `with_net`.
    """

    name: str
    family: str
    steps: int
    schedule: Schedule | AdaptiveSchedule | None = None
    scheduler: str | SchedulerMixin | None = None
    net: Any = None
    net_speedup: float = 1.0

    def model(self, net):
        """The model that it samples with, where the comparison's is `net`."""
        return net if self.net is None else self.net

    def speedup(self, uncached_steps: int) -> float:
        """FLOPs of the uncached trajectory / FLOPs of this one; of an adaptive schedule as it has run."""
        of_schedule = 1.0 if self.schedule is None else self.schedule.speedup
        return of_schedule * self.net_speedup * uncached_steps / self.steps


def with_net(name: str, family: str, steps: int, original, net, schedule: Schedule | None = None) -> Method:
    """Sampling with a quantized or pruned copy `net` of the comparison's model, `original`; both are denoisers."""
    return Method(name, family, steps, schedule, net=net,
                  net_speedup=count_flops(original).total / count_flops(net).total)


def on_weights(method: Method, kind: str | None, net) -> Method:
    """The same method where it samples with `net`, a copy of the comparison's model with quantized weights of a kind.

    It has as many FLOPs. kind: None leaves the method as it is. A method without a name is the uncached trajectory.
    """
    if kind is None:
        return method
    name, family = (f"{kind} + {of}" if of else f"{kind} weights" for of in (method.name, method.family))
    return replace(method, name=name, family=family, net=net)


def fewer_steps(steps: int, speedup: float) -> Method:
    """Uncached sampling in as many steps as a FLOPs speedup allows, e.g. 11 of 20 for 1.8."""
    fewer = max(1, int(steps / speedup * (1 + 1e-9)))
    return Method(f"{fewer} steps", "fewer steps", fewer)


def fora_methods(net, steps: int, every: int) -> list[Method]:
    """FORA at every n-th step: once repeating, once with first-order forecasts as in TaylorSeer."""
    return [Method(f"FORA n={every}", "FORA", steps, fora(net, steps, every)),
            Method(f"FORA n={every} + forecast", "FORA + forecast", steps, taylorseer(net, steps, every))]


def read_schedule(path: str | os.PathLike, net=None, threshold: float | None = None) -> Schedule:
    """The schedule in a router's or a schedule's file, see `read`; `threshold` replaces a router's own."""
    return schedule_of(read(path, net), threshold)


def from_file(path: str | os.PathLike, net) -> Method:
    """The method in a router's or a schedule's file, see `read`."""
    return name_after(path, read(path, net))


def name_after(path: str | os.PathLike, found: Router | Schedule) -> Method:
    """Makes a method of what `read` found.

    Its name is the file's. `train` calls every router router.safetensors, so the name of that is its folder's.
    """
    path = find(path)
    name = path.absolute().parent.name if path.stem in ("router", "forecast") else path.stem
    family, schedule = name, schedule_of(found)
    if isinstance(found, Router):
        family = "router, SDT alone" if "importance=none" in (found.recipe or "") else "router"
    if schedule.unit == "trunk":
        family = "learned forecast" + (", to uncached" if "the uncached images" in schedule.origin else "")
    elif schedule.history > 1:
        family += " + forecast"
    return Method(name, family, schedule.steps, schedule, own_scheduler(schedule))


def check_names(methods: Iterable[Method]) -> None:
    """Refuses two methods of the same name: nobody could tell their rows apart."""
    counts = Counter(method.name for method in methods)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"methods: more than one is called {', '.join(map(repr, twice))}; rename a file or leave one "
                         "out")
