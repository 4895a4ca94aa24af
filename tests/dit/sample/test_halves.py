"""Both halves of a guided batch on their way: the same images, and the other half as published code has it."""

import pytest
import torch

from harmonica_dit.models.dit import DiT
from harmonica_dit.sample.trajectory import Trajectory, image_noise


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = DiT(input_size=8, patch_size=4, in_channels=2, hidden_size=16, depth=2, num_heads=2, num_classes=4).eval()
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p.normal_(0, p.shape[-1] ** -0.5)
    return net


LABELS = torch.tensor([0, 3])


def walk(net, **options):
    """All x_s of a trajectory, and all outputs."""
    trajectory = Trajectory(net, LABELS, steps=4, seed=1, **options)
    x = trajectory.start(image_noise(1, 0, 2, net.sample_shape))
    xs, outputs = [x], []
    with torch.no_grad():
        for s in range(4):
            outputs.append(trajectory.predict(xs[-1], s))
            xs.append(trajectory.advance(outputs[-1], s, xs[-1]))
    return torch.stack(xs), torch.stack(outputs)


@pytest.mark.parametrize("scheduler", ["ddim", "DDPMScheduler"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_the_images_are_the_same(net, scheduler, channels):
    options = dict(guidance=1.5, guidance_channels=channels, scheduler=scheduler)
    one, both = walk(net, **options), walk(net, halves="both", **options)
    for a, b in zip(one, both, strict=True):
        assert b.shape[1] == 4 and torch.equal(a, b[:, :2])
    alike = torch.equal(both[0][:, 2:], one[0])
    assert alike == (channels >= 2)  # where all channels of x are guided; DDPM draws the same noise for both


def test_the_other_half_is_that_of_published_code(net):
    """facebookresearch/DiT's forward_with_cfg: both halves of the model's input are the first half of x; the guided
    channels of the output are the same in both, the others each half's own."""
    (xs, outputs), none = walk(net, halves="both", guidance=1.5, guidance_channels=1), torch.full_like(LABELS, 4)
    t = Trajectory(net, LABELS, steps=4).timesteps
    for x, output, time in zip(xs, outputs, t):
        with torch.no_grad():
            with_label, without = (net(x[:2], torch.full((2,), time), y) for y in (LABELS, none))
        guided = without[:, :1] + 1.5 * (with_label[:, :1] - without[:, :1])
        expected = torch.cat([torch.cat([guided, with_label[:, 1:]], 1), torch.cat([guided, without[:, 1:]], 1)])
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_without_guidance_there_is_one(net):
    assert torch.equal(walk(net, halves="both", guidance=1)[0], walk(net, guidance=1)[0])
