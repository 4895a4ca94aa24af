"""`enable_cache(pipe, 2.0)`, then `pipe(...)` as before; `summary(pipe)`, `disable_cache(pipe)`.

Each call of a pipeline is a trajectory with caches of its own, told from others by the call itself. Outside such
calls, in other threads, and for other pipelines that share it, a transformer is what it was. Several threads may call
one pipeline at once if its scheduler allows that; diffusers' multistep schedulers do not, because they keep the state
of one trajectory.
"""

import inspect
import warnings
import weakref
from collections.abc import Iterable
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from harmonica_dit.validate import check_timesteps, shorten

from .adapters import unwrap
from .adapters.replace_forwards import install, replace_forwards
from .cached_pipeline import cached_class, listen
from .config import HarmoniCaConfig
from .plans import Plans
from .summary import Summary
from .trajectories import LoopCalls, PipelineCalls


def enable_cache(target, config, *, timesteps: Iterable[float] | None = None) -> "Enabled":
    """Runs the transformer of a diffusers pipeline, of any class, with a cache, from the next call on.

        harmonica_dit.enable_cache(pipe, 2.0)  # needs no training: half of the FLOPs, the trunk is forecast between
        harmonica_dit.enable_cache(pipe, "router.safetensors")  # or what was trained
        image = pipe("a red cat").images[0]
        print(harmonica_dit.summary(pipe))
        harmonica_dit.disable_cache(pipe)

    Enabling again replaces what was enabled before.

    Args:
        target: a pipeline; or a transformer that a loop of your own calls, then with timesteps=.
        config: a speedup in FLOPs; a schedule, a router, a file of one or a bundled one's name; or a `HarmoniCaConfig`.
        timesteps: for a transformer: the timesteps as it will be given them, one a step, all different.

    Returns:
        A handle: `disable()`, `summary()`, and for a loop `reset()`, after which the next call begins a trajectory.

    Raises (nothing is changed then):
        TypeError: the pipeline has no transformer whose blocks can be found, or `config` is none of the above.
        ValueError: the schedule is for another architecture or scheduler, or the transformer is compiled or hooked so
            that it cannot be run; the message says what to do.
        FileNotFoundError: there is no such file.
    """
    config = HarmoniCaConfig.of(config)
    if isinstance(target, nn.Module):
        if timesteps is None:
            raise ValueError("timesteps: a transformer needs them, as it will be given them at each step; a pipeline "
                             "does not")
        listed = tuple(timesteps.tolist() if isinstance(timesteps, Tensor) else map(float, timesteps))
        check_timesteps(listed, len(listed))
        if len(set(listed)) < len(listed) or not listed:
            raise ValueError(f"timesteps: got {shorten(listed)}, expected one or more, all different: one for each "
                             "step, however often a step calls the transformer")
        enabled: Enabled = EnabledLoop(target, config, listed)
    else:
        if timesteps is not None:
            raise ValueError("timesteps: is for a transformer without its pipeline; a pipeline's call knows its own")
        enabled = EnabledPipeline(target, config)
    disable_cache(target)
    enabled._enter()
    return enabled


def disable_cache(target) -> None:
    """Undoes `enable_cache` on a pipeline or transformer; does nothing where none is enabled."""
    enabled = _of(target)
    if enabled is not None:
        enabled.disable()


def summary(target) -> Summary:
    """What the cache did in the last call of a pipeline (the last of its trajectories), or in a loop's last trajectory.

    Raises:
        ValueError: no cache is enabled on it.
    """
    enabled = _of(target)
    if enabled is None:
        raise ValueError(f"{'transformer' if isinstance(target, nn.Module) else 'pipe'}: no cache is enabled on it")
    return enabled.summary()


def _of(target) -> "Enabled | None":
    """The cache that is enabled on a target. One that a shallow copy carries along is the original's."""
    home = _home(target)
    enabled = vars(home).get("_harmonica")
    return enabled if enabled is not None and enabled._target() is home else None


def _home(target):
    """The object that a cache is enabled on: of peft's wrapper the model inside."""
    return unwrap(target) if isinstance(target, nn.Module) else target


class Enabled:
    """An enabled cache."""

    _plans: Plans

    def __init__(self, target):
        self._target = weakref.ref(_home(target))

    def disable(self) -> None:
        """The target is what it was; nothing happens if this cache is not the one that is enabled on it now."""
        target = self._target()
        if target is not None and vars(target).get("_harmonica") is self:
            del vars(target)["_harmonica"]
            self._leave(target)
            self._plans.forget()

    def __deepcopy__(self, memo):
        """A copy of the target has no cache enabled on it: this one's target is the original."""
        return self

    def __reduce__(self):
        raise TypeError("transformer: cannot be pickled while a cache is enabled on it; call "
                        "harmonica_dit.disable_cache first")


class EnabledPipeline(Enabled):
    """A cache on a pipeline."""

    def __init__(self, pipe, config: HarmoniCaConfig):
        names = [name for name, part in getattr(pipe, "components", {}).items()
                 if "transformer" in name and isinstance(part, nn.Module)]
        if not names or not _steps(getattr(pipe, "scheduler", None)):
            raise TypeError(f"target: got {type(pipe).__name__}, expected a diffusers pipeline with a transformer and "
                            "a scheduler; or a transformer, with timesteps=")
        super().__init__(pipe)
        self.config, self._names, self._last = config, names, [Summary()]
        self._plans = Plans(config, pipe.config.get("_name_or_path") or "")
        for name in names:
            self._plans.check(getattr(pipe, name), pipe.scheduler)

    def summary(self) -> Summary:
        """See `harmonica_dit.summary`."""
        return self._last[-1]

    def _enter(self) -> None:
        pipe = self._target()
        vars(pipe)["_harmonica"] = self
        pipe.__class__ = cached_class(type(pipe))

    def _leave(self, pipe) -> None:
        pipe.__class__ = type(pipe).__base__

    @contextmanager
    def _call(self, pipe, args: tuple, kwargs: dict):
        """Lets one call of the pipeline run with the cache."""
        if pipe is not self._target():
            raise ValueError("pipe: is a copy of a pipeline on which a cache was enabled; call "
                             "harmonica_dit.enable_cache on the copy")
        signature = inspect.signature(type(pipe).__base__.__call__)
        try:
            arguments = signature.bind_partial(pipe, *args, **kwargs).arguments
        except TypeError:  # the call itself will say what is wrong
            arguments = kwargs
        if arguments.get("skip_guidance_layers") is not None:
            raise ValueError("skip_guidance_layers: such a call runs other blocks than the one it is compared with; "
                             "leave it out, or disable_cache(pipe)")
        default = signature.parameters["guidance_scale"].default if "guidance_scale" in signature.parameters else None
        calls = PipelineCalls(self._plans, pipe, arguments.get("guidance_scale", default))
        components = {name: getattr(pipe, name) for name in self._names if getattr(pipe, name, None) is not None}
        for component in components.values():
            self._plans.check(component, pipe.scheduler)
        transformers = {unwrap(component): partial(calls.call, name) for name, component in components.items()}
        self._plans.forget(but=transformers)
        try:
            with listen(calls), replace_forwards(transformers, inside_hook=True):
                yield
        finally:
            self._last = calls.summaries or [Summary()]
        if not calls.summaries:
            warnings.warn("pipe: this call returned before it called the transformer, or called it in another thread; "
                          "so nothing was reused", stacklevel=4)
        elif self.summary().cur and calls.goes_back():
            warnings.warn("pipe: its timesteps went back in this call, and where they did what was reused belongs to "
                          "others; have its loop set the scheduler's timesteps where it begins anew, or call "
                          "harmonica_dit.disable_cache(pipe)", stacklevel=4)
        elif calls.plans_to_reuse and not any(s.reused for summary in self._last for s in summary.streams):
            warnings.warn(f"pipe: the cache reused nothing in this call: {self.summary()}", stacklevel=4)


def _steps(scheduler) -> bool:
    """Whether it has what a cache listens to."""
    return all(callable(getattr(scheduler, name, None)) for name in ("set_timesteps", "step"))


class EnabledLoop(Enabled):
    """A cache on a transformer that some loop calls."""

    def __init__(self, transformer: nn.Module, config: HarmoniCaConfig, timesteps: tuple[float, ...]):
        super().__init__(transformer)
        self.config = config
        self._plans = Plans(config)
        self._plans.check(transformer, None)
        self._calls = LoopCalls(self._plans, timesteps)

    def summary(self) -> Summary:
        """See `harmonica_dit.summary`."""
        return self._calls.summary

    def reset(self) -> None:
        """The next call of the transformer begins a trajectory."""
        self._calls.reset()

    def _enter(self) -> None:
        transformer = self._target()
        vars(transformer)["_harmonica"] = self
        self._uninstall = install(transformer, self._calls.call)

    def _leave(self, transformer: nn.Module) -> None:
        self._uninstall()
        self.reset()
