"""A schedule on a transformer that somebody else calls: its calls are counted, and checked by their timesteps."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from harmonica_dit.schedule import Schedule
from harmonica_dit.validate import check_fits, shorten

from .adapters.generic import GenericAdapter

TIMESTEP = ("timestep", "timesteps", "t")  # what forwards call it


@contextmanager
def scheduled(transformer: nn.Module, schedule: Schedule, *, calls: int = 1) -> Iterator[GenericAdapter]:
    """Inside the `with` block the transformer follows a schedule, whoever calls it: a pipeline or a loop of your own.

        with scheduled(pipe.transformer, schedule):
            image = pipe(prompt, num_inference_steps=schedule.steps).images[0]

    Every T·calls calls are one trajectory, and the next begins with empty caches. Not for use from two threads at
    once. accelerate's hooks on the transformer (`enable_model_cpu_offload`) are run.

    The calls are checked by their timesteps, which are read together when a trajectory is over: one timestep a step,
    moving one way, and back with the next trajectory. They are not compared with the schedule's, for models scale them
    differently. Of a transformer without such an argument (`timestep`, `timesteps` or `t`) only the number of calls is
    checked. A scheduler that calls twice at one timestep, such as Heun's, is refused.

    Args:
        transformer: of any class that `GenericAdapter` takes.
        schedule: its branches are submodules' names.
        calls: how often a step calls the transformer, e.g. 2 where a pipeline runs the prompt and the empty prompt
            one after the other.

    Raises:
        TypeError, ValueError: the transformer has no such branches, or an argument is not as above.
        RuntimeError: with the next trajectory or at the end, if the calls were not those of whole trajectories (other
            steps than the schedule's, or another number of calls a step); or if something else has replaced the
            transformer's forward meanwhile.
    """
    if isinstance(calls, bool) or not isinstance(calls, int) or calls < 1:
        raise ValueError(f"calls: got {calls!r}, expected a whole number from 1 on")
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule: got {type(schedule).__name__}, expected a Schedule (a router's: router.schedule())")
    adapter = GenericAdapter(transformer, schedule.branches)
    check_fits("schedule: ", schedule, adapter)
    caches = [adapter.new_cache(schedule.history) for _ in range(calls)]
    timesteps = _Timesteps(transformer, schedule.steps, calls)
    done = 0

    def follow(forward, args, kwargs):
        nonlocal done
        s, call = divmod(done % (schedule.steps * calls), calls)
        cache = caches[call]
        if s == 0:
            cache.reset()
        try:
            if s == call == 0:
                timesteps.check()
            timesteps.add(args, kwargs)
            output = adapter._call(forward, args, kwargs, schedule.rows[s], schedule.forecast_weights[s], cache, 0.0)
        except BaseException:
            done = 0  # what comes next is another trajectory
            timesteps.forget()
            raise
        done += 1
        return output

    try:
        with _forward_replaced(transformer, follow):
            yield adapter
    finally:
        for cache in caches:  # accelerate's hook, set anew meanwhile, still refers to `follow`
            cache.reset()
    if done % (schedule.steps * calls):
        raise RuntimeError(f"the transformer was called {done} times, which is no multiple of {schedule.steps} steps "
                           f"of {calls}: the images were made with wrong rows of the schedule")
    timesteps.check()


class _Timesteps:
    """The timesteps of a trajectory's calls, left where they are until it is over: to read one waits for a GPU."""

    def __init__(self, transformer: nn.Module, steps: int, calls: int):
        self.steps, self.calls = steps, calls
        self.parameters = list(inspect.signature(type(transformer).forward).parameters)[1:]
        self.forget()

    def forget(self) -> None:
        """What comes next is the first trajectory."""
        self.held: list[Tensor | float | None] = []
        self.end: float | None = None  # of the trajectory before

    def add(self, args: tuple, kwargs: dict) -> None:
        """Takes a call's, from the arguments of the transformer's forward."""
        arguments = dict(zip(self.parameters, args)) | kwargs
        t = next((arguments[name] for name in TIMESTEP if name in arguments), None)
        # some models take one a token, 0 where there is no noise; and the caller may go on counting in this tensor
        self.held.append(t.detach().amax() if isinstance(t, Tensor) else t)

    def check(self) -> None:
        """Refuses a trajectory whose calls were not those of its steps, or that went on where the one before ended."""
        held, self.held = self.held, []
        if self.steps == 1 or not held or not all(isinstance(t, (Tensor, int, float)) for t in held):
            return  # a single step computes everything, whoever calls
        times = [float(t) for t in held]
        steps = times[:: self.calls]
        shared = times == [t for t in steps for _ in range(self.calls)]
        moves = _one_way(steps) and steps[-1] != steps[-2]  # earlier ones may be equal in bfloat16
        back = self.end is None or not _one_way([self.end, *steps])
        if not (shared and moves and back):
            after = "" if self.end is None else f", after {self.end:g} at the end of the trajectory before"
            raise RuntimeError(
                f"the transformer was called at the timesteps {shorten(times)}{after}; expected one trajectory of "
                f"{self.steps} steps with a timestep each, {self.calls} calls a step: the images were made with wrong "
                "rows of the schedule. Where a step calls the transformer twice, with and without prompt, pass "
                "calls=2; and run as many steps as the schedule has")
        self.end = steps[-1]


def _one_way(times: list[float]) -> bool:
    """Whether they never rise, or never fall: models take t, or 1 - t."""
    return times in (sorted(times), sorted(times, reverse=True))


@contextmanager
def _forward_replaced(module: nn.Module, call: Callable) -> Iterator[None]:
    """Lets `call(forward, args, kwargs)` stand for the module's forward, inside accelerate's hook where there is one.

    That hook keeps the forward proper as `_old_forward`, and a pipeline that offloads takes the hook off and sets it
    anew at the end of its calls. So the replacement goes from one attribute to the other.
    """
    attributes = vars(module)
    name = "_old_forward" if "_old_forward" in attributes else "forward"
    bare, forward = name not in attributes, getattr(module, name)

    def replacement(*args, **kwargs):
        return call(forward, args, kwargs)

    attributes[name] = replacement
    lost = False
    try:
        yield
    finally:
        if attributes.get("_old_forward") is replacement:
            attributes["_old_forward"] = forward
        elif attributes.get("forward") is not replacement:
            lost = True
        elif bare:
            del attributes["forward"]
        else:
            attributes["forward"] = forward
    if lost:
        raise RuntimeError("transformer: something else (a hook, another caching method) has replaced its forward "
                           "inside the `with` block, so that it cannot be put back, and the schedule may not have been "
                           "followed; set such things up before the block")
