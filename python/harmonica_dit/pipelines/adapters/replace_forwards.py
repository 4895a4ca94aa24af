"""Replaces modules' forwards for the calls of one thread, while other threads call the same modules as they are."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

_current: ContextVar[Mapping[nn.Module, Callable] | None] = ContextVar("harmonica_replacements", default=None)
_lock = threading.Lock()
_users: dict[nn.Module, int] = {}  # how many blocks replace a module's forward now
_originals: dict[nn.Module, Callable | None] = {}


@contextmanager
def replace_forwards(replacements: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Until the block ends, a call of `module` in this context returns `replacements[module](module, forward)`.

    forward: calls the module's own forward with the call's arguments. Contexts are `contextvars`'; every thread has its
    own.
    """
    with _lock:
        for module in replacements:
            _users[module] = _users.get(module, 0) + 1
            if _users[module] == 1:
                _originals[module] = _replace(module)
    token = _current.set(replacements)
    try:
        yield
    finally:
        _current.reset(token)
        with _lock:
            for module in replacements:
                _users[module] -= 1
                if not _users[module]:
                    del _users[module]
                    _restore(module, _originals.pop(module))


def _replace(module: nn.Module) -> Callable | None:
    """Makes the module's forward look for a replacement in the current context. Returns `_restore`'s argument."""
    forward, own = module.forward, module.__dict__.get("forward")  # accelerate's hooks have set one

    def dispatch(*args, **kwargs):
        replacements = _current.get()
        if replacements is None or module not in replacements:
            return forward(*args, **kwargs)
        return replacements[module](module, lambda: forward(*args, **kwargs))

    module.__dict__["forward"] = dispatch
    return own


def _restore(module: nn.Module, own: Callable | None) -> None:
    if own is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = own
