"""Sampling: the reference's DDIM against its equations, guidance, seeds, and diffusers' schedulers."""

import numpy as np
import pytest
import torch

import harmonica_dit
from harmonica_dit.models import DiT
from harmonica_dit.sample import ReferenceDDIM, Trajectory, image_noise, make_scheduler, sample


def small(out_variance=False, channels=1):
    torch.manual_seed(0)
    net = DiT(8, 4, channels, 16, 2, 2, num_classes=4, learn_sigma=out_variance).eval().requires_grad_(False)
    for p in net.parameters():
        p.normal_(std=0.15)
    return net


def test_timesteps_are_the_references():
    """Evenly spaced over 0..999 inclusive, each rounded: 999 → 946 → 894 → … → 0 at T = 20."""
    scheduler = make_scheduler("ddim", 20)
    assert scheduler.timesteps[:4].tolist() == [999, 946, 894, 841] and scheduler.timesteps[-1] == 0
    assert len(set(scheduler.timesteps.tolist())) == 20


@pytest.mark.parametrize("T", [1, 2, 7, 20, 50, 1000])
def test_ddim_equals_a_float64_transcription(T):
    """x' = √ᾱ'·(x - √(1-ᾱ)·ε)/√ᾱ + √(1-ᾱ')·ε along the list, ending at ᾱ' = 1; no clipping."""
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    times = [999] if T == 1 else [round(i * 999 / (T - 1)) for i in range(T)][::-1]
    scheduler = make_scheduler("ddim", T)
    assert scheduler.timesteps.tolist() == times
    rng = np.random.default_rng(T)
    x = rng.standard_normal((3, 5)) * 4
    ours = torch.from_numpy(x)
    for s, t in enumerate(times):
        eps = np.tanh(x) + t / 1000
        a, b = abar[t], abar[times[s + 1]] if s + 1 < T else 1.0
        x = np.sqrt(b) * (x - np.sqrt(1 - a) * eps) / np.sqrt(a) + np.sqrt(1 - b) * eps
        ours = scheduler.step(torch.tanh(ours) + t / 1000, scheduler.timesteps[s], ours).prev_sample
    np.testing.assert_allclose(ours.numpy(), x, rtol=2e-4)


def test_diffusers_ddim_is_another_sampler():
    """The trap that ReferenceDDIM exists for: diffusers steps by a stride, not to the next timestep."""
    net, labels = small(), torch.arange(4)
    reference, strided = (sample(net, labels, steps=20, scheduler=s) for s in ("ddim", "DDIMScheduler"))
    assert (reference - strided).norm() / reference.norm() > 0.01


@pytest.mark.parametrize("scheduler", ["ddim", "DDIMScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler",
                                       "EulerDiscreteScheduler", "PNDMScheduler", "SASolverScheduler"])
def test_batch_split_does_not_matter(scheduler):
    """A seed gives each image its own noise, at the start and on the way."""
    net, labels = small(), torch.tensor([0, 3, 1, 2, 2, 0, 1])
    whole = sample(net, labels, steps=6, scheduler=scheduler, batch=7, seed=3)
    for batch in (1, 3):
        torch.testing.assert_close(sample(net, labels, steps=6, scheduler=scheduler, batch=batch, seed=3), whole,
                                   rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sample(net, labels[4:], steps=6, scheduler=scheduler, seed=3, first=4), whole[4:],
                               rtol=1e-3, atol=1e-3)
    assert (sample(net, labels, steps=6, scheduler=scheduler, seed=4) - whole).abs().max() > 0.01


def test_a_scheduler_instance_is_copied():
    mine = make_scheduler("DPMSolverMultistepScheduler", 3)
    before = mine.timesteps.clone()
    sample(small(), [0, 1], steps=5, scheduler=mine)
    assert torch.equal(mine.timesteps, before) and isinstance(make_scheduler(ReferenceDDIM(), 5), ReferenceDDIM)


def test_noise_is_each_images_own():
    a = image_noise(1, 0, 1000, (1, 4, 4))
    assert torch.equal(image_noise(1, 10, 5, (1, 4, 4)), a[10:15])
    assert len({tuple(row) for row in a.flatten(1).tolist()}) == 1000
    assert a.mean().abs() < 0.05 and (a.std() - 1).abs() < 0.05
    assert not torch.equal(image_noise(2, 0, 1000, (1, 4, 4)), a)


def test_guidance_channels():
    """Guided on the first c channels; the rest is the conditional output."""
    net = small(out_variance=True, channels=4)
    x, labels = torch.randn(3, 4, 8, 8), torch.tensor([0, 1, 2])
    for c in (None, 3, 8):
        t = Trajectory(net, labels, steps=4, guidance=2.5, guidance_channels=c)
        when = torch.full((3,), t.timesteps[1])
        conditional, unconditional = net(x, when, labels), net(x, when, torch.full((3,), 4))
        expected = unconditional + 2.5 * (conditional - unconditional)
        if c != 8:
            expected[:, 3:] = conditional[:, 3:]
        torch.testing.assert_close(t.predict(x, 1), expected, rtol=1e-4, atol=1e-4)
    plain = Trajectory(net, labels, steps=4, guidance=1.0)
    torch.testing.assert_close(plain.predict(x, 1), net(x, when, labels))


def test_a_fork_goes_its_own_way():
    """Multistep history and random state are the fork's own."""
    net, labels = small(), torch.tensor([0, 1])
    for scheduler in ("DPMSolverMultistepScheduler", "DDPMScheduler"):
        main = Trajectory(net, labels, steps=6, scheduler=scheduler)
        x = main.start(image_noise(0, 0, 2, net.sample_shape))
        for s in range(3):
            x = main.advance(main.predict(x, s), s, x)
        fork, y = main.fork(), x
        for s in range(3, 6):
            y = fork.advance(fork.predict(y, s), s, y)
        for s in range(3, 6):
            x = main.advance(main.predict(x, s), s, x)
        assert torch.equal(x, y)


@pytest.mark.parametrize("options, words", [
    (dict(labels=[4]), "labels: got 4"), (dict(labels=[-1]), "labels: got -1"), (dict(labels=[]), "labels"),
    (dict(labels=[0.5]), "labels"), (dict(labels=[[1]]), "labels"),
    (dict(steps=0), "steps: got 0"), (dict(steps=-3), "steps: got -3"), (dict(steps=1001), "steps"),
    (dict(steps=2.5), "steps"), (dict(batch=0), "batch"), (dict(seed=-1), "seed: got -1"),
    (dict(first=-2), "first: got -2"), (dict(guidance=float("nan")), "guidance"),
    (dict(guidance_channels=0), "guidance_channels"), (dict(scheduler="NoSuch"), "scheduler: got 'NoSuch'"),
    (dict(scheduler="DiTPipeline"), "scheduler"), (dict(scheduler=5), "scheduler: got int"),
    (dict(scheduler="FlowMatchEulerDiscreteScheduler"), "scheduler: FlowMatch"),
    (dict(labels=None), "labels: got None"), (dict(guidance="a"), "guidance: got 'a'"),
    (dict(schedule="x"), "schedule: got str"),
])
def test_bad_input(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        sample(small(), **(dict(labels=[0], steps=3) | options))


def test_bundled_model_is_recognised():
    """Uncached DDIM-20 samples with guidance show the requested class; the shipped classifier says so."""
    from harmonica_dit.models.fashion_classifier import load_classifier

    labels = torch.arange(200) % 10
    images = harmonica_dit.sample(harmonica_dit.load("fashion-dit"), labels, steps=20, guidance=2.0)
    shown = load_classifier()(images.clamp(-1, 1)).argmax(1)
    assert (shown == labels).float().mean() >= 0.85
