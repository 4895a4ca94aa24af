"""A pipeline class whose calls run with a cache, and its scheduler, which tells where a step ends.

A pipeline calls its transformer once or several times a step, for a number of steps that only its loop knows. What
nearly all of diffusers' pipelines do is: set the scheduler's timesteps, open a progress bar, and call the scheduler's
`step` once a step. So these three are listened to.
"""

import functools
import threading
import warnings
from contextlib import contextmanager
from contextvars import ContextVar

_listening: ContextVar["Listener | None"] = ContextVar("harmonica_listener", default=None)
_lock = threading.Lock()
_users: dict[int, int] = {}  # of schedulers, by id: calls that listen to them now


class Listener:
    """Hears what a pipeline's call does. scheduler: whose steps count; a pipeline may step copies of it too."""

    scheduler: object

    def begin(self) -> None:
        """The timesteps were set: another trajectory begins."""

    def loop(self, total: int | None) -> None:
        """A progress bar was opened, over so many steps if that is known."""

    def advance(self, timestep) -> None:
        """The scheduler made a step from this timestep."""


@functools.cache
def cached_class(base: type) -> type:
    """The subclass of a pipeline class whose calls run with the cache in its attribute `_harmonica`."""

    class Cached(base):
        @functools.wraps(base.__call__)
        def __call__(self, *args, **kwargs):
            with self._harmonica._call(self, args, kwargs):
                return super().__call__(*args, **kwargs)

        @functools.wraps(getattr(base, "progress_bar", None))
        def progress_bar(self, *args, **kwargs):
            listener = _listening.get()
            if listener is not None and listener.scheduler is self.scheduler:
                listener.loop(_length(*args, **kwargs))
            return super().progress_bar(*args, **kwargs)

        def __reduce_ex__(self, protocol):
            """For copy, deepcopy and pickle: the copy is a plain pipeline, for a cache belongs to one."""
            warnings.warn("pipe: its copy has no cache; call harmonica_dit.enable_cache on the copy", stacklevel=2)
            return base.__new__, (base,), {name: value for name, value in vars(self).items() if name != "_harmonica"}

    return like(Cached, base)


def _length(iterable=None, total=None, *_, **__) -> int | None:
    """Of a progress bar with these arguments, if it is known."""
    return total if iterable is None else len(iterable) if hasattr(iterable, "__len__") else None


@contextmanager
def listen(listener: Listener):
    """Lets the listener hear this context's calls until the block ends."""
    scheduler, token = listener.scheduler, _listening.set(listener)
    with _lock:
        _users[id(scheduler)] = _users.get(id(scheduler), 0) + 1
        if _users[id(scheduler)] == 1:
            scheduler.__class__ = _heard_class(type(scheduler))
    try:
        yield
    finally:
        _listening.reset(token)
        with _lock:
            _users[id(scheduler)] -= 1
            if not _users[id(scheduler)]:
                del _users[id(scheduler)]
                scheduler.__class__ = type(scheduler).__base__


@functools.cache
def _heard_class(base: type) -> type:
    """The subclass of a scheduler class that tells what is done with it. A copy of such a scheduler works too."""

    def is_heard(scheduler) -> Listener | None:
        listener = _listening.get()
        return listener if listener is not None and listener.scheduler is scheduler else None

    class Heard(base):
        @functools.wraps(base.set_timesteps)
        def set_timesteps(self, *args, **kwargs):
            listener = is_heard(self)
            if listener is not None:
                listener.begin()
            return super().set_timesteps(*args, **kwargs)

        @functools.wraps(base.step)
        def step(self, *args, **kwargs):
            result = super().step(*args, **kwargs)
            listener = is_heard(self)
            if listener is not None:
                listener.advance(args[1] if len(args) > 1 else kwargs.get("timestep"))
            return result

        def __reduce_ex__(self, protocol):
            """For copy, deepcopy and pickle: the copy is of the user's class."""
            return base.__new__, (base,), vars(self)

    return like(Heard, base)


def like(cls: type, base: type) -> type:
    """Gives a subclass its base's name: files and messages tell the user's class."""
    cls.__name__, cls.__qualname__, cls.__module__, cls.__doc__ = (
        base.__name__, base.__qualname__, base.__module__, base.__doc__)
    return cls
