"""Makes a transformer run a schedule, whoever calls it. The calls are counted and their timesteps checked."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from harmonica_dit.schedule import Schedule
from harmonica_dit.validate import check_fits, check_whole, shorten

from .adapters.generic import GenericAdapter

TIMESTEP = ("timestep", "timesteps", "t")  # what forwards call it


@contextmanager
def scheduled(transformer: nn.Module, schedule: Schedule, *, calls: int = 1) -> Iterator[GenericAdapter]:
    """Inside the `with` block the transformer follows a schedule, whoever calls it: a pipeline or a loop of your own.

        with scheduled(pipe.transformer, schedule):
            image = pipe(prompt, num_inference_steps=schedule.steps).images[0]

    Every T·calls calls are one trajectory; the next one begins with empty caches. Two threads must not call the
    transformer at once. accelerate's hooks on the transformer (`enable_model_cpu_offload`) run.

    When a trajectory is over, the timesteps of its calls are read and checked: every step has one timestep, the
    timesteps move one way, and they move back between two trajectories. They are not compared with the schedule's,
    because models scale them differently. If the transformer has no such argument (`timestep`, `timesteps` or `t`),
    only the number of calls is checked. A scheduler that calls twice at one timestep, such as Heun's, is refused.

    Args:
        transformer: of any class that `GenericAdapter` takes.
        schedule: its branches are names of the transformer's submodules.
        calls: how often a step calls the transformer, e.g. 2 if a pipeline runs the prompt and the empty prompt one
            after the other.

    Raises:
        TypeError, ValueError: the transformer has no such branches, or an argument is not as above.
        RuntimeError: the calls were not those of whole trajectories (other steps than the schedule's, or another number
            of calls a step); it is raised when the next trajectory begins or the block ends. Or something else has
            replaced the transformer's forward inside the block.
    """
    check_whole("calls", calls, 1)
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule: got {type(schedule).__name__}, expected a Schedule (a router's: router.schedule())")
    if schedule.runs is not None:
        raise ValueError("schedule: decides on runs of branches, which needs a model that runs branch by branch: DiT, "
                         "PixArt α or Σ (harmonica_dit.apply), or a denoiser")
    if schedule.unit == "trunk":
        raise ValueError("schedule: forecasts the trunk, which needs a model that runs branch by branch: DiT, PixArt α "
                         "or Σ (harmonica_dit.apply), or a denoiser")
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
            done = 0  # the next call begins another trajectory
            timesteps.forget()
            raise
        done += 1
        return output

    try:
        with _replace_forward(transformer, follow):
            yield adapter
    finally:
        for cache in caches:  # accelerate's hook may still refer to `follow`, if it was set anew inside the block
            cache.reset()
    if done % (schedule.steps * calls):
        raise RuntimeError(f"the transformer was called {done} times, which is no multiple of {schedule.steps} steps "
                           f"of {calls}: the images were made with wrong rows of the schedule")
    timesteps.check()


class _Timesteps:
    """The timesteps of a trajectory's calls. They stay on their device until it is over: reading one waits for a GPU.
    """

    def __init__(self, transformer: nn.Module, steps: int, calls: int):
        self.steps, self.calls = steps, calls
        self.parameters = list(inspect.signature(type(transformer).forward).parameters)[1:]
        self.forget()

    def forget(self) -> None:
        """Begins anew: the next trajectory is the first."""
        self.held: list[Tensor | float | None] = []
        self.end: float | None = None  # the last timestep of the trajectory before

    def add(self, args: tuple, kwargs: dict) -> None:
        """Adds a call's timestep, from the arguments of the transformer's forward."""
        arguments = dict(zip(self.parameters, args)) | kwargs
        t = next((arguments[name] for name in TIMESTEP if name in arguments), None)
        # amax, because some models take a timestep per token, 0 where there is no noise. It also makes a copy: the
        # caller may write the next timestep into the same tensor
        self.held.append(t.detach().amax() if isinstance(t, Tensor) else t)

    def check(self) -> None:
        """Refuses a trajectory whose calls do not match its steps, or that goes on where the one before ended."""
        held, self.held = self.held, []
        if self.steps == 1 or not held or not all(isinstance(t, (Tensor, int, float)) for t in held):
            return  # with a single step every call computes everything; and without timesteps there is nothing to check
        times = [float(t) for t in held]
        steps = times[:: self.calls]
        shared = times == [t for t in steps for _ in range(self.calls)]
        moves = _move_one_way(steps) and steps[-1] != steps[-2]  # earlier ones may be equal in bfloat16
        back = self.end is None or not _move_one_way([self.end, *steps])
        if not (shared and moves and back):
            after = "" if self.end is None else f", after {self.end:g} at the end of the trajectory before"
            raise RuntimeError(
                f"the transformer was called at the timesteps {shorten(times)}{after}; expected one trajectory of "
                f"{self.steps} steps with a timestep each, {self.calls} calls a step: the images were made with wrong "
                "rows of the schedule. Where a step calls the transformer twice, with and without prompt, pass "
                "calls=2; and run as many steps as the schedule has")
        self.end = steps[-1]


def _move_one_way(times: list[float]) -> bool:
    """Whether the times never rise, or never fall. Models take t or 1 - t."""
    return times in (sorted(times), sorted(times, reverse=True))


@contextmanager
def _replace_forward(module: nn.Module, call: Callable) -> Iterator[None]:
    """Replaces the module's forward by `call(forward, args, kwargs)`, inside accelerate's hook if there is one.

    accelerate's hook keeps the original forward as `_old_forward`. A pipeline that offloads removes the hook at the end
    of its calls and sets it anew. That moves the replacement from one attribute to the other.
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
