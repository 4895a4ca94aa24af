"""What a CUDA kernel writes to shares no memory with what it reads, to the value."""

import pytest
import torch

from harmonica_kernels.ops._arguments import Dense

B, N, D = 2, 2, 4


def packed(first: int) -> Dense:
    """An output that begins at this value of a buffer whose rows [B, D] lie in its first 12 values."""
    buffer = torch.zeros(32)
    pack = Dense("norm", torch.zeros(B, N, D))
    pack.activation(buffer[first : first + B * N * D].view(B, N, D), "h", out=True)
    pack.rows(buffer[: 2 * B * D].view(B, 2 * D)[:, :D], "shift")
    return pack


def test_neighbours_are_taken():
    packed(12).refuse_overlap()


def test_one_value_in_common_is_refused():
    with pytest.raises(ValueError, match="norm: h is written to and shares memory with shift"):
        packed(11).refuse_overlap()


def test_so_are_two_outputs():
    buffer, pack = torch.zeros(31), Dense("norm", torch.zeros(B, N, D))
    for name, first in (("h", 0), ("store", 15)):
        pack.activation(buffer[first : first + 16].view(B, N, D), name, out=True)
    with pytest.raises(ValueError, match="norm: h is written to and shares memory with store"):
        pack.refuse_overlap()
