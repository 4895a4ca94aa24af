"""Fresh random inputs for every test; a failed test shows the line that repeats it."""

import os
import random

import pytest
import torch

BASE = int(os.environ.get("HARMONICA_TEST_SEED", random.SystemRandom().randrange(1 << 31)))


@pytest.fixture(autouse=True)
def seed(request) -> None:
    print(f"inputs of HARMONICA_TEST_SEED={BASE}")
    value = random.Random(f"{BASE} {request.node.name}").randrange(1 << 31)
    torch.manual_seed(value)
    random.seed(value)
