"""A forward that is run to see what it does, and leaves no trace."""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_trace_lock = threading.Lock()


@contextmanager
def tracing() -> Iterator[None]:
    """Compiled parts run as they are written, so that what they do is seen; a setting of all threads."""
    with _trace_lock, torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


def copies(*arguments: Any) -> list[Any]:
    """For a forward that must leave no trace: a model may write into its arguments, such as a cache of keys and values.
    """
    return [_copy(part) for part in arguments]


def _copy(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.clone()
    if type(argument) in (list, tuple):
        return type(argument)(map(_copy, argument))
    if type(argument) is dict:
        return {name: _copy(part) for name, part in argument.items()}
    if isinstance(argument, nn.Module):
        return argument
    try:
        return copy.deepcopy(argument)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError, copy.Error) as error:  # such as a generator, which a forward would use up
        raise ValueError(f"transformer: a forward is traced before the first one, and its argument of type "
                         f"{type(argument).__name__} cannot be copied for that ({error}); pass tensors") from None
