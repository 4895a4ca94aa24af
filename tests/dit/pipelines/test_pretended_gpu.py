"""Where a pipeline is on a GPU, the cache and the adapters make no tensor on the CPU that meets one from there."""

import pytest
import torch

import harmonica_dit
from support.many_pipes import PIPES, every_second, move_arguments
from support.pretended_gpu import GPU, PretendedGpu, is_marked, move

pytestmark = pytest.mark.filterwarnings("ignore:forecasts to order 0", "ignore:CUDA is not available")


@pytest.fixture(params=PIPES)
def moved_pipe(request, monkeypatch):
    """A pipeline on the pretended GPU, to which its arguments are moved; and what it makes on the CPU."""
    small = PIPES[request.param]
    pipe = small.pipe()
    expected = small.call(pipe)
    move_arguments(monkeypatch, pipe)
    monkeypatch.setattr(type(pipe), "device", GPU)
    move(pipe)
    return small, pipe, expected


def test_no_tensors_of_two_devices_meet(moved_pipe):
    small, pipe, expected = moved_pipe
    with PretendedGpu():
        found = small.call(pipe)
        assert is_marked(found) and torch.equal(found.cpu(), expected)
        for config in (1.5, every_second(pipe, small.steps_run(6)) if len(small.transformers) == 1 else 1.7):
            harmonica_dit.enable_cache(pipe, config)
            found = small.call(pipe)
            harmonica_dit.disable_cache(pipe)
            assert is_marked(found) and not torch.equal(found.cpu(), expected)


def test_it_is_seen_when_they_do():
    with PretendedGpu():
        there, here = torch.ones(2, device="cuda"), torch.ones(2)
        assert there.is_cuda and there.device == GPU and not here.is_cuda and there[here.long()].is_cuda
        assert (there + torch.tensor(1.0)).is_cuda and here.copy_(there).device.type == "cpu"
        for meet in (lambda: there + here, lambda: torch.cat([here, there]), lambda: here[there.long()],
                     lambda: torch.nn.functional.linear(here, there[None])):
            with pytest.raises(RuntimeError, match="on the pretended GPU and"):
                meet()
