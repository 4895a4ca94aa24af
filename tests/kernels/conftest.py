"""Fresh random inputs for every test, poisoned outputs, and every instruction set of the machine."""

import os
import random

import pytest
import torch

from harmonica_kernels.ops._library import kernels

BASE = int(os.environ.get("HARMONICA_TEST_SEED", random.SystemRandom().randrange(1 << 31)))


@pytest.fixture(autouse=True)
def seed(request) -> int:
    """Seeds torch and random; a failed test shows the line that repeats it."""
    value = hash_of(f"{BASE} {request.node.name}")
    print(f"inputs of HARMONICA_TEST_SEED={BASE}")
    torch.manual_seed(value)
    random.seed(value)
    return value


def hash_of(text: str) -> int:
    return random.Random(text).randrange(1 << 31)


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """torch.empty gives NaN: a kernel that leaves a value unwritten is found out."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=kernels.available_isas())
def isa(request):
    best = kernels.isa()
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(best)


@pytest.fixture
def threads():
    """Sets the number of threads, and restores it afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
