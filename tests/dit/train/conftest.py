"""A denoiser small enough to train a router on in a test, and what tests of the trainer share."""

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from harmonica_dit.flops import count_flops
from harmonica_dit.models.dit import DiT
from harmonica_dit.router import Router
from harmonica_dit.sample.trajectory import Trajectory, image_noise
from support.pipeline_folders import random_model, save_pixart, small_vae
from support.plain_dit import PlainDiT
from support.tiny_dit import tiny

TINY = dict(input_size=8, patch_size=4, in_channels=2, hidden_size=16, depth=2, num_heads=2, num_classes=4)


@pytest.fixture(scope="session")
def net():
    return tiny()


@pytest.fixture
def make_router(net):
    """A router with random logits for T steps; `coefficients` gives it random extrapolation."""

    def make(T=5, coefficients=False, learned=False, scale=2.0, **options):
        generator = torch.Generator().manual_seed(1)
        K = len(net.branch_names)
        logits = scale * torch.randn(T, K, generator=generator)
        extrapolation = torch.rand(T, K, generator=generator) if coefficients else None
        return Router(logits, net.branch_names, count_flops(net), tuple(range(T, 0, -1)), extrapolation=extrapolation,
                      learn_extrapolation=learned, threshold=options.pop("threshold", 0.5), **options)

    return make


@pytest.fixture
def make_trajectory(net):
    """Two images' trajectory of T steps, with guidance."""
    return lambda T=5, **options: Trajectory(net, torch.tensor([0, 3]), steps=T, seed=1, **options)


@pytest.fixture
def noise(net):
    return image_noise(1, 0, 2, net.sample_shape)


@pytest.fixture(scope="session")
def pixart(tmp_path_factory):
    return save_pixart(tmp_path_factory.mktemp("models") / "small-pixart")


@pytest.fixture(scope="session")
def dit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small-dit"
    transformer = random_model(DiTTransformer2DModel, dict(sample_size=8, num_embeds_ada_norm=1000))
    DiTPipeline(transformer, small_vae(), DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def nets():
    """One tiny model twice: as the trainer has it and in plain PyTorch. Random weights, so large that every branch
    changes much from step to step, in float64."""
    torch.manual_seed(0)
    net = DiT(**TINY, name="tiny").double().eval()
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p.normal_(0, 2 * p.shape[-1] ** -0.5)
    plain = PlainDiT(**TINY).double().eval().requires_grad_(False)
    plain.load_state_dict(net.state_dict())
    return net, plain
