"""Ways to skip work by name, each at a speedup: what `harmonica compare` can compare without a file."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from harmonica_dit import methods

if TYPE_CHECKING:  # the command line names the methods in its help, which should not wait for all of this
    from harmonica_dit.costs import Costs

    from .named_methods import Method


@dataclass(frozen=True)
class Scheduled:
    """A method whose schedule a function of `harmonica_dit.methods` makes.

    title: its name in tables. function: the function's. settings: what it is given. calibrated: whether it samples, and
    so wants a guidance and a scheduler. kept: whether its schedule can be kept in a file.
    """

    title: str
    function: str
    settings: dict = field(default_factory=dict)
    calibrated: bool = False
    kept: bool = True

    @property
    def whole_steps(self) -> bool:
        """Whether it also takes every n-th step, and an order of its forecasts."""
        return self.function in ("fora", "taylorseer", "trunk_forecast")

    def make(self, net, steps: int, **how):
        """The schedule."""
        return getattr(methods, self.function)(net, steps, **self.settings, **how)

    def __call__(self, net, steps: int, speedup: float, options: dict) -> "Method":
        from .named_methods import Method

        how = options if self.calibrated else dict(costs=options["costs"])
        schedule = self.make(net, steps, speedup=speedup, **how)
        return Method(self.title, self.title, steps, schedule)


def _fewer_steps(net, steps: int, speedup: float, options: dict) -> "Method":
    from .named_methods import fewer_steps

    return fewer_steps(steps, speedup)


def _fewer_steps_evenly(net, steps: int, speedup: float, options: dict) -> "Method":
    from harmonica_dit.sample import make_scheduler

    from .solvers import evenly_spaced

    method, scheduler = _fewer_steps(net, steps, speedup, options), options["scheduler"]
    schedule = evenly_spaced(net, method.steps, steps, scheduler=scheduler)
    make_scheduler(scheduler, method.steps, net, schedule.timesteps)  # refuses one that takes none now
    return replace(method, family=f"{method.family}, evenly", schedule=schedule)


def _solver(name: str, net, steps: int, speedup: float, options: dict) -> "Method":
    from .solvers import best_solver

    return best_solver(net, name, _fewer_steps(net, steps, speedup, options).steps, steps)


# name -> function(net, steps of the uncached trajectory, speedup, dict of guidance, scheduler and costs) -> Method
CATALOGUE: dict[str, Callable[..., "Method"]] = {
    "fora": Scheduled("FORA", "fora"),
    "taylorseer-1": Scheduled("TaylorSeer-1", "taylorseer", dict(order=1)),
    "taylorseer-2": Scheduled("TaylorSeer-2", "taylorseer", dict(order=2)),
    "taylorseer-3": Scheduled("TaylorSeer-3", "taylorseer", dict(order=3)),
    "trunk": Scheduled("trunk forecast", "trunk_forecast"),
    "adams": Scheduled("Adams forecast", "trunk_forecast", dict(adams=True)),
    "step-search": Scheduled("steps searched", "step_search", calibrated=True),
    "smoothcache": Scheduled("SmoothCache", "smoothcache", calibrated=True),
    "delta-dit": Scheduled("Δ-DiT", "delta_dit"),
    "first-block": Scheduled("first block", "first_block", calibrated=True, kept=False),
    "fewer-steps": _fewer_steps,  # at the scheduler's own spacing
    "fewer-steps-evenly": _fewer_steps_evenly,  # of the uncached steps, to the last above t = 0
    "dpm-solver++": partial(_solver, "DPM-Solver++"),
    "unipc": partial(_solver, "UniPC"),
}
RIVALS = ("fora", "taylorseer-1", "fewer-steps", "dpm-solver++", "unipc")  # compared where nothing else is asked for
WEIGHTS = ("int8", "int8-dynamic", "int4", "int4-packed", "fp8-dynamic")  # the kinds of `harmonica_dit.quantize`


def split_weights(name: str) -> tuple[str | None, str]:
    """The kind of quantized weights that a name begins with, None without, and what follows: "int8+fora", "int8"."""
    kind, plus, rest = name.partition("+")
    return (kind, rest) if kind in WEIGHTS and bool(plus) == bool(rest) else (None, name)


def quantizer(net) -> Callable[[str | None], Any]:
    """Gives net's copy with quantized weights of a kind, one for all methods that take it; net itself for None."""
    from harmonica_dit.models import quantize

    return cache(lambda kind: net if kind is None else quantize(net, kind))


def make_methods(net, names: Iterable[str], speedups: Iterable[float], steps: int, *, guidance: float = 1.5,
                 scheduler="ddim", catalogue: Mapping[str, Callable[..., "Method"]] = CATALOGUE,
                 quantized: Callable[[str | None], Any] | None = None,
                 costs: "Costs | None" = None) -> list["Method"]:
    """Each of the methods at each of the speedups, named after both.

    Args:
        names: of the catalogue; or a kind of quantized weights, alone ("int8": one method, at 1×, for it has as many
            FLOPs) or before a method ("int8+fora").
        steps: of the uncached trajectory. speedups: in FLOPs or by `costs`; a method has the nearest that it can reach
            and that is not below.
        guidance, scheduler: of the comparison, for methods that sample to calibrate; they do so now.
        catalogue: the methods that there are, each a function as in CATALOGUE.
        quantized: the `quantizer` of net, if it serves others too.
        costs: measured seconds of net, see `harmonica_dit.measure_costs`, on quantized weights too; None is FLOPs.

    Raises:
        ValueError: there is no such method, it cannot reach such a speedup, or the device does not allow such weights;
            the message names it. ImportError: quantized weights need torchao.
    """
    from .named_methods import Method, on_weights

    options = dict(guidance=guidance, scheduler=scheduler, costs=costs)
    made, quantized = [], quantized or quantizer(net)
    for name in names:
        kind, method_name = split_weights(name)
        if method_name and method_name not in catalogue:
            raise ValueError(f"method: got {name!r}, expected one of {', '.join([*catalogue, *WEIGHTS])}, or weights "
                             "and a method such as int8+fora")
        for speedup in speedups if method_name else [1.0]:
            try:
                own = quantized(kind)
                method = catalogue[method_name](own, steps, speedup, options) if method_name else Method("", "", steps)
            except (ValueError, TypeError) as error:
                raise ValueError(f"method: {name} at {speedup:g}×: {error}") from None
            method = on_weights(method, kind, own)
            unit = "× in time" if costs and method_name else "×"
            made.append(replace(method, name=f"{method.family} {speedup:g}{unit}"))
    return made
