"""A schedule on a transformer that somebody else calls: what is not said by the caller is counted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from harmonica_dit.schedule import Schedule, check_fits

from .generic import GenericAdapter


@contextmanager
def scheduled(transformer: nn.Module, schedule: Schedule, *, calls: int = 1) -> Iterator[GenericAdapter]:
    """Inside the `with` block the transformer follows a schedule, whoever calls it: a pipeline or a loop of your own.

        with scheduled(pipe.transformer, schedule):
            image = pipe(prompt, num_inference_steps=schedule.steps).images[0]

    Every T·calls calls are one trajectory, and the next begins with empty caches. Not for use from two threads at
    once. accelerate's hooks on the transformer (`enable_model_cpu_offload`) are run.

    Args:
        transformer: of any class that `GenericAdapter` takes.
        schedule: its branches are submodules' names.
        calls: how often a step calls the transformer, e.g. 2 where a pipeline runs the prompt and the empty prompt
            one after the other.

    Raises:
        TypeError, ValueError: the transformer has no such branches, or an argument is not as above.
        RuntimeError: at the end, if the calls were not those of whole trajectories: other steps than the schedule's,
            or another number of calls a step; or if something else has replaced its forward meanwhile.
    """
    if isinstance(calls, bool) or not isinstance(calls, int) or calls < 1:
        raise ValueError(f"calls: got {calls!r}, expected a whole number from 1 on")
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule: got {type(schedule).__name__}, expected a Schedule (a router's: router.schedule())")
    adapter = GenericAdapter(transformer, schedule.branches)
    check_fits("schedule: ", schedule, adapter)
    caches = [adapter.new_cache(schedule.history) for _ in range(calls)]
    done = 0

    def follow(forward, args, kwargs):
        nonlocal done
        s, call = divmod(done % (schedule.steps * calls), calls)
        cache = caches[call]
        if s == 0:
            cache.reset()
        try:
            output = adapter._gated(forward, args, kwargs, schedule.rows[s], schedule.forecasts[s], cache, 0.0)
        except BaseException:
            done = 0  # what comes next is another trajectory
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
        raise RuntimeError("transformer: something else (a hook, another caching method) has replaced its forward inside "
                           "the `with` block, so that it cannot be put back, and the schedule may not have been "
                           "followed; set such things up before the block")
