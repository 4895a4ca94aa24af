"""Pipelines on a GPU: the same latents as on the CPU, by the trunk and by a schedule of branches; and trainings."""

from functools import wraps

import pytest
import torch

import harmonica_dit
from harmonica_dit.flops import Flops
from harmonica_dit.pipelines.adapters import adapt
from harmonica_dit.pipelines.conditions import moved
from harmonica_dit.schedule import Schedule
from harmonica_dit.train import train_forecaster, train_router
from support.many_pipes import PIPES

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
              pytest.mark.filterwarnings("ignore:soft_share", "ignore:target_speedup", "ignore:forecasts to order 0")]


def every_second(pipe, steps: int) -> Schedule:
    """Repeats every branch at every second step."""
    names = adapt(pipe.transformer).branch_names
    return Schedule((torch.arange(steps) % 2 == 0)[:, None].repeat(1, len(names)), names,
                    Flops((1.0,) * len(names), 1.0))


@pytest.mark.parametrize("name", PIPES)
def test_a_pipeline_with_a_cache_is_what_it_is_on_the_cpu(name, monkeypatch):
    small, found = PIPES[name], {}
    pipe = small.pipe()
    original = type(pipe).__call__

    @wraps(original)
    def call(self, *args, **kwargs):
        return original(self, *args, **moved(kwargs, self.device))

    monkeypatch.setattr(type(pipe), "__call__", call)  # embeddings and masks come from the CPU
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
