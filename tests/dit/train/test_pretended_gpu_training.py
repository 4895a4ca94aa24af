"""Trainings and calibrations on a GPU make no tensor on the CPU that meets one from there."""

import pytest
import torch

import harmonica_dit
from harmonica_dit.methods import smoothcache, step_search
from harmonica_dit.train import train_forecaster, train_learning_to_cache, train_router
from harmonica_kernels.graphs import captured
from support.many_pipes import PIPES
from support.pretended_gpu import GPU, PretendedGpu, move

pytestmark = pytest.mark.filterwarnings("ignore:soft_share", "ignore:target_speedup", "ignore:forecasts to order 0")
ROUTER = dict(steps=4, trajectories=2, batch=2, executor="eager", progress=False)
FORECASTER = dict(steps=4, iterations=2, images=4, held_out=2, batch=2, checkpointing=False, progress=False)


@pytest.fixture(autouse=True)
def no_graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 34, 1 << 34))
    monkeypatch.delitem(captured.RECORDERS, "cuda")


@pytest.fixture
def net():
    net = harmonica_dit.load("fashion-dit")
    move(net)
    return net


@pytest.mark.parametrize("options", [
    dict(target_speedup=1.3), dict(beta=1e-3, importance="reference", importance_rows="hard"),
    dict(beta=1e-3, importance="none", extrapolation="learned"), dict(recipe="paper", beta=1e-3)])
def test_a_router(net, options):
    with PretendedGpu():
        router = train_router(net, **ROUTER | options)
        assert router.scores().device == GPU
        assert harmonica_dit.sample(net, [0, 1], schedule=router).device == GPU


def test_a_forecaster_goes_on_where_it_stopped(net, tmp_path):
    with PretendedGpu():
        for iterations in (2, 2):
            schedule = train_forecaster(net, 1.5, out=tmp_path, **FORECASTER | dict(iterations=iterations))
        assert harmonica_dit.sample(net, [0, 1], schedule=schedule).device == GPU


def test_learning_to_cache(net):
    images = torch.randn(4, *net.sample_shape)
    with PretendedGpu():
        router = train_learning_to_cache(net, images, [0, 1, 2, 3], steps=4, iterations=2, batch=2, beta=1e-3,
                                         progress=False)
        assert router.scores().device == GPU


def test_calibrations(net):
    with PretendedGpu():
        assert smoothcache(net, 4, speedup=1.5).speedup >= 1.5 and step_search(net, 4, speedup=1.5).speedup >= 1.5


@pytest.mark.parametrize("name", ["flux", "sd3", "wan"])
def test_of_a_pipeline_that_its_own_loop_runs(name):
    pipe = PIPES[name].pipe()
    move(pipe)
    with PretendedGpu():
        net = harmonica_dit.load(pipe, **PIPES[name].to_train_on())
        assert train_router(net, **ROUTER | dict(target_speedup=1.3)).scores().device == GPU
        schedule = train_forecaster(net, 1.5, target="uncached", **FORECASTER)
        assert harmonica_dit.sample(net, [0, 1], schedule=schedule, latents=True).device == GPU
