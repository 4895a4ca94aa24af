"""A transformer's call: its arguments by name, and what tells it from the other calls of a step.

With guidance, for example, a step calls the transformer with the prompt and without. At the next step each of these
calls has to find the cache of the same one, and no other's.
"""

import re
from collections.abc import Callable
from functools import cache
from inspect import Parameter, signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harmonica_kernels.checks import autocast_dtype

from .adapters.generic_cache import leaves

TIMESTEP = ("timestep", "timesteps", "t")  # what transformers call it
# arguments that tell a step's calls apart, and stay the same from step to step
CONDITIONING = re.compile("encoder_hidden|caption|cap_feats|prompt|text|txt_ids|label|pooled|skip_layers|perturb|"
                          "isolat|^(y|c|cond)$")


class Call:
    """One call.

    Args:
        transformer: the module. forward, args, kwargs: what runs it.
        context: what the pipeline calls it, see diffusers' `cache_context`.

    latents: what is to be denoised: the first argument of float tensors that is no conditioning. Some models take a
        list, an image each.
    timestep: None where none is passed.
    signature: names, shapes, dtypes and devices of all tensors, and the mode; a cache serves calls of one.
    conditioning: the arguments that tell what it is conditioned on, and the context. others: the rest; unlike latents
        and timestep they may stay the same from step to step.

    Raises:
        ValueError: no argument can be the latents.
    """

    def __init__(self, transformer: nn.Module, forward: Callable, args: tuple, kwargs: dict,
                 context: str | None = None):
        self.transformer, self.forward, self.args, self.kwargs = transformer, forward, args, kwargs
        self.context = context
        names = _parameters(type(transformer))
        arguments = {names[i] if i < len(names) else f"argument {i}": value for i, value in enumerate(args)} | kwargs
        self.timestep = next((arguments[name] for name in TIMESTEP if arguments.get(name) is not None), None)
        self.conditioning = {name: value for name, value in arguments.items() if CONDITIONING.search(name)}
        self.others = {name: value for name, value in arguments.items()
                       if name not in self.conditioning and name not in TIMESTEP}
        order = [name for name in (*names, *self.others) if name in self.others]
        name = next((name for name in order if _holds_floats(self.others[name])), None)
        if name is None:
            raise ValueError("transformer: was called without a tensor to denoise; its arguments are "
                             f"{', '.join(arguments) or 'none'}")
        self.latents = _tensors(self.others.pop(name))
        self.conditioning["cache_context"] = context
        self.names = tuple(name for name, value in sorted(arguments.items()) for _ in _tensors(value))
        tensors = [t for _, value in sorted(arguments.items()) for t in _tensors(value)]
        self.signature = (self.names, tuple((tuple(t.shape), t.dtype, t.device) for t in tensors),
                          torch.is_inference_mode_enabled(), torch.is_grad_enabled(),
                          autocast_dtype(self.latents[0].device.type))


class Seen(NamedTuple):
    """A tensor in a call, as it was then: a copy; or itself, with torch's count of what was written into it."""

    tensor: Tensor
    version: int | None
    is_copy: bool = False

    @property
    def is_intact(self) -> bool:
        return self.version is None or self.tensor._version == self.version


def see(value: Any, copies: bool) -> Any:
    """An argument, for `is_alike` to compare later ones with. Containers are copied, because callers change them.

    copies: whether tensors of inference mode are copied, for torch does not count what is written into these.
    """
    if isinstance(value, Tensor) and value.is_inference():
        return Seen(value.clone() if copies else value, None, copies)
    if isinstance(value, Tensor):
        return Seen(value, value._version)
    if isinstance(value, dict):
        return {name: see(part, copies) for name, part in value.items()}
    return [see(part, copies) for part in value] if isinstance(value, (list, tuple)) else value


def is_alike(seen: Any, value: Any, tensors: Callable[[Seen, Tensor], bool]) -> bool:
    """Whether an argument is what was seen. tensors: `same_memory` or `same_values`."""
    if isinstance(seen, Seen):
        then = seen.tensor
        return isinstance(value, Tensor) and seen.is_intact and (then.shape, then.dtype, then.device) == (
            value.shape, value.dtype, value.device) and tensors(seen, value)
    if isinstance(seen, dict):
        return isinstance(value, dict) and seen.keys() == value.keys() and all(
            is_alike(part, value[name], tensors) for name, part in seen.items())
    if isinstance(seen, list):
        return isinstance(value, (list, tuple)) and len(seen) == len(value) and all(
            is_alike(part, now, tensors) for part, now in zip(seen, value))
    return seen is value or (isinstance(seen, (bool, int, float, str)) and type(seen) is type(value) and seen == value)


def is_word(value: Any) -> bool:
    """Whether an argument tells what is to be done: such does not change from step to step, as numbers and tensors may.
    """
    return value is None or isinstance(value, (bool, str))


def same_memory(seen: Seen, value: Tensor) -> bool:
    """Without a look at the values, for which a GPU would have to be waited for."""
    then = seen.tensor
    return not seen.is_copy and then.stride() == value.stride() and then.data_ptr() == value.data_ptr()


def same_values(seen: Seen, value: Tensor) -> bool:
    return same_memory(seen, value) or torch.equal(seen.tensor, value)


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in an argument."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def _holds_floats(value: Any) -> bool:
    tensors = _tensors(value)
    return bool(tensors) and all(t.is_floating_point() for t in tensors)


@cache
def _parameters(cls: type) -> tuple[str, ...]:
    """The names of a transformer's arguments. A subclass may pass whatever it is given on to the class above."""
    for above in cls.__mro__:
        parameters = signature(above.forward).parameters if "forward" in vars(above) else {}
        names = [name for name, parameter in parameters.items()
                 if parameter.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)]
        if len(names) > 1:
            return tuple(names[1:])
    return ()
