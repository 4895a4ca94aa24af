"""The device-gated executor on the transformers of diffusers' DiT and PixArt pipelines."""

from dataclasses import replace

import pytest
import torch

import harmonica_dit
import harmonica_kernels as hk
from bench.problems import random_schedule
from harmonica_dit.flops import count_flops
from harmonica_dit.methods import fora, trunk_forecast
from harmonica_dit.pipelines.denoiser import PipelineDenoiser
from harmonica_dit.pipelines.prompts import Prompts
from harmonica_dit.sample import Trajectory, denoise, image_noise
from support.graph_stand_in import Built
from support.many_pipes import PIPES
from support.pipes import make_pipe

KINDS = ("dit", "alpha", "alpha-1024", "sigma")
STEPS = 5


def denoiser(kind: str) -> PipelineDenoiser:
    """With two prompts of other lengths, where it is of text."""
    pipe, prompts = make_pipe(kind), None
    if kind != "dit":
        mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
        prompts = Prompts(("a cat", "dogs"), kind, torch.randn(3, 5, 20), mask)
    size = 64 if kind == "alpha-1024" else None  # in place of 1024 pixels
    return PipelineDenoiser(pipe.transformer, "ddim", name=kind, guidance=3.0, prompts=prompts, image_size=size)


def schedules(net):
    yield random_schedule(net.branch_names, count_flops(net), STEPS, 0.5)
    yield fora(net, STEPS, 2, 1)
    yield trunk_forecast(net, STEPS, every=2)


def both(executor, net, labels, schedule):
    noise = image_noise(0, 0, len(labels), net.sample_shape)
    with torch.no_grad():
        return [run(Trajectory(net, torch.tensor(labels), steps=STEPS), noise, schedule) for run in (executor, denoise)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_gated_trajectory_is_the_eager_one(kind, monkeypatch):
    net, executor = denoiser(kind), Built(monkeypatch).executor
    for schedule in schedules(net):
        found, expected = both(executor, net, [1, 0], schedule)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
        assert executor.reused.float().mean().item() == pytest.approx(schedule.cur)


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_serves_every_label(kind, monkeypatch):
    """Of a text model labels are prompts, whose states, keys and values the graph makes anew."""
    net, executor = denoiser(kind), Built(monkeypatch).executor
    schedule, images = next(schedules(net)), []
    for labels in ([0], [1]):
        found, expected = both(executor, net, labels, schedule)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
        images.append(found)
    assert executor.graphs == 1 and not torch.allclose(*images, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_learned_forecaster_adds_to_the_conditions(kind, monkeypatch):
    net, executor = denoiser(kind), Built(monkeypatch).executor
    even = trunk_forecast(net, STEPS, every=2)
    learned = replace(even.forecaster, condition=torch.randn(STEPS, net.width), rule=None)
    for schedule in (even, replace(even, forecaster=learned)):
        found, expected = both(executor, net, [1], schedule)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert executor.graphs == 1


def test_a_model_without_parts_is_refused():
    net = harmonica_dit.load(PIPES["flux"].pipe(), **PIPES["flux"].to_train_on())
    with pytest.raises(RuntimeError, match="run by its pipeline's loop"):
        both(hk.compile(denoise, mode="gated"), net, [0], None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind):
    """As it is on the CPU. This has not run yet."""
    net, executor = denoiser(kind).to("cuda"), hk.compile(denoise, mode="gated")
    for schedule in schedules(net):
        noise, labels = image_noise(0, 0, 2, net.sample_shape).cuda(), torch.tensor([1, 0], device="cuda")
        with torch.no_grad():
            found, expected = (run(Trajectory(net, labels, steps=STEPS), noise, schedule)
                               for run in (executor, denoise))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * expected.abs().max().item())
