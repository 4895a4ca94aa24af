"""What a transformer's calls are run by: its adapter, a forward's costs, and the schedule for a trajectory's steps."""

import warnings
from collections.abc import Collection, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from harmonica_dit.methods.taylorseer import taylorseer
from harmonica_dit.methods.trunk import trunk_forecast
from harmonica_dit.methods.uncached import uncached
from harmonica_dit.sample.schedulers import config_of, scheduler_name
from harmonica_dit.schedule import Schedule
from harmonica_dit.validate import check_costs, check_fits, check_scheduler, shorten

from .adapters import adapt, has_fused_adapter, model_name, unwrap
from .adapters.compiled import refuse_compiled
from .adapters.fused import FusedAdapter
from .adapters.generic import NOT_FINITE, GenericAdapter
from .adapters.replace_forwards import runs_its_own
from .calls import Call
from .config import HarmoniCaConfig
from .streams import Planned, Streams
from .summary import Summary

KEPT = 64  # sizes of latents, and of these with lists of timesteps, of which costs and schedules are remembered
CACHES = ("cache", "fbc", "pyramid_attention_broadcast")  # in the names of diffusers' hooks that reuse something
GROUP_OFFLOAD = "group_offloading"  # in the names of diffusers' hooks that do it


class Plans:
    """Of one enabled cache, for its transformers.

    Args:
        config: what is wanted. source: of the pipeline's weights; "" if unknown.
    """

    def __init__(self, config: HarmoniCaConfig, source: str = ""):
        self.config, self.source = config, source
        self._adapters: dict[tuple, GenericAdapter | FusedAdapter] = {}  # traced, by transformer and latents' shape
        self._planned: dict[tuple, Planned] = {}  # by these and the timesteps
        self._warned: set[str] = set()
        self._checked: WeakKeyDictionary[nn.Module, tuple[str, ...]] = WeakKeyDictionary()  # and their branches' names

    def forget(self, but: Collection[nn.Module] = ()) -> None:
        """Forgets what is known of all transformers but these: it would keep them in memory."""
        others = [adapter.transformer for adapter in self._adapters.values() if adapter.transformer not in but]
        if others:
            gone = set(map(id, others))
            self._adapters = {key: value for key, value in self._adapters.items() if key[0] not in gone}
            self._planned = {key: value for key, value in self._planned.items() if key[0] not in gone}

    def check(self, component: nn.Module, scheduler) -> None:
        """Refuses, when a cache is enabled and at each call, what can be refused before it.

        component: the transformer, or peft's wrapper around it. scheduler: the pipeline's; None is a loop's, unseen.

        Raises:
            TypeError, ValueError: the transformer cannot be run so, or the schedule is not for it.
        """
        unit = "trunk" if self.config.loaded is None else self.config.loaded.unit
        refuse_compiled("", component, component, unit)
        transformer = unwrap(component)
        check_hooks(transformer)
        adapter, _ = self._adapter(transformer)
        schedule, where = self.config.loaded, self.config.source
        if schedule is None:
            if self.config.costs is not None:
                check_costs("costs", self.config.costs, len(adapter.branch_names))
            return
        if schedule.unit == "trunk":
            self._check_scheduler(schedule, scheduler)
        if self._checked.get(transformer) == adapter.branch_names:
            return
        self._checked[transformer] = adapter.branch_names
        if self.config.on_mismatch == "resample" and schedule.timesteps is None:
            raise ValueError("on_mismatch: this schedule does not say what timesteps it was made for, so it cannot be "
                             "resampled")
        check_fits(where, schedule, adapter)
        if schedule.unit == "trunk":
            schedule.forecaster.check_width(where, adapter.architecture["D"])
        if isinstance(adapter, GenericAdapter):
            if schedule.runs is not None:
                raise ValueError(f"{where}decides on runs of branches, which needs a model with a fused adapter")
            if schedule.unit == "trunk" and (schedule.forecaster.tokens is not None
                                             or schedule.forecaster.condition is not None):
                raise ValueError(f"{where}its forecaster was learned for a model that runs branch by branch; "
                                 f"{type(transformer).__name__} has no fused adapter")
            adapter.check(schedule.unit)

    def _check_scheduler(self, schedule: Schedule, scheduler) -> None:
        """Refuses another scheduler than a forecaster's; warns where it is not seen."""
        where = self.config.source
        if scheduler is not None:
            check_scheduler(where, schedule, scheduler_name(scheduler), config_of(scheduler))
        elif schedule.scheduler is not None:
            self._say(f"{where}its forecaster is for the scheduler {schedule.scheduler!r}; whether this loop steps by "
                      "that one is not seen here")

    def streams(self, name: str, call: Call, *, steps: int, timesteps: tuple[float, ...], hoist: bool, first: int,
                summary: Summary) -> Streams:
        """Begins a trajectory of a transformer, with the first of its calls.

        Args:
            name: of the pipeline's component.
            steps: T. timesteps: the scheduler's. hoist: whether the transformer is given these as they are.
            first: the step of this call; not 0 for a second transformer, which goes on where another ended.

        Raises:
            ValueError: the schedule is not for such steps, or the speedup cannot be reached in so many.
        """
        transformer = call.transformer
        check_hooks(transformer)
        if self.config.loaded is not None:
            first = 0  # a schedule is for all steps of a trajectory, whoever runs them
        adapter, why = self._adapter(transformer)
        # with more arguments it may do something else
        key = id(transformer), *(tuple(t.shape) for t in call.latents), *call.names
        adapter, flops = self._traced(adapter, key, call)
        timesteps = timesteps[first:]
        key = *key, timesteps
        planned = self._planned.get(key)
        if planned is None:
            with torch.inference_mode(False):  # its tensors are for calls in any mode
                planned = Planned(self._schedule(adapter, max(1, steps - first), timesteps, first))
            _keep(self._planned, key, planned)
            self._say(planned.schedule.nothing_gained())
        schedule = planned.schedule
        summary.steps, summary.schedule, summary.unit = steps, schedule.origin, schedule.unit
        summary.path = "fused" if isinstance(adapter, FusedAdapter) else "generic"
        if why:
            summary.left_out["the fused path"] = why
        if isinstance(adapter, GenericAdapter):
            adapter.check(schedule.unit)
            if schedule.unit == "branch":
                summary.left_out |= adapter.left_out
                if self.config.loaded is None:
                    summary.left_out["the trunk"] = adapter.trunk_left_out
        return Streams(name, adapter, planned, flops, timesteps if hoist else None, first, summary)

    def _traced(self, adapter, key: tuple, call: Call):
        """The adapter, and what a forward costs: the schedule knows it, or a forward is traced."""
        schedule = self.config.loaded
        generic_trunk = isinstance(adapter, GenericAdapter) and schedule is not None and schedule.unit == "trunk"
        if schedule is not None and not generic_trunk:
            return adapter, schedule.flops
        known = self._adapters.get(key)
        if type(known) is not type(adapter) or not known.is_current():
            adapter.trace_call(call.forward, call.args, call.kwargs)
            known = adapter
            if isinstance(adapter, FusedAdapter) or adapter.trunk_left_out != NOT_FINITE:
                _keep(self._adapters, key, adapter)
            self._planned = {of: planned for of, planned in self._planned.items() if of[:-1] != key}
        if generic_trunk and known.trunk_left_out:
            raise ValueError(f"{self.config.source}forecasts the trunk, which {type(adapter.transformer).__name__} "
                             f"cannot reuse: {known.trunk_left_out}")
        return known, known.flops if known.trunk_flops is None else known.trunk_flops

    def _adapter(self, transformer: nn.Module):
        """The adapter, and why it is not the fused one where there is one."""
        why = "" if runs_its_own(transformer) else "the transformer's forward has been replaced"
        if has_fused_adapter(transformer) and not why:
            try:
                adapter = adapt(transformer)
            except ValueError as error:
                why = str(error)
            else:
                return self._named(adapter), why
        schedule = self.config.loaded
        if schedule is None:
            return self._named(GenericAdapter(transformer)), why
        there = {name for name, _ in transformer.named_modules(remove_duplicate=False)}
        missing = next((name for name in schedule.branches if name not in there), None)
        if missing is not None:
            raise ValueError(f"{self.config.source}for branches of {schedule.model or 'another model'!r} such as "
                             f"{missing!r}, which {type(transformer).__name__} does not have")
        return self._named(GenericAdapter(transformer, schedule.branches)), why

    def _named(self, adapter):
        """The adapter under the name that schedules' files have for its model."""
        adapter.name = model_name(self.source or adapter.name)
        return adapter

    def _schedule(self, adapter, steps: int, timesteps: tuple[float, ...], first: int) -> Schedule:
        if self.config.loaded is not None:
            return self._fitted(self.config.loaded, steps, timesteps)
        if steps == 1:
            return uncached(adapter, 1)
        try:
            make = taylorseer if adapter.trunk_size is None else trunk_forecast  # both forecast to first order
            return make(adapter, steps, speedup=self.config.speedup, costs=self.config.costs)
        except ValueError:
            if not first:
                raise
            # of a second transformer, which has too few steps left; the image is half made
            return uncached(adapter, steps)

    def _fitted(self, schedule: Schedule, steps: int, timesteps: tuple[float, ...]) -> Schedule:
        """The schedule that was given, for a call's timesteps."""
        made, T = schedule.timesteps, schedule.steps
        if steps == T and made in (None, timesteps):
            return schedule
        learned = schedule.unit == "trunk" and schedule.forecaster.rule is None
        if self.config.on_mismatch == "resample" and not learned:
            return schedule.resampled(timesteps)
        if steps != T:
            raise ValueError(
                f"num_inference_steps: this call has {steps} steps, the schedule is for T = {T}"
                + (f" (timesteps {shorten(made)})" if made else "") + f"; use {T} steps, or a schedule made for {steps}"
                + ("" if learned else ', or HarmoniCaConfig(schedule=…, on_mismatch="resample")'))
        if learned:
            raise ValueError(f"timesteps: this call's are {shorten(timesteps)}, the forecaster's weights belong to "
                             f"{shorten(made)}; pass those as timesteps=, or use a forecaster for this scheduler")
        self._say(f"timesteps: this call's are {shorten(timesteps)}, the schedule is for {shorten(made)}")
        return schedule

    def check_call(self, guidance, latents: Sequence[Tensor]) -> None:
        """Warns, once for each, of guidance and resolution that the schedule was not made for."""
        schedule = self.config.loaded
        if schedule is None:
            return
        if guidance is not None and schedule.guidance not in (None, float(guidance), max(float(guidance), 1.0)):
            self._say(f"guidance_scale: this call's is {max(float(guidance), 1.0):g}, the schedule is for "
                      f"{schedule.guidance:g}")  # up to 1, pipelines run without guidance
        size = tuple(latents[0].shape[-2:]) if latents else None
        if schedule.resolution is not None and size not in (None, schedule.resolution):
            self._say(f"resolution: this call's latents are {size}, the schedule is for {schedule.resolution}")

    def _say(self, text: str | None) -> None:
        """Warns, but only once of one thing."""
        if text and text.split(":")[0] not in self._warned:
            self._warned.add(text.split(":")[0])
            warnings.warn(text, stacklevel=2)


def _keep(known: dict, key: tuple, value) -> None:
    """Adds a value, and forgets the oldest of more than KEPT."""
    known[key] = value
    while len(known) > KEPT:
        known.pop(next(iter(known)), None)


def check_hooks(transformer: nn.Module) -> None:
    """Refuses what would be passed by, or would take part in deciding what is computed.

    Raises:
        ValueError: the message names it, and what to use instead.
    """
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError("transformer: another cache is enabled on it, by its own enable_cache; call "
                         "transformer.disable_cache() first")
    for name, module in transformer.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        hooks = () if registry is None else tuple(registry.hooks)
        for hook in hooks:
            if any(cache in hook for cache in CACHES):
                raise ValueError(f"{name or 'transformer'}: another cache is on it ({hook}); remove it, for example by "
                                 "transformer.disable_cache()")
        if any(GROUP_OFFLOAD in hook for hook in hooks):
            raise ValueError(f"{name or 'transformer'}: is offloaded group by group, which loads a group while the one "
                             "before it runs, and it may not run; use pipe.enable_model_cpu_offload()")
