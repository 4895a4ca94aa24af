"""Copies of a model with quantized weights, by torchao. A cache runs on them as on any other."""

import copy
import math
from collections.abc import Callable

import torch
from torch import nn

from harmonica_kernels.graphs.weights import stored


def _int8(width: int):
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _int8_dynamic(width: int):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def _int4(width: int):
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    group = max(size for size in range(1, 129) if width % size == 0)  # weights that share a scale
    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group))


def _int4_packed(width: int):
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d")  # PyTorch's own kernel


def _fp8_dynamic(width: int):
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig

    return Float8DynamicActivationFloat8WeightConfig()


KINDS: dict[str, Callable] = {"int8": _int8, "int8-dynamic": _int8_dynamic, "int4": _int4, "int4-packed": _int4_packed,
                              "fp8-dynamic": _fp8_dynamic}


def quantize(model: nn.Module, kind: str) -> nn.Module:
    """A copy of the model in which the linears of its blocks have quantized weights; the model stays as it is.

    What it gains: `weight_bytes` fall to about a quarter of float32's in int8. FLOPs stay what they are, since
    every product is still made, so `count_flops` and a schedule's speedup are those of the model. Whether time is
    gained depends on the device and has to be measured.

    Args:
        model: a denoiser, or a transformer of diffusers; its blocks are what stands in its `nn.ModuleList`s.
        kind: "int8" (weights alone; activations and products stay in the model's dtype), "int8-dynamic" (activations
            too, with a scale a token that is found in each call), "int4" (weights alone, an int8 each in memory, with
            a scale for each group of at most 128), "int4-packed" and "fp8-dynamic" (as "int4" and "int8-dynamic", for
            devices that have kernels for them).

    Raises:
        ImportError: torchao is not installed. ValueError: there is no such kind, the device or the model's dtype does
            not allow it, or torchao left a linear of the blocks as it was.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    try:
        from torchao.quantization import quantize_
    except ImportError as error:
        raise ImportError(f"kind: {kind!r} needs the package torchao ({error}); pip install torchao") from error
    model = copy.deepcopy(model)
    blocks = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    chosen = {name: module for name, module in model.named_modules()
              if isinstance(module, nn.Linear) and name.startswith(tuple(blocks))}
    width = math.gcd(*(linear.in_features for linear in chosen.values()))
    try:
        quantize_(model, KINDS[kind](width), lambda module, name: name in chosen)
    except (AssertionError, NotImplementedError) as error:  # which torchao raises for another device or dtype
        weight = next(iter(chosen.values())).weight
        raise ValueError(f"kind: {kind!r} does not run in {weight.dtype} on {weight.device}: {error}") from error
    for name in chosen:
        module = model.get_submodule(name)
        vars(module).pop("extra_repr", None)  # torchao's, which no other process could be sent
        if type(module.weight) is nn.Parameter:
            raise ValueError(f"kind: {kind!r} does not fit {name}, {module.in_features} wide: torchao left it as is")
    return model


def weight_bytes(model: nn.Module) -> int:
    """Bytes in which the model's parameters and buffers are stored, scales and zero points of quantized ones included.
    """
    return sum(part.nbytes for tensor in (*model.parameters(), *model.buffers()) for part in stored(tensor))
