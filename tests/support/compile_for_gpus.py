"""Compiles the kernels for GPUs that this machine need not have, exactly as the ops' calls would launch them.

`python -m support.compile_for_gpus [PART OF A CALL'S NAME]` in tests/ prints a JSON list: of each kernel and
architecture the registers of a thread and the bytes of its stack, as ptxas gives them, and what sm_90's code tells.
instructions: of all warps of a program together, a loop's counted once; a program of the two norms has one row. early:
how many of the loads stand before the first use of one. before_wait: how many loads and stores stand before the wait
for the kernel before, null without one. A process of its own, for it replaces Triton's driver and lets launches end
once they are compiled.
"""

import json
import sys
from collections.abc import Sequence
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import harmonica_kernels as hk
import harmonica_kernels.triton_kernels as kernels
from harmonica_kernels.graphs.gated import Loop
from harmonica_kernels.graphs.gated.decision_memory import DecisionMemory
from harmonica_kernels.graphs.gated.norm import norm_on_cuda
from harmonica_kernels.graphs.gated.parts import Parts
from harmonica_kernels.triton_kernels import _launch
from support.sass import instructions, resources

ARCHES = (80, 90, 100)
B, N, D = 2, 8, 1152
SHAPE = (B, N, D)
READ = 90  # the architecture whose machine code is read


class NoDevice:
    """What a launch asks Triton's driver before it compiles."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def activation(dtype=torch.bfloat16) -> torch.Tensor:
    return torch.zeros(SHAPE, dtype=dtype)


def rows(dtype=torch.bfloat16) -> tuple[torch.Tensor, int]:
    return torch.zeros(B, 6 * D, dtype=dtype)[:, D : 2 * D], 6 * D


def run(length: int, forecast: bool = False, dtypes: Sequence[torch.dtype] = (torch.bfloat16,)) -> list[tuple]:
    dtypes = [dtypes[j % len(dtypes)] for j in range(length)]
    return [(activation(dtype), *((activation(dtype), 0.5) if forecast and j else (None, 0.0)), rows(dtype))
            for j, dtype in enumerate(dtypes)]


def forward(length: int, forecast: bool = False, dtype=torch.bfloat16, store: bool = False,
            dtypes: Sequence[torch.dtype] = ()) -> None:
    """dtypes: the terms' in turn, where they are not x's."""
    x = activation(dtype)
    kernels.residual_norm(SHAPE, x, x if length else None, activation(dtype), activation(dtype) if store else None,
                          run(length, forecast, dtypes or (dtype,)), None, 0.0, (rows(dtype), rows(dtype), True, 1e-6))


def dependent(call) -> None:
    with patch.object(_launch, "DEPENDENT", True):
        call()


def blend(forecast: bool, x_dtype=torch.bfloat16) -> None:
    e = torch.zeros(1) if forecast else None
    term = (activation(), activation() if forecast else None, 0.0, rows())
    kernels.residual_norm(SHAPE, activation(x_dtype), activation(x_dtype), activation(), activation(), [term],
                          activation(), torch.zeros(1), (rows(), rows(), True, 1e-6), e)


def backward(forecast: bool, modulation: bool, x_dtype=torch.bfloat16) -> None:
    e = torch.zeros(1) if forecast else None
    term = (activation(), activation() if forecast else None, 0.0, rows())
    row = (lambda: torch.zeros(B, D)) if modulation else (lambda: None)
    kernels.residual_norm_backward(
        SHAPE, activation(x_dtype), activation(), activation(x_dtype), [term], activation(), torch.zeros(1),
        (rows(), rows(), True, 1e-6), e, activation(x_dtype), activation(), [activation() if modulation else None],
        row(), row(), [row()], torch.zeros(1), torch.zeros(1) if forecast else None)


def hidden() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(1, 16, 4 * D, dtype=torch.bfloat16), torch.zeros(1, 4 * D, dtype=torch.bfloat16)


def gated_norm(history: int) -> None:
    steps, branches, wide = 3, 4, torch.zeros(3, B, 6 * D, dtype=torch.bfloat16)
    modulation = hk.Modulation([wide[..., :D]] * (branches + 1), [wide[..., D : 2 * D]] * (branches + 1),
                               [wide[..., 2 * D : 3 * D]] * branches)
    loop = Loop([hk.Branch(lambda h, context: h.clone())] * branches, lambda: modulation,
                lambda x: activation(), lambda y: y, torch.zeros(steps, 2))
    memory = DecisionMemory(steps, branches, history, torch.device("cpu"))
    norm_on_cuda(Parts(loop, memory, torch.zeros(B, 1), norm_on_cuda), 2)


CALLS = {
    **{f"residual_norm R={R}": lambda R=R: forward(R) for R in (0, 1, 4, 28)},
    **{f"gated_norm history={history}": lambda history=history: gated_norm(history) for history in (1, 2)},
    "residual_norm R=31, each term's dtype another": lambda: forward(31, forecast=True, dtypes=(
        torch.bfloat16, torch.float16, torch.float32)),
    "residual_norm R=1 dependent": lambda: dependent(lambda: forward(1)),
    "residual_norm R=1 store": lambda: forward(1, store=True),
    "residual_norm R=2 forecast": lambda: forward(2, forecast=True),
    "residual_norm R=16 forecast": lambda: forward(16, forecast=True),
    "residual_norm R=1 float32": lambda: forward(1, dtype=torch.float32),
    "residual_norm R=1 float64": lambda: forward(1, dtype=torch.float64),
    "blend_residual_norm": lambda: blend(False),
    "blend_residual_norm forecast, float32 x": lambda: blend(True, torch.float32),
    "blend_residual_norm_backward": lambda: backward(False, False),
    "blend_residual_norm_backward forecast, float32 x": lambda: backward(True, False, torch.float32),
    "blend_residual_norm_backward modulation": lambda: backward(True, True),
    "cache_commit": lambda: kernels.cache_commit(activation(), None, activation(), torch.zeros(1), 0.1),
    "cache_commit previous": lambda: kernels.cache_commit(activation(), activation(), activation(torch.float32),
                                                          torch.zeros(1), 0.1),
    "bias_gelu tanh": lambda: kernels.bias_gelu(*hidden(), False),
    "bias_gelu exact": lambda: kernels.bias_gelu(*hidden(), True),
    "guided_step": lambda: kernels.guided_step(*[torch.zeros(2, 4, 64)] * 4, 1.5, 3, 0.9, 0.1, None, None),
    "guided_step table": lambda: kernels.guided_step(*[torch.zeros(2, 4, 64)] * 4, 1.5, 3, 0.0, 0.0,
                                                     torch.zeros(20, 2), torch.zeros(1, dtype=torch.int64)),
}


def main() -> None:
    launch, compiled, found = JITFunction.run, [], []

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append(launch(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    calls = {name: call for name, call in CALLS.items() if len(sys.argv) < 2 or sys.argv[1] in name}
    for arch in ARCHES:
        triton.runtime.driver.set_active(NoDevice(arch))
        for name, call in calls.items():
            compiled.clear()
            call()
            for kernel in compiled:
                cubin, warps = kernel.asm["cubin"], kernel.metadata.num_warps
                entry = dict(arch=arch, call=name, kernel=kernel.metadata.name, warps=warps, **resources(cubin))
                if arch == READ:
                    entry |= instructions(cubin)
                    entry["instructions"] *= warps
                found.append(entry)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
