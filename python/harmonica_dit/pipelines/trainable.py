"""What a pipeline and its call have to be, for it to be trained on by its own loop."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from harmonica_dit.validate import shorten

from .adapters import unwrap
from .plans import check_hooks

# what a training decides itself
OURS = ("prompt", "latents", "num_inference_steps", "timesteps", "sigmas", "output_type", "return_dict", "generator",
        "callback_on_step_end", "callback")
WITHOUT = dict(output_type="latent", return_dict=False)  # what a call does after its loop is not needed


def transformer_of(pipe) -> nn.Module:
    """The pipeline's one transformer.

    Raises:
        TypeError, ValueError: it has none, or several, or cannot be trained on.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"pipe: got {type(pipe).__name__}, expected a diffusers pipeline")
    check_class(type(pipe))
    name = check_transformers(type(pipe), [name for name, part in pipe.components.items() if part is not None])
    if "_harmonica" in vars(pipe):
        raise ValueError("pipe: a cache is enabled on it; call harmonica_dit.disable_cache(pipe) first")
    transformer = unwrap(getattr(pipe, name))
    check_hooks(transformer)
    if hasattr(transformer, "_hf_hook"):
        raise ValueError("pipe: its transformer is offloaded, and a training needs it all the time; call "
                         "pipe.remove_all_hooks(), and move it to the device")
    return transformer


def check_class(cls: type) -> None:
    """Raises ValueError if the steps of such a pipeline cannot be run one by one."""
    parameters = inspect.signature(cls.__call__).parameters
    missing = [name for name in ("latents", "generator", *WITHOUT) if name not in parameters]
    if missing:
        raise ValueError(f"pipe: {cls.__name__}'s call takes no {missing[0]}, so its steps cannot be run one by one")


def check_transformers(cls: type, parts: Sequence[str]) -> str:
    """The name of the transformer among a pipeline's components.

    Raises:
        ValueError: there is none, or several; or no scheduler.
    """
    found = [name for name in parts if "transformer" in name]
    if len(found) != 1 or "scheduler" not in parts:
        raise ValueError(f"pipe: {cls.__name__} has {' and '.join(found) or 'no transformer'}"
                         f"{'' if 'scheduler' in parts else ' and no scheduler'}, expected one transformer and a "
                         "scheduler")
    return found[0]


def check_call(pipe, call: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are the same for all prompts."""
    known = inspect.signature(type(pipe).__call__).parameters
    for name in call:
        if name in OURS or name.startswith("num_images") or name.startswith("num_videos"):
            raise ValueError(f"call: got {name}={shorten(call[name])}, which is the training's; see prompts=, steps=")
        if name not in known:
            raise ValueError(f"call: {type(pipe).__name__} takes no {name}")
    return {name: value for name, value in call.items() if not _is_negative(name, value)}


def with_negatives(prompts, call: Mapping[str, Any]):
    """The prompts, each with the negative prompts that the call has for all."""
    texts = {name: value for name, value in call.items() if _is_negative(name, value)}
    if not texts or not isinstance(prompts, Sequence):
        return prompts
    return [texts | (dict(prompt=one) if isinstance(one, str) else one) for one in prompts]


def _is_negative(name: str, value: Any) -> bool:
    return name.startswith("negative_prompt") and isinstance(value, str)
