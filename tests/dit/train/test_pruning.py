"""Pruning: the importance by hand in float64, that what is removed is gone and nothing else, and the width."""

import numpy as np
import pytest
import torch

from harmonica_dit.evaluate import Method, compare
from harmonica_dit.flops import count_flops
from harmonica_dit.methods import fora
from harmonica_dit.models import DiT, quantize
from harmonica_dit.sample import sample
from harmonica_dit.train import prune, pruning
from support.plain_dit import PlainDiT

SIZES = dict(input_size=8, patch_size=2, in_channels=2, hidden_size=24, depth=2, num_heads=4, num_classes=4)
SEED, H, M, D = 3, 4, 96, 24
IMAGES = torch.rand(5, 2, 8, 8, generator=torch.Generator().manual_seed(9)).double() * 2 - 1
LABELS = torch.tensor([0, 1, 2, 3, 0])


@pytest.fixture
def nets():
    """One tiny model twice, with random weights in float64: as it is pruned and in plain PyTorch."""
    torch.manual_seed(0)
    net = DiT(**SIZES, name="tiny").double().eval().requires_grad_(False)
    for p in net.parameters():
        p.normal_(0, 0.3)
    plain = PlainDiT(**SIZES).double().eval()
    plain.load_state_dict(net.state_dict())
    return net, plain


def by_hand(plain, timesteps, threshold):
    """Importance of heads and channels of each block, and how many timesteps it is of."""
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000).double(), 0)
    noise = torch.stack([torch.from_numpy(np.random.default_rng((SEED, 2**32 + i)).standard_normal(
        (2, 8, 8), np.float32)) for i in range(5)]).double()
    plain.zero_grad()
    largest, taken = 0.0, 0
    for t in np.linspace(0, 999, timesteps).round().astype(int):
        x = abar[t] ** 0.5 * IMAGES + (1 - abar[t]) ** 0.5 * noise
        loss = (plain(x, torch.full((5,), t), LABELS)[:, :2] - noise).square().mean()
        largest = max(largest, loss.item())
        if loss < threshold * largest:
            break
        loss.backward()  # adds to the gradients
        taken += 1
    found = []
    for block in plain.blocks:
        qkv, proj, fc1, fc2 = ((part.weight * part.weight.grad).abs() for part in (
            block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2))
        heads = [sum(qkv[which * D + 6 * h :][:6].sum() for which in range(3)) + proj[:, 6 * h :][:, :6].sum()
                 for h in range(H)]
        found.append((torch.stack(heads), torch.stack([fc1[j].sum() + fc2[:, j].sum() for j in range(M)])))
    return found, taken


@pytest.mark.parametrize("threshold, taken", [(0.0, 5), (0.75, None)])
def test_importance_is_the_papers(nets, threshold, taken):
    net, plain = nets
    expected, number = by_hand(plain, 5, threshold)
    assert number == taken or taken is None and 0 < number < 5
    found = pruning.importance(net, IMAGES, LABELS, 5, threshold, SEED)
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-12)  # diffusers keeps ᾱ in float32


def test_what_is_removed_is_the_least_and_nothing_else_changes(nets):
    net, plain = nets
    importance, _ = by_hand(plain, 5, 0.0)
    before = {name: p.clone() for name, p in net.named_parameters()}
    pruned = prune(net, 1.6, IMAGES, LABELS, timesteps=5, threshold=0.0, seed=SEED)
    heads, channels = pruned.blocks[0].attn.heads, pruned.blocks[0].mlp.fc1.out_features
    assert 1 < heads < H and 1 < channels < M
    with torch.no_grad():  # what is removed, set to zero in the whole model
        for block, (of_heads, of_channels) in zip(plain.blocks, importance, strict=True):
            for h in of_heads.argsort()[: H - heads].tolist():
                block.attn.proj.weight[:, 6 * h : 6 * h + 6] = 0
            for j in of_channels.argsort()[: M - channels].tolist():
                block.mlp.fc2.weight[:, j] = 0
        x, t = torch.randn(3, 2, 8, 8).double(), torch.tensor([900, 500, 10])
        y = torch.tensor([0, 1, 4])
        torch.testing.assert_close(pruned(x, t, y), plain(x, t, y))
        assert (net(x, t, y) - pruned(x, t, y)).abs().max() > 0.01
    assert all(torch.equal(p, before[name]) and not p.requires_grad for name, p in net.named_parameters())
    assert not any(p.requires_grad for p in pruned.parameters())


def test_the_first_batch_of_many_images_makes_the_importance(nets):
    more = torch.cat([IMAGES, 9 * IMAGES]), LABELS.repeat(2)
    first, whole, other = (prune(nets[0], 1.6, *data, timesteps=3, batch=batch).blocks[0].mlp.fc1.weight
                           for data, batch in (((IMAGES, LABELS), 128), (more, 5), (more, 10)))
    assert torch.equal(first, whole) and not torch.equal(first, other)


@pytest.mark.parametrize("speedup, expected", [(1.0, 4), (1.3, 3), (1.5, 3), (2.5, 1)])
def test_the_speedup_is_met_by_equal_shares_of_heads_and_channels(nets, speedup, expected):
    net, flops = nets[0], count_flops(nets[0])
    pruned = prune(net, speedup, IMAGES, LABELS, timesteps=1)
    heads, channels = pruned.blocks[1].attn.heads, pruned.blocks[1].mlp.fc1.out_features
    assert f"{heads} heads and {channels} channels" in pruned.name
    assert count_flops(pruned).total * speedup <= flops.total * (1 + 1e-9)
    with_one_more = count_flops(pruned).total + sum(flops.branches[1::2]) / M
    assert with_one_more * speedup > flops.total and heads == expected and abs(heads / H - channels / M) < 0.2
    if speedup == 1.0:
        x, t = torch.randn(1, 2, 8, 8).double(), torch.tensor([500])
        assert torch.equal(net(x, t, LABELS[:1]), pruned(x, t, LABELS[:1]))


def test_a_pruned_model_is_a_model_like_any_other(nets):
    """From samples of its own; uncached, on a schedule, compared with a schedule, quantized, and pruned once more."""
    net = nets[0].float()
    pruned = prune(net, 1.4, timesteps=3)
    schedule = fora(pruned, 6, 2)
    assert schedule.speedup > 1.4
    [plain, cached] = compare(pruned, [Method("FORA", "FORA", 6, schedule)], [0, 3], steps=6)
    assert plain["latent_error"] == 0 < cached["latent_error"]
    again = prune(pruned, 1.2, IMAGES.float(), timesteps=3)
    for model in (again, quantize(again, "int8")):
        assert sample(model, [0, 3], steps=6, schedule=fora(model, 6, 2)).isfinite().all()


def test_retraining_brings_the_loss_down(nets):
    images, t = IMAGES.repeat(4, 1, 1, 1), torch.arange(20) * 50
    noise = torch.randn(20, 2, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    losses = [pruning.diffusion_loss(prune(nets[0], 1.6, images, LABELS.repeat(4), timesteps=2, lr=1e-2, batch=8,
                                           iterations=iterations, progress=False), images, LABELS.repeat(4), t, noise)
              for iterations in (0, 30)]
    assert losses[1] < 0.8 * losses[0]
    with pytest.raises(ValueError, match="iterations: a retraining needs images"):
        prune(nets[0], 1.6, iterations=3)


@pytest.mark.parametrize("error, message, arguments", [
    (ValueError, "speedup: got 0.9", dict(speedup=0.9)),
    (ValueError, "speedup: got 90, expected at most .*, with one head", dict(speedup=90)),
    (TypeError, r"images: got .*, expected floating-point images \[N, 2, 8, 8\]", dict(images=IMAGES[:, :1])),
    (ValueError, "labels: got 2, expected one for each of the 5", dict(labels=LABELS[:2])),
    (ValueError, "timesteps: got 1001", dict(timesteps=1001)),
    (ValueError, "threshold: got -1", dict(threshold=-1)),
    (ValueError, "batch: got 0", dict(batch=0)),
    (TypeError, "net: got Linear, expected a DiT", dict(net=torch.nn.Linear(2, 2)))])
def test_wrong_arguments_are_refused_by_name(nets, error, message, arguments):
    with pytest.raises(error, match=message):
        prune(**dict(net=nets[0], speedup=1.5, images=IMAGES, labels=LABELS) | arguments)
    pytest.importorskip("torchao")
    with pytest.raises(TypeError, match="net: got DiT, expected a DiT whose blocks have plain linear layers"):
        prune(quantize(nets[0].float(), "int8"), 1.5)
