"""Makes a diffusers pipeline run a schedule: `apply(pipe, "router.safetensors")`, then `pipe(...)` as before.

While a schedule is applied, the pipeline's class is a subclass of its own class with the same name. Each call of the
pipeline is one trajectory with its own cache. Until the call ends, `pipe.transformer` is a view of the transformer for
the calling thread. The view has the same parameters, hooks and configuration, and its forward runs the next row of the
schedule. The transformer itself is not changed. So it computes everything outside such a call, in other threads, and
for other pipelines that share it. Several threads may call one pipeline at once if its scheduler allows that;
diffusers' multistep schedulers do not, because they keep the state of one trajectory.
"""

import copy
import functools
import inspect
import os
import threading
import warnings
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from harmonica_dit.fashion import find
from harmonica_dit.files import load_tensors
from harmonica_dit.pipelines.adapters import adapt, model_name
from harmonica_dit.router import Router
from harmonica_dit.sample.schedulers import scheduler_name
from harmonica_dit.schedule import Schedule
from harmonica_dit.validate import check_fits, shorten

SUPPORTED = ("DiTPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline")  # call the transformer once a timestep
MISMATCH = ("error", "resample")


@dataclass(frozen=True)
class HarmoniCaConfig:
    """The arguments of `apply`, for code that keeps settings apart from pipelines."""

    router: str | os.PathLike | Router | Schedule
    threshold: float | None = None
    on_mismatch: str = "error"

    def enable(self, pipe) -> "Applied":
        """Calls `apply` with these settings."""
        return apply(pipe, self.router, threshold=self.threshold, on_mismatch=self.on_mismatch)

    def disable(self, pipe) -> None:
        """Calls `remove`."""
        remove(pipe)


def apply(pipe, router: str | os.PathLike | Router | Schedule, *, threshold: float | None = None,
          on_mismatch: str = "error") -> "Applied":
    """Makes a pipeline run a router's schedule from its next call on.

    Every call starts with an empty cache, also after a call that raised. If a call's guidance scale or resolution
    differs from the router's, or its timesteps differ but not their number, it warns, once for each of the three.

    Args:
        pipe: a DiTPipeline, PixArtAlphaPipeline or PixArtSigmaPipeline.
        router: a router, a schedule, a file of either, or the name of a bundled router.
        threshold: τ of a router; None takes its own.
        on_mismatch: what to do if a call's timesteps differ from the router's. "error" refuses another number of them;
            "resample" gives each step the row of the nearest timestep.

    Returns:
        A handle with the schedule in use; its `remove()` undoes everything.

    Raises (the pipeline is unchanged then):
        TypeError: the pipeline's class is not supported, or `router` is none of the above.
        ValueError: the router is for another architecture, or the forecaster for another scheduler; a schedule is
            applied already; a setting is not as above; the transformer has hooks or compiled code that would not run.
        FileNotFoundError: there is no such file.
    """
    if not any(cls.__name__ in SUPPORTED for cls in type(pipe).__mro__):
        raise TypeError(f"pipe: got {type(pipe).__name__}, expected one of {', '.join(SUPPORTED)}; for any other, "
                        "harmonica_dit.scheduled(pipe.transformer, schedule)")
    if "_harmonica" in vars(pipe):
        raise ValueError(f"pipe: a schedule is applied already ({pipe._harmonica.schedule.origin}); call "
                         "harmonica_dit.remove(pipe) first")
    if on_mismatch not in MISMATCH:
        raise ValueError(f"on_mismatch: got {on_mismatch!r}, expected one of {MISMATCH}")
    schedule = _schedule(router, threshold)
    if on_mismatch == "resample" and schedule.timesteps is None:
        raise ValueError("on_mismatch: this schedule does not say what timesteps it was made for, so it cannot be "
                         "resampled")
    adapter = adapt(pipe.transformer)
    adapter.name = model_name(pipe.config.get("_name_or_path") or adapter.name)
    _check_forward(pipe.transformer)
    where = f"{router}: " if isinstance(router, (str, os.PathLike)) else "router: "
    check_fits(where, schedule, adapter)
    schedule.check_forecaster(where, pipe.transformer.inner_dim, scheduler_name(pipe.scheduler))
    applied = Applied(pipe, schedule, adapter, on_mismatch)
    vars(pipe)["_harmonica"] = applied
    pipe.__class__ = _make_subclass(type(pipe))
    return applied


def remove(pipe) -> None:
    """Undoes `apply`: the pipeline is what it was before.

    Raises:
        ValueError: no schedule is applied to it.
    """
    if "_harmonica" not in vars(pipe):
        raise ValueError("pipe: no schedule is applied to it")
    pipe.__class__ = type(pipe).__base__
    del vars(pipe)["_harmonica"]


class Applied:
    """What `apply` returns: the schedule in use, and `remove()`."""

    def __init__(self, pipe, schedule: Schedule, adapter, on_mismatch: str):
        self.schedule, self.adapter, self.on_mismatch = schedule, adapter, on_mismatch
        self._pipe, self._scheduler = pipe, (type(pipe.scheduler), dict(pipe.scheduler.config))
        self._trajectories: dict[int, _Trajectory] = {}  # by thread
        self._warned: set[str] = set()

    def remove(self) -> None:
        """Undoes `apply`: the pipeline is what it was before."""
        remove(self._pipe)

    @contextmanager
    def _call(self, pipe, arguments: dict):
        """Lets one call of the pipeline be a trajectory. arguments: of the call, bound to their names."""
        thread = threading.get_ident()
        outer = self._trajectories.get(thread)  # there is one if this call comes from a callback of another call
        self._trajectories[thread] = trajectory = _Trajectory(self, pipe, arguments)
        try:
            yield
        finally:
            trajectory.view = None  # they refer to each other, which would keep the cache until gc runs
            self._end()
            if outer is not None:
                self._trajectories[thread] = outer

    def _end(self) -> None:
        self._trajectories.pop(threading.get_ident(), None)

    def _view(self) -> nn.Module | None:
        """The view of the transformer in this thread's call; None outside a call."""
        trajectory = self._trajectories.get(threading.get_ident())
        return None if trajectory is None else trajectory.view

    def _check(self, pipe) -> None:
        """Refuses a pipeline whose scheduler or transformer has changed since the schedule was applied."""
        cls, config = self._scheduler
        if type(pipe.scheduler) is not cls or dict(pipe.scheduler.config) != config:
            now = type(pipe.scheduler).__name__
            raise ValueError(f"pipe.scheduler: was a {cls.__name__} when the schedule was applied, is "
                             f"{'one of another configuration' if type(pipe.scheduler) is cls else f'a {now}'} now; "
                             "call harmonica_dit.remove(pipe) and apply a router for it")
        if vars(pipe)["transformer"] is not self.adapter.transformer:
            raise ValueError("pipe.transformer: is another module than the one that the schedule was applied to; call "
                             "harmonica_dit.remove(pipe) and apply again")
        self.adapter.check()
        _check_forward(self.adapter.transformer)

    def _schedule_for(self, timesteps: tuple[float, ...]) -> Schedule:
        """The schedule for a call's timesteps."""
        made, T = self.schedule.timesteps, self.schedule.steps
        if len(timesteps) == T and made in (None, timesteps):
            return self.schedule
        if self.on_mismatch == "resample" and self.schedule.unit == "branch":
            return self.schedule.resampled(timesteps)
        if len(timesteps) != T:
            raise ValueError(
                f"num_inference_steps: this call has {len(timesteps)} steps, the router is for T = {T}"
                + (f" (timesteps {shorten(made)})" if made else "")
                + f'; use {T} steps, a router trained for {len(timesteps)}, or on_mismatch="resample"')
        if self.schedule.unit == "trunk":
            raise ValueError(f"timesteps: this call's are {shorten(timesteps)}, the forecaster's weights belong to "
                             f"{shorten(made)}; pass those as timesteps=, or use a forecaster for this scheduler")
        self._warn("timesteps", f"this call's are {shorten(timesteps)}, the router is for {shorten(made)}")
        return self.schedule

    def _warn(self, what: str, text: str) -> None:
        """Warns, but only once for each `what`."""
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"{what}: {text}", stacklevel=2)


class _Trajectory:
    """One call of a pipeline: its schedule, its cache, and its view of the transformer."""

    def __init__(self, applied: Applied, pipe, arguments: dict):
        applied._check(pipe)
        self.applied, self.pipe = applied, pipe
        self.timesteps = _timesteps(pipe.scheduler, arguments)
        self.schedule = applied._schedule_for(self.timesteps)
        # up to 1, pipelines run without guidance
        guidance, trained = max(float(arguments["guidance_scale"]), 1.0), self.schedule.guidance
        if trained not in (None, guidance):
            applied._warn("guidance_scale", f"this call's is {guidance:g}, the router was trained with {trained:g}")
        self.cache = self.schedule.new_cache()
        self.step = 0
        self.view = copy.copy(applied.adapter.transformer)
        vars(self.view)["forward"] = self.forward

    def forward(self, *args, **kwargs):
        """The transformer's forward at the next step. It counts the steps: reading the timestep would wait for a GPU.
        """
        transformer = self.applied.adapter.transformer
        hook = vars(transformer).get("_hf_hook")  # accelerate's, from enable_model_cpu_offload
        if hook is not None:
            args, kwargs = hook.pre_forward(transformer, *args, **kwargs)
        self._check_step(*args, **kwargs)
        s, self.step = self.step, self.step + 1
        adapter, schedule = self.applied.adapter, self.schedule
        if s == 0:
            self.hoisted = adapter.hoist(schedule.branch_rows, self.timesteps, *args, **kwargs,
                                         condition=schedule.condition_on(transformer.device))
        output = adapter(*args, **kwargs, **next(self.hoisted), row=schedule.rows[s], cache=self.cache,
                         forecast_weights=schedule.forecast_weights_on(transformer.device)[s])
        return output if hook is None else hook.post_forward(transformer, output)

    def _check_step(self, *args, **kwargs) -> None:
        listed = len(self.pipe.scheduler.timesteps)
        if listed != self.schedule.steps or self.step == listed:
            raise RuntimeError(f"pipe: call {self.step + 1} of the transformer; the scheduler lists {listed} and the "
                               f"schedule {self.schedule.steps} steps; use neither pipe.transformer nor "
                               "pipe.scheduler while the pipeline is running")
        if self.step == 0 and self.schedule.resolution is not None:
            latents = args[0] if args else kwargs["hidden_states"]
            size = tuple(latents.shape[-2:])
            if size != self.schedule.resolution:
                self.applied._warn("resolution", f"this call's latents are {size}, the router was trained with "
                                                 f"{self.schedule.resolution}")


@functools.cache
def _make_subclass(base: type) -> type:
    """The subclass of a pipeline class whose calls run a schedule."""
    signature = inspect.signature(base.__call__)

    class Cached(base):
        @functools.wraps(base.__call__)
        def __call__(self, *args, **kwargs):
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            with self._harmonica._call(self, bound.arguments):
                return super().__call__(*args, **kwargs)

        @property
        def transformer(self):
            return self._harmonica._view() or vars(self)["transformer"]

        @transformer.setter
        def transformer(self, module):
            vars(self)["transformer"] = module

        def maybe_free_model_hooks(self):
            self._harmonica._end()  # the loop is over; offloading hooks belong on the transformer, not on its view
            super().maybe_free_model_hooks()

    Cached.__name__, Cached.__qualname__ = base.__name__, base.__qualname__
    Cached.__module__, Cached.__doc__ = base.__module__, base.__doc__
    return Cached


def _schedule(router, threshold: float | None) -> Schedule:
    """The schedule in `apply`'s argument `router`."""
    if isinstance(router, (str, os.PathLike)):
        path = find(router)
        tensors, metadata = load_tensors(path)
        cls = Schedule if metadata.get("kind") == "schedule" else Router
        router = cls.from_tensors(tensors, metadata, path)
    if isinstance(router, Router):
        return router.schedule(threshold)
    if not isinstance(router, Schedule):
        raise TypeError(f"router: got {type(router).__name__}, expected a Router, a Schedule or a file of one")
    if threshold is not None:
        raise ValueError("threshold: a schedule has been decided already; pass the router, or leave this out")
    return router


def _timesteps(scheduler, arguments: dict) -> tuple[float, ...]:
    """The timesteps that a call will run, from a copy of its scheduler on the CPU."""
    scheduler = copy.deepcopy(scheduler)
    given = {name: arguments[name] for name in ("timesteps", "sigmas") if arguments.get(name) is not None}
    scheduler.set_timesteps(**(given or {"num_inference_steps": arguments["num_inference_steps"]}))
    return tuple(scheduler.timesteps.tolist())


def _check_forward(transformer: nn.Module) -> None:
    """Refuses a transformer whose forward something has replaced. accelerate's hook and module hooks do run."""
    if "forward" in vars(transformer) and "_hf_hook" not in vars(transformer):
        raise ValueError("pipe.transformer: its forward has been replaced (diffusers' hooks, another caching method), "
                         "and the replacement would not run; remove it first")
