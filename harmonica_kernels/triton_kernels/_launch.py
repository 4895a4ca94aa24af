"""Shared by the launchers: the tile of a row kernel, the accumulators' type, the device, and how a launch may begin."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

TILE = 2048  # values a program when rows are short; 16 a thread are two 16-byte loads of a 16-bit type
FUSED = dict(enable_fp_fusion=True)  # fuses multiply-adds; said here because Triton is about to change its default
DEPENDENT = False  # by programmatic dependent launch? The GPU benchmark times both ways, and decides


def tile(width: int) -> dict:
    """Constants of a backward's launch: rows a program, the power of two that holds a row, and warps.

    A thread has 16 values; a program has at most 16 warps.
    """
    block = triton.next_power_of_2(width)
    rows = max(1, TILE // block)
    return dict(D=width, ROWS=rows, BLOCK=block, num_warps=min(16, max(1, rows * block // 512)), **FUSED)


def accumulator(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype is torch.float64 else tl.float32


def device_of(x: Tensor) -> AbstractContextManager:
    """Makes x's device current, since Triton launches there. CPU tensors come from Triton's interpreter."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def dependent_launch() -> dict:
    """Constants of a launch that may begin while the kernel before it still runs: its programs are placed and compute
    addresses, then wait. GPUs before sm_90 have no such launches, nor has Triton's interpreter. Recorded graphs stay as
    they are."""
    target = triton.runtime.driver.active.get_current_target() if DEPENDENT and not knobs.runtime.interpret else None
    dependent = target is not None and target.backend == "cuda" and target.arch >= 90
    return dict(DEPENDENT=dependent, launch_pdl=True) if dependent else dict(DEPENDENT=False)
