"""Captured executors on a GPU."""

import gc

import pytest
import torch
import torch.nn.functional as F

import harmonica_kernels as hk
from support.three_branches import ThreeBranches, double

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
              pytest.mark.usefixtures("no_grad")]


def two_layers(x, w, v):
    return F.gelu(x @ w) @ v


@pytest.fixture
def tensors():
    return [torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((64, 128), (128, 512), (512, 128))]


def test_capture_equals_eager(tensors):
    executor = hk.compile(two_layers)
    for _ in range(4):
        tensors[0].normal_()
        assert torch.equal(executor(*tensors), two_layers(*tensors))
    assert executor.graphs == 1


def test_a_new_shape_is_captured_anew(tensors):
    x, w, v = tensors
    executor = hk.compile(two_layers)
    for n in (64, 7, 64, 7, 1, 1, 64, 7):
        assert torch.equal(executor(x[:n], w, v), two_layers(x[:n].clone(), w, v))
    assert executor.graphs == 3


def test_graphs_share_one_pool_and_its_memory_returns():
    def allocate(x, y):
        return ((x + y).cumsum(0) * 2).sum(0)  # two intermediate results of 64 MiB

    x = torch.randn(1 << 24, 1, device="cuda")
    allocate(x, 0), torch.cuda.synchronize(), torch.cuda.empty_cache()
    start = torch.cuda.memory_reserved()
    executor, reserved = hk.compile(allocate, graphs=3), []
    for y in range(9):
        for _ in range(3):
            torch.testing.assert_close(executor(x, y), allocate(x, y))
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved() - start)
    assert executor.graphs == 3
    assert reserved[-1] <= reserved[2] + (1 << 21)  # evicted graphs give up what they held
    assert reserved[2] < 3 * (x.nbytes * 3)  # inputs of three graphs, and one pool for what lies between
    executor.reset()
    del executor
    gc.collect(), torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - start < 1 << 25  # at most a matrix library's workspace


@pytest.mark.parametrize("function, words", [
    (lambda x: x * x.sum().item(), "cannot be captured"), (lambda x: x[x > 0], "cannot be captured"),
    (lambda x: x + torch.ones(3).to(x.device), "cannot be captured"),
    (lambda x: x + torch.randn(3, device=x.device), "draws random numbers"),
    (lambda x: x + torch.randn(3).to(x.device), "draws random numbers")])
def test_what_cannot_be_captured(function, words):
    """Two calls at most, and then the device, the stream and the next capture are in order."""
    executor, x = hk.compile(function), torch.ones(3, device="cuda")
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match=words):
        executor(x), executor(x)
    assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
    torch.cuda.empty_cache()
    torch.randn(3, device="cuda")
    torch.zeros(3).pin_memory().to("cuda", non_blocking=True)
    good = hk.compile(double)
    for i in range(3):
        assert torch.equal(good(x + i), double(x + i))
    assert good.graphs == 1


def test_caches():
    net, cache = ThreeBranches().cuda(), hk.FeatureCache(2)
    executor = hk.compile(net)
    for _ in range(6):
        cache.rewind()
        fresh, x = hk.FeatureCache(2), torch.randn(2, 5, 8, device="cuda")
        for row, e in ((None, None), ((True, False, True), None), (None, None), ((False, True, False), (1, 0, 1))):
            want = net(x, row=row, forecast_weights=e, cache=fresh)
            assert torch.equal(executor(x, row=row, forecast_weights=e, cache=cache), want)
            x = want
    assert executor.graphs == 4


def test_autocast():
    layer, x = torch.nn.Linear(64, 64).cuda(), torch.randn(4, 64, device="cuda")
    executor = hk.compile(layer)
    for _ in range(4):
        with torch.autocast("cuda", torch.bfloat16):
            x.normal_()
            assert torch.equal(executor(x), layer(x))
        torch.cuda.empty_cache()
    assert executor.graphs == 1
