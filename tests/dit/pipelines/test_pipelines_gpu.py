"""Pipelines on a GPU: the same latents as on the CPU, by the trunk and by a schedule of branches; and trainings."""

import pytest
import torch

import harmonica_dit
from harmonica_dit.train import train_forecaster, train_router
from support.many_pipes import PIPES, every_second, move_arguments

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
              pytest.mark.filterwarnings("ignore:soft_share", "ignore:target_speedup", "ignore:forecasts to order 0")]


@pytest.mark.parametrize("name", PIPES)
def test_a_pipeline_with_a_cache_is_what_it_is_on_the_cpu(name, monkeypatch):
    small, found = PIPES[name], {}
    pipe = small.pipe()
    move_arguments(monkeypatch, pipe)
    configs = {"by the trunk": 1.5}
    if len(small.transformers) == 1:
        configs["by branches"] = every_second(pipe, small.steps_run(6))
    for device in ("cpu", DEVICE):
        pipe.to(device)
        found[device, "plain"] = small.call(pipe).cpu()
        for way, config in configs.items():
            harmonica_dit.enable_cache(pipe, config)
            found[device, way] = small.call(pipe).cpu()
            harmonica_dit.disable_cache(pipe)
    for way in ("plain", *configs):
        expected = found["cpu", way]
        assert (found[DEVICE, way] - expected).abs().max() < 0.02 * expected.abs().max(), way
        assert way == "plain" or not torch.equal(expected, found["cpu", "plain"])


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen", "wan"])
def test_a_training_on_a_gpu(name):
    net = harmonica_dit.load(PIPES[name].pipe().to(DEVICE), **PIPES[name].to_train_on())
    router = train_router(net, steps=3, target_speedup=1.3, trajectories=2, batch=2, progress=False)
    assert router.scores().isfinite().all() and router.scores().device.type == DEVICE
    schedule = train_forecaster(net, 1.5, steps=4, iterations=2, images=2, held_out=2, batch=2, progress=False)
    images = harmonica_dit.sample(net, [0, 1], schedule=schedule, latents=True)
    assert images.isfinite().all() and images.device.type == DEVICE
