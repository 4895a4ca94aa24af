"""Gated trajectories on a GPU, against the plan walked on the CPU. None of these has run yet."""

import random

import pytest
import torch

import harmonica_kernels as hk
from support.gated_norm_check import check
from support.loops import Forecasts, Table, Trajectory, compile_gated

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda:0")


def load(executor, table, threshold):
    executor.load(table)
    executor.threshold = threshold
    return executor


def test_norm_on_random_states_of_what_decides():
    for _ in range(200):
        check(CUDA)


@pytest.mark.parametrize("rule", ["scores", "change"])
def test_equals_the_walk_on_the_cpu(rule):
    for _ in range(10):
        T, K = random.randint(1, 6), random.randint(2, 9)
        trajectory = Trajectory(T, K, width=random.choice((8, 16, 48)))
        on_gpu, walked, there = compile_gated(rule), compile_gated(rule), trajectory.to(CUDA)
        for i in range(8):
            table = Table(torch.rand(T, K), torch.randn(T, K) * 0.3 if i % 2 else None)
            noise = torch.randn(trajectory.shape)
            image = load(on_gpu, table, i / 8)(there, noise.to(CUDA)).cpu()
            torch.testing.assert_close(image, load(walked, table, i / 8)(trajectory, noise), rtol=1e-3, atol=1e-3)
            assert torch.equal(on_gpu.reused, walked.reused)


def test_forecasts_of_the_trunk_equal_the_walk_on_the_cpu():
    for _ in range(6):
        T, H = random.randint(2, 7), random.randint(1, 4)
        trajectory = Trajectory(T, random.randint(1, 5), width=random.choice((16, 48)))
        on_gpu, walked, there = compile_gated(), compile_gated(), trajectory.to(CUDA)
        for _ in range(6):
            forecasts, noise = Forecasts(T, H, trajectory.D), torch.randn(trajectory.shape)
            image = on_gpu(there, noise.to(CUDA), forecasts).cpu()
            torch.testing.assert_close(image, walked(trajectory, noise, forecasts), rtol=1e-3, atol=1e-3)
            assert torch.equal(on_gpu.reused, walked.reused)
        assert on_gpu.graphs == 1


def test_a_changed_router_or_threshold_equals_a_fresh_capture_to_the_bit():
    trajectory = Trajectory(5, 6, width=64, dtype=torch.bfloat16).to(CUDA)
    used, noise = compile_gated(), torch.randn(trajectory.shape, device=CUDA)
    for _ in range(10):
        table, threshold = Table(torch.rand(5, 6), torch.randn(5, 6)), random.random()
        fresh = load(compile_gated(), table, threshold)
        assert torch.equal(load(used, table, threshold)(trajectory, noise), fresh(trajectory, noise))
        assert torch.equal(used.reused, fresh.reused)
        fresh.reset()


def test_no_synchronisation_inside_a_trajectory():
    trajectory, executor = Trajectory(4, 5).to(CUDA), compile_gated()
    noise = torch.randn(trajectory.shape, device=CUDA)
    executor(trajectory, noise)
    torch.cuda.set_sync_debug_mode("error")
    try:
        executor(trajectory, noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_copy_from_the_host_is_refused_by_name():
    trajectory = Trajectory(2, 3, plain=True).to(CUDA)
    loop, host = trajectory.loop(), torch.randn(16)
    bodies = list(loop.branches)
    bodies[1] = hk.Branch(lambda h, context: h + host.to(CUDA, non_blocking=True))
    object.__setattr__(loop, "branches", bodies)
    trajectory.loop = lambda: loop
    trajectory.graph_parts = lambda: (trajectory, (), lambda: trajectory)
    with pytest.raises(RuntimeError, match="branch 1"):
        compile_gated()(trajectory, torch.randn(trajectory.shape, device=CUDA))


def test_memory_does_not_grow():
    trajectory, executor = Trajectory(4, 5).to(CUDA), compile_gated()
    noise = torch.randn(trajectory.shape, device=CUDA)
    used = []
    for i in range(200):
        load(executor, Table(torch.rand(4, 5)), random.random())(trajectory, noise)
        if i % 50 == 49:
            executor.reset()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            used.append(torch.cuda.memory_reserved())  # of this process; bench/gpu/gated.py has the device to itself
    assert used[-1] <= used[1]
