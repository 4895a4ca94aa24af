"""Replaces modules' forwards for the calls of one thread, while other threads call the same modules as they are."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

_current: ContextVar[Mapping[nn.Module, Callable] | None] = ContextVar("harmonica_replacements", default=None)
call_name: ContextVar[str | None] = ContextVar("harmonica_call_name", default=None)  # by diffusers' `cache_context`
_lock = threading.Lock()
ENTRIES = ("forward", "_old_forward", "_compiled_call_impl")  # attributes where calls enter a module, see _Dispatch


@contextmanager
def replace_forwards(replacements: Mapping[nn.Module, Callable], inside_hook: bool = False) -> Iterator[None]:
    """Until the block ends, a module's call in this context is `replacements[module](module, forward, args, kwargs)`.

    forward: the module's own, compiled if the module is. Contexts are `contextvars`'; every thread has its own.
    inside_hook: whether accelerate's hook on the module, which moves weights, runs around the replacement; else the
        replacement decides whether it runs.
    """
    with _lock:
        entered = [_enter(module, inside_hook) for module in replacements]
    token = _current.set(replacements)
    try:
        yield
    finally:
        _current.reset(token)
        with _lock:
            for dispatch in entered:
                _leave(dispatch)


def install(module: nn.Module, replacement: Callable) -> Callable[[], None]:
    """As `replace_forwards` with inside_hook, for every call from now on; until what it returns is called."""
    with _lock:
        dispatch = _enter(module, inside_hook=True)
        dispatch.default = replacement

    def uninstall() -> None:
        with _lock:
            if dispatch.default is replacement:
                dispatch.default = None
                _leave(dispatch)

    return uninstall


def runs_its_own(module: nn.Module) -> bool:
    """Whether a call of the module runs its class's forward, if need be inside accelerate's hook."""
    dispatch, attributes = dispatch_of(module), vars(module)
    forward = dispatch.forward if dispatch else attributes.get("_old_forward", attributes.get("forward"))
    return forward is None or getattr(forward, "__func__", None) is type(module).forward


def entries_of(module: nn.Module) -> list[Callable]:
    """What runs where calls enter a module, without what has been put there by this file."""
    found = [entry for entry in map(vars(module).get, ENTRIES) if entry is not None]
    return [entry.forward if isinstance(entry, _Dispatch) else entry for entry in found]


def dispatch_of(module: nn.Module) -> "_Dispatch | None":
    """What stands in a module's entry now, if anything does."""
    entries = (vars(module).get(name) for name in ENTRIES)
    return next((entry for entry in entries if isinstance(entry, _Dispatch) and entry.users), None)


def _enter(module: nn.Module, inside_hook: bool) -> "_Dispatch":
    dispatch = dispatch_of(module) or _Dispatch(module, inside_hook)
    dispatch.users += 1
    return dispatch


def _leave(dispatch: "_Dispatch") -> None:
    dispatch.users -= 1
    if not dispatch.users:
        dispatch.uninstall()


class _Dispatch:
    """Stands where calls enter a module, and looks for a replacement in the current context.

    A module's calls enter at `forward`; at `_compiled_call_impl` where it has been compiled in place; and accelerate's
    hook keeps what it wraps as `_old_forward`. A pipeline that offloads removes such a hook at the end of its calls and
    sets it anew, which moves the dispatch from one attribute to another.
    """

    def __init__(self, module: nn.Module, inside_hook: bool):
        attributes = vars(module)
        name = "_compiled_call_impl" if module._compiled_call_impl is not None else "forward"
        if inside_hook and "_old_forward" in attributes:
            name = "_old_forward"
        self.users, self.module, self.bare = 0, module, name not in attributes
        self.default: Callable | None = None  # the replacement outside all contexts
        self.forward = self.__wrapped__ = getattr(module, name)  # the second for inspect.signature
        attributes[name] = self
        if inside_hook and hasattr(module, "cache_context"):
            attributes["cache_context"] = _NamedCalls(module)

    def __call__(self, *args, **kwargs):
        replacement = (_current.get() or {}).get(self.module, self.default)
        if replacement is None:
            return self.forward(*args, **kwargs)
        return replacement(self.module, self.forward, args, kwargs)

    def __deepcopy__(self, memo):
        """A copy of the module has its own forward."""
        copied = memo[id(self.module)]
        return type(copied).forward.__get__(copied)

    def uninstall(self) -> None:
        attributes = vars(self.module)
        attributes.pop("cache_context", None)
        for name in ENTRIES:
            if attributes.get(name) is not self:
                continue
            if self.bare and name == "forward":
                del attributes[name]
            else:
                attributes[name] = self.forward


class _NamedCalls:
    """Stands in place of a module's `cache_context`, and notes the name that it is given."""

    def __init__(self, module: nn.Module):
        self.module = module

    @contextmanager
    def __call__(self, name: str, **about) -> Iterator[None]:
        token = call_name.set(name)
        try:
            with type(self.module).cache_context(self.module, name, **about):
                yield
        finally:
            call_name.reset(token)

    def __deepcopy__(self, memo):
        """A copy of the module has its own."""
        copied = memo[id(self.module)]
        return type(copied).cache_context.__get__(copied)
