"""A device-gated executor under `sample`, with the bundled model and router."""

import copy

import pytest
import torch

import harmonica_dit
import harmonica_kernels as hk
from harmonica_dit.router import Router
from harmonica_dit.sample import Trajectory, denoise, image_noise, sample
from harmonica_dit.sample.schedulers import ReferenceDDIM, make_scheduler


@pytest.fixture(scope="module")
def net():
    return harmonica_dit.load("fashion-dit")


@pytest.fixture(scope="module")
def router():
    return Router.load("fashion-dit-2.0x")


def test_sample_gives_the_same_images(net, router):
    executor, labels = hk.compile(denoise, mode="gated"), [3, 1, 4]
    for threshold in (0.1, 0.6):
        schedule = router.schedule(threshold)
        options = dict(steps=router.steps, batch=2, seed=5)
        expected = sample(net, labels, schedule=schedule, **options)
        torch.testing.assert_close(sample(net, labels, schedule=schedule, executor=executor, **options), expected,
                                   rtol=0, atol=1e-4)
        executor.load(router)
        executor.threshold = threshold
        torch.testing.assert_close(sample(net, labels, executor=executor, **options), expected, rtol=0, atol=1e-4)
        assert executor.reused.float().mean().item() == pytest.approx(schedule.cur)
    assert executor.graphs == 2, "one for two images, one for the third"


def test_a_router_with_forecasts(net, router):
    T, K = router.scores().shape
    forecasting = Router(torch.randn(T, K), router.branches, router.flops, router.timesteps,
                         extrapolation=torch.rand(T, K), threshold=0.6)
    executor, noise = hk.compile(denoise, mode="gated"), image_noise(0, 0, 1, net.sample_shape)
    executor.load(forecasting)
    executor.threshold = 0.6
    with torch.no_grad():
        found = executor(Trajectory(net, torch.tensor([7]), steps=T), noise)
        expected = denoise(Trajectory(net, torch.tensor([7]), steps=T), noise, forecasting.schedule())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_updates_are_the_schedulers_steps():
    scheduler = ReferenceDDIM()
    scheduler.set_timesteps(13)
    x, eps = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    for t, (a, b) in zip(scheduler.timesteps, scheduler.updates().double(), strict=True):
        expected = scheduler.step(eps, t, x).prev_sample
        torch.testing.assert_close(a * x + b * eps, expected, rtol=1e-5, atol=1e-5)


def test_other_schedulers_are_refused(net):
    trajectory = Trajectory(net, torch.tensor([0]), steps=4, scheduler=make_scheduler("DPMSolverMultistepScheduler", 4))
    with pytest.raises(TypeError, match='DPMSolverMultistepScheduler; a device-gated trajectory needs "ddim"'):
        hk.compile(denoise, mode="gated")(trajectory, image_noise(0, 0, 1, net.sample_shape))


def test_moved_weights_are_captured_anew(net, router):
    other = copy.deepcopy(net)
    executor, noise = hk.compile(denoise, mode="gated"), image_noise(0, 0, 1, net.sample_shape)
    executor.load(router)
    for dtype in (torch.float32, torch.bfloat16):
        other.to(dtype)
        executor(Trajectory(other, torch.tensor([1]), steps=router.steps), noise)
    assert executor.graphs == 2
