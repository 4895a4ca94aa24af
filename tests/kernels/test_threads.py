"""Threads: each with a cache of its own, one cache for two, after fork(), and beside another OpenMP runtime."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import harmonica_kernels as hk
from support.naive_forward import K, Toy

ROWS = [None, (True, False, True, False), (False,) * K, None, (False, True, False, False)]


def trajectory(toy: Toy, x: torch.Tensor) -> torch.Tensor:
    cache = hk.FeatureCache()
    with torch.no_grad():
        for row in ROWS:
            x = toy(x, row=row, cache=cache)
    return x


def test_threads_with_a_cache_each(threads):
    """Large enough that each forward is computed by several threads itself."""
    threads(2)
    toy = Toy(4, 32, 96, torch.float32)
    inputs = [torch.randn_like(toy.x) for _ in range(12)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda x: trajectory(toy, x), inputs))
    for x, y in zip(inputs, found):
        assert torch.equal(y, trajectory(toy, x))


def test_a_cache_in_two_threads_is_refused():
    toy, cache, inside, go_on = Toy(), hk.FeatureCache(), threading.Event(), threading.Event()
    body = toy.branches[0].body

    def waits(h, context):
        inside.set()
        assert go_on.wait(60)
        return body(h, context)

    other = Toy()
    other.branches[0] = hk.Branch(waits)
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        running = pool.submit(lambda: other(other.x, cache=cache))
        try:
            assert inside.wait(60)
            with pytest.raises(RuntimeError, match="cache: .* did not finish, or runs in another thread"):
                toy(toy.x, cache=cache)
        finally:
            go_on.set()
        running.result()


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fork() beside OpenMP")
def test_after_a_fork():
    """A child has none of the OpenMP threads that its parent has made, and must not wait for them.

    PyTorch's own operators do, unless they are told to take one thread.
    """
    assert run("""
import os, signal, torch
from harmonica_kernels.ops import residual_norm
from harmonica_kernels.ops._library import kernels
torch.set_num_threads(3)
x = torch.randn(8, 64, 512)
h = residual_norm(x, [], None, None)
child = os.fork()
if child == 0:
    signal.alarm(60)  # ends the child if it waits
    same = (residual_norm(x, [], None, None).numpy() == h.numpy()).all() and "forked" in kernels.threading()
    torch.set_num_threads(1)
    os._exit(0 if same and torch.equal(residual_norm(x * 1, [], None, None), h) else 1)
print(os.waitpid(child, 0)[1], "forked" in kernels.threading())
""") == "0 False\n"


def test_beside_another_openmp():
    """scikit-learn brings a copy of OpenMP of its own, which is here before PyTorch's."""
    pytest.importorskip("sklearn")
    first, second = run("""
from sklearn.metrics import pairwise_distances_argmin
import numpy, torch
from harmonica_kernels.ops import reference, residual_norm
from harmonica_kernels.ops._library import kernels
torch.set_num_threads(3)
x = torch.randn(8, 64, 512)
for _ in range(3):
    pairwise_distances_argmin(numpy.random.rand(2000, 8), numpy.random.rand(50, 8))
    h = residual_norm(x, [], None, None)
expected = torch.nn.functional.layer_norm(x, (512,), eps=1e-6)
print(torch.allclose(h, expected, atol=1e-5))
print(kernels.threading())
""").splitlines()
    assert first == "True" and "torch" in second, second
