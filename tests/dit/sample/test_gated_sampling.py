"""A device-gated executor under `sample`, with the bundled model and router."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import harmonica_dit
import harmonica_kernels as hk
from harmonica_dit.methods import fora
from harmonica_dit.models.dit import Body, DiT
from harmonica_dit.router import Router
from harmonica_dit.sample import Trajectory, denoise, image_noise, sample
from harmonica_dit.sample.schedulers import ReferenceDDIM, make_scheduler
from harmonica_kernels import ops
from support.cpu_recorder import CpuRecorder
from support.graph_stand_in import Built, Recorder


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
    executor = hk.compile(denoise, mode="gated")
    executor.load(router)

    def run(n):
        executor(Trajectory(other, torch.ones(n, dtype=torch.long), steps=router.steps),
                 image_noise(0, 0, n, net.sample_shape))
        return list(executor._loops.values())

    (first,) = run(1)
    assert run(1) == [first] and len(run(2)) == 2
    other.bfloat16()
    (last,) = run(1)  # those that read the old weights have been freed, of the other batch, too
    assert last is not first


class Ops(TorchDispatchMode):
    """The names of the ops in its blocks."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_gated_branch_records_the_ops_of_a_captured_one(monkeypatch, mode):
    """With weights that want a gradient, as a model has them that nobody has frozen."""
    monkeypatch.setattr(ops, "FUSED", ("cpu",))
    net = DiT(input_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=3)
    trajectory, noise = Trajectory(net, torch.tensor([1]), steps=2), torch.randn(1, *net.sample_shape)
    found, write = {}, Body.write

    def logged(body, h, context, out):
        with Ops() as log:
            write(body, h, context, out)
        found[body.i, body.name] = log.names

    monkeypatch.setattr(Body, "write", logged)
    net.blocks = net.blocks  # whose branches take what stands in the class now
    CpuRecorder.install(monkeypatch)
    schedule, lists = fora(net, steps=2, every=2), {}
    for name, executor in (("captured", hk.compile(denoise)), ("gated", Built(monkeypatch).executor)):
        found.clear()
        with mode():
            for _ in range(2):
                executor(trajectory, noise, schedule)
        lists[name] = dict(found)
    assert lists["gated"] == lists["captured"] and len(lists["gated"]) == 4
    assert Recorder.last.launches == 2 and [entry for entry, _ in CpuRecorder.log] == ["new pool"]
