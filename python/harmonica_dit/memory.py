"""What a batch takes against the memory that there is."""

import os
from pathlib import Path

import torch

ACTIVATIONS = 2  # tensors [B, N, D] that a forward holds at any rate: the tokens, and a branch's output


def check_fits_memory(net, batch: int, guidance: float, kept: int = 0) -> None:
    """Refuses a batch whose tokens and cache alone exceed the device's memory. What passes may still be too much.

    Args:
        net: a denoiser. batch: images at a time. guidance: 1 runs no unconditional half.
        kept: tensors [B, N, D] in the cache.

    Raises:
        ValueError: it cannot fit; the message says what it would take, and what there is.
    """
    weight = next(net.parameters())
    rows = batch * (1 if guidance == 1 else 2)
    tokens = getattr(net, "tokens", net.sample_shape[-1])
    needed = rows * tokens * net.width * weight.element_size() * (ACTIVATIONS + kept)
    there = memory_of(weight.device)
    if needed > there:
        raise ValueError(f"batch: got {batch}, which takes {needed / 2**30:,.0f} GiB at least; {weight.device} has "
                         f"{there / 2**30:,.0f}")


def memory_of(device: torch.device) -> int:
    """Bytes of a device's memory; of the CPU's as much as this process's control group may have."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.exists() else "max"
    return whole if allowed == "max" else min(whole, int(allowed))
