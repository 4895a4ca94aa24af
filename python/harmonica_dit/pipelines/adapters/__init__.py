"""Adapters: they run diffusers' own transformers, with their own weights, branch by branch as a row says."""

import os
from pathlib import Path

from torch import nn

from harmonica_dit.models.plain_modules import has_own_forward, is_own

from .compiled import refuse_compiled
from .find_branches import check_is_module


def adapt(transformer):
    """The adapter of a diffusers transformer: fused for DiT and PixArt, the generic one for every other class, and for
    subclasses of these with a forward of their own.

    An adapter takes the arguments of `transformer.forward` and `row`, `forecast_weights`, `cache` and `threshold` (see
    `harmonica_kernels.cached_forward`), and returns what `transformer.forward` returns. It has `transformer` (the
    module itself, unchanged), `branches` (fused adapters only), `branch_names` (submodules' names in execution order),
    `architecture` (a fingerprint), `name` and `new_cache(history)`.

    transformer: also one in a `peft.PeftModel`. The adapter then runs the transformer inside, with its LoRA; what peft
    would do around a forward (other LoRAs for single images of a batch, `adapter_names`) it does not.

    Raises:
        TypeError: the class is not supported. ValueError: the configuration is not supported, or hooks or compiled
            code would not run; the message names them.
    """
    check_is_module(transformer)
    inside = unwrap(transformer)
    if inside is not transformer and not has_own_forward(transformer):
        raise ValueError(f"transformer: the {type(transformer).__name__} around it has hooks or compiled code, which "
                         "would not run; put them on the transformer inside, transformer.get_base_model()")
    transformer = inside
    refuse_compiled("", transformer, transformer, "branch")
    known = _known_class(transformer)
    if known == "DiTTransformer2DModel":
        from .dit import DiTAdapter

        return DiTAdapter(transformer)
    if known == "PixArtTransformer2DModel":
        from .pixart import PixArtAdapter

        return PixArtAdapter(transformer)
    from .generic import GenericAdapter

    return GenericAdapter(transformer)


def has_fused_adapter(transformer: nn.Module) -> bool:
    """Whether it is of a class that a fused adapter knows, whose forward nobody has changed."""
    return _known_class(transformer) is not None


def _known_class(transformer: nn.Module) -> str | None:
    from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

    for cls in (DiTTransformer2DModel, PixArtTransformer2DModel):
        if isinstance(transformer, cls) and type(transformer).forward is cls.forward and is_own(cls):
            return cls.__name__
    return None


def unwrap(transformer: nn.Module) -> nn.Module:
    """The transformer in a `peft.PeftModel`, in whose layers peft has put what it learned; any other as it is."""
    return transformer.get_base_model() if hasattr(type(transformer), "get_base_model") else transformer


def model_name(source: str) -> str:
    """The name of a pipeline in routers' files. source: its repository or folder; of a folder, only the last part."""
    return Path(source).absolute().name if os.path.isdir(source) else source


__all__ = ["adapt", "has_fused_adapter", "model_name", "unwrap"]
