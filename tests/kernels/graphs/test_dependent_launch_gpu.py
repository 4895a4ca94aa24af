"""Norms launched dependent on the kernel before, on a GPU. None of this has run yet."""

from unittest.mock import patch

import pytest
import torch

import harmonica_kernels as hk
from harmonica_kernels.ops import Term, residual_norm
from harmonica_kernels.triton_kernels import _launch

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("no_grad"), pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs sm_90")]


def chain(x, weight):
    """Norms between matrix products, each of which writes what the next one reads, into memory that is used again."""
    for _ in range(20):
        x = residual_norm(x, [Term(x @ weight, None, None)], None, None)
    return x


def test_a_graph_of_dependent_launches_gives_the_same():
    weight = torch.randn(1152, 1152, device="cuda", dtype=torch.bfloat16) / 34
    usual, dependent = hk.compile(chain), hk.compile(chain)
    for _ in range(50):
        x = torch.randn(2, 256, 1152, device="cuda", dtype=torch.bfloat16)
        expected = usual(x.clone(), weight)
        with patch.object(_launch, "DEPENDENT", True):
            assert torch.equal(dependent(x.clone(), weight), expected)
