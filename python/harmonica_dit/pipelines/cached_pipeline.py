"""A pipeline class whose calls run with a cache, and its scheduler, which tells where a step ends.

A pipeline calls its transformer once or several times a step, for a number of steps that only its loop knows. What
nearly all of diffusers' pipelines do is: set the scheduler's timesteps, open a progress bar, and call the scheduler's
`step` once a step. So these three are listened to.
"""

import functools
import threading
import warnings
from collections.abc import Callable
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

    def advance(self) -> None:
        """A step is over."""


@functools.cache
def cached_class(base: type) -> type:
    """The subclass of a pipeline class whose calls run with the cache in its attribute `_harmonica`."""

    class Cached(base):
        @functools.wraps(base.__call__)
        def __call__(self, *args, **kwargs):
            with self._harmonica._call(self, args, kwargs):
                return super().__call__(*args, **kwargs)

        def progress_bar(self, iterable=None, total=None):
            listener = _listening.get()
            if listener is not None and listener.scheduler is self.scheduler:
                listener.loop(total if iterable is None else len(iterable) if hasattr(iterable, "__len__") else None)
            return super().progress_bar(iterable, total)

        def __reduce_ex__(self, protocol):
            """For copy, deepcopy and pickle: the copy is a plain pipeline, for a cache belongs to one."""
            warnings.warn("pipe: its copy has no cache; call harmonica_dit.enable_cache on the copy", stacklevel=2)
            return base.__new__, (base,), {name: value for name, value in vars(self).items() if name != "_harmonica"}

    return _like(Cached, base)


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

    def tells(name: str, what: Callable[[Listener], None], first: bool):
        method = getattr(base, name)

        @functools.wraps(method)
        def told(self, *args, **kwargs):
            listener = _listening.get()
            mine = listener is not None and listener.scheduler is self
            if mine and first:
                what(listener)
            result = method(self, *args, **kwargs)
            if mine and not first:
                what(listener)
            return result

        return told

    return _like(type("Heard", (base,), dict(
        set_timesteps=tells("set_timesteps", lambda listener: listener.begin(), True),
        step=tells("step", lambda listener: listener.advance(), False))), base)


def _like(cls: type, base: type) -> type:
    """Gives a subclass its base's name: files and messages tell the user's class."""
    cls.__name__, cls.__qualname__, cls.__module__, cls.__doc__ = (
        base.__name__, base.__qualname__, base.__module__, base.__doc__)
    return cls
