"""What a forward costs in floating-point operations, branch by branch, counted by torch."""

from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one row's forward: each of the K branches', and what no schedule skips."""

    branches: tuple[float, ...]
    fixed: float

    @property
    def total(self) -> float:
        return sum(self.branches) + self.fixed


def count_flops(net) -> Flops:
    """Counts one row's forward of a denoiser whose branch names are its submodules' (matrix products, convolutions)."""
    parameter = next(net.parameters())
    x = torch.zeros(1, *net.sample_shape, dtype=parameter.dtype, device=parameter.device)
    zero = torch.zeros(1, dtype=torch.long, device=parameter.device)
    # the math back end, because its matrix products are counted on every device
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(x, zero, zero)
    counts = {name.split(".", 1)[-1]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    branches = tuple(float(counts[name]) for name in net.branch_names)
    return Flops(branches, float(counter.get_total_flops()) - sum(branches))
