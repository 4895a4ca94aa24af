"""A recorder that needs no GPU, and the mode in which executors are called."""

import pytest
import torch

from support.cpu_recorder import CpuRecorder


@pytest.fixture
def recorder(monkeypatch):
    CpuRecorder.install(monkeypatch)
    return CpuRecorder


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield
