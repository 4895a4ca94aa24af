"""Sampling on a GPU makes no tensor on the CPU that meets one from there."""

import pytest
import torch

import harmonica_dit
from harmonica_dit.methods import first_block, fora, trunk_forecast
from harmonica_dit.sample import sample
from support.many_pipes import PIPES
from support.pretended_gpu import PretendedGpu, is_marked, move

WAYS = {
    "nothing": lambda net: None,
    "repeated": lambda net: fora(net, 5, 2),
    "branches forecast": lambda net: fora(net, 5, 2, 2),
    "trunk forecast": lambda net: trunk_forecast(net, 5, every=2, order=2),
    "corrected": lambda net: trunk_forecast(net, 5, every=2, adams=True),
    "learned": lambda net: "fashion-dit-forecast-2.8x",
    "router": lambda net: "fashion-dit-2.0x-forecast",
    "decided on the way": lambda net: first_block(net, 5, threshold=0.1),
}


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 34, 1 << 34))


@pytest.mark.parametrize("way, scheduler", [
    *((way, None) for way in WAYS), *((way, scheduler) for way in WAYS if way not in ("learned", "router")
                                      for scheduler in ("DPMSolverMultistepScheduler", "DDPMScheduler"))])
def test_no_tensors_of_two_devices_meet(way, scheduler):
    net = harmonica_dit.load("fashion-dit")
    schedule = WAYS[way](net)
    options = dict(schedule=schedule, steps=20 if isinstance(schedule, str) else 5, scheduler=scheduler, batch=3,
                   executor="eager")
    expected = sample(net, [0, 3, 9, 1], **options)
    move(net)
    with PretendedGpu():
        found = sample(net, [0, 3, 9, 1], **options)
        # a GPU's fused GELU is that of tanh, the CPU's in its place is not
        assert is_marked(found) and (found.cpu() - expected).abs().max() < 0.2


@pytest.mark.parametrize("how", ["loaded there", "moved"])
@pytest.mark.parametrize("name", ["flux", "sd3", "wan"])
def test_of_a_pipeline_that_its_own_loop_runs(name, how):
    pipe, options = PIPES[name].pipe(), PIPES[name].to_train_on()
    net = harmonica_dit.load(pipe, **options)
    schedules = fora(net, 4, 2), trunk_forecast(net, 4, every=2)
    expected = [sample(net, [0, 1], schedule=schedule, latents=True) for schedule in schedules]
    move(pipe)
    with PretendedGpu():
        if how == "loaded there":
            net = harmonica_dit.load(pipe, **options)
        for schedule, wanted in zip(schedules, expected):
            found = sample(net, [0, 1], schedule=schedule, latents=True)
            assert is_marked(found) and torch.equal(found.cpu(), wanted)
