"""What has been put on a module: LoRA, quantization, hooks, another module in its place. All of it has to run.

So a weight is read directly only where nothing has been put on its layer; every other layer is called as a module.
"""

import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

KNOWN = ("torch", "torchao", "diffusers", "harmonica_dit")  # packages whose modules compute the same at every step


def has_own_forward(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward and nothing else."""
    return not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks or module._compiled_call_impl is not None
                or "forward" in module.__dict__)  # accelerate's and diffusers' hooks set one


def is_own(cls: type, name: str = "forward") -> bool:
    """Whether a method is the one that its class was written with, and not one that somebody has put in its place."""
    if torch.compiler.is_compiling():
        return True  # which torch.compile cannot ask
    owner = next((base for base in cls.__mro__ if name in vars(base)), None)
    return owner is None or _is_written_in(vars(owner)[name], owner.__module__)


@cache
def _is_written_in(function: Callable, module: str) -> bool:
    code = getattr(function, "__code__", None)  # functools.wraps gives a substitute everything else
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is None or (code is not None and code.co_filename == file)


def is_linear(module: nn.Module) -> bool:
    """Whether this is exactly nn.Linear without LoRA or hook; its weight may be of any kind (quantized)."""
    return type(module) is nn.Linear and has_own_forward(module) and is_own(nn.Linear)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether this is exactly of its kind (no LoRA, quantization or hook), so that its weight may be used directly."""
    return type(module) is kind and has_own_forward(module) and is_own(kind) and type(module.weight) is nn.Parameter


def is_plain_linear(module: nn.Module) -> bool:
    """Whether this is exactly nn.Linear, see `is_plain`."""
    return is_plain(module, nn.Linear)


def is_steady(module: nn.Module) -> bool:
    """Whether the module surely computes the same at every step of a trajectory: no LoRA, whose scale may change, and
    no hook. Only then may its results be computed ahead of their steps.
    """
    return all(type(part).__module__.partition(".")[0] in KNOWN and has_own_forward(part) and is_own(type(part))
               for part in module.modules())


def write_linear(linear: nn.Module, h: Tensor, out: Tensor) -> None:
    """Writes linear(h), with h [B, N, ·], into `out`, a contiguous cache buffer.

    A plain linear layer writes there itself; what another one returns is copied.
    """
    if not is_plain_linear(linear):
        out.copy_(linear(h))
        return
    h, out = h.flatten(0, 1), out.flatten(0, 1)
    if linear.bias is None:
        torch.mm(h, linear.weight.t(), out=out)
    else:
        torch.addmm(linear.bias, h, linear.weight.t(), out=out)


class BlockPart:
    """The module that stands at a place in a list of blocks: looked up at each use, so that a swap is followed."""

    def __init__(self, blocks: nn.ModuleList, i: int, name: str):
        self.blocks, self.i, self.name = blocks, i, name

    @property
    def module(self) -> nn.Module:
        return getattr(self.blocks[self.i], self.name)
