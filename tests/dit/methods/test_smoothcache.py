"""SmoothCache: the calibrated errors against hooks on a plain model, and the decisions against tables by hand."""

import pytest
import torch

from harmonica_dit.methods.smoothcache import branch_errors, decide, smoothcache
from harmonica_dit.sample import Trajectory, image_noise
from harmonica_dit.sample.trajectory import FIRST_IMAGE
from support.plain_blocks import denoise_by_blocks, four_blocks

# Errors of one type between step s (row) and the steps s - 1, s - 2, s - 3, in eighths so that all sums are exact.
EIGHTHS = [[0, 0, 0], [1, 0, 0], [2, 3, 0], [1, 2, 2.5], [1, 1, 2], [3, 4, 5], [2, 3.5, 1]]
ERRORS = [[e / 8 for e in row] for row in EIGHTHS]


@pytest.fixture(scope="module")
def net():
    return four_blocks()


@pytest.mark.parametrize("alpha, longest, computed", [
    # Reused while the error since the last computed step is within α; by hand, step by step.
    (0, 3, "1111111"), (1, 3, "1010011"), (2, 3, "1010010"), (3, 3, "1000101"), (3, 1, "1010101"), (9, 3, "1000100"),
    (9, 2, "1001001"), (0.99, 3, "1111111")])
def test_a_type_is_reused_while_its_error_is_within_alpha(alpha, longest, computed):
    found = decide([row[:longest] for row in EIGHTHS], alpha)
    assert "".join(str(int(c)) for c in found) == computed


def test_errors_are_relative_to_the_later_output_and_means_over_the_batch(net):
    """Against the outputs that hooks on the plain model's attentions and feed-forwards see."""
    labels, noise, outputs = torch.tensor([1, 3]), image_noise(3, 0, 2, net.sample_shape), []

    def walk(s, blocks, x, c):
        outputs.append([])
        hooks = [part.register_forward_hook(lambda module, args, o: outputs[-1].append(o.clone()))
                 for block in blocks for part in (block.attn, block.mlp)]
        for block in blocks:
            x = block(x, c)
        for hook in hooks:
            hook.remove()
        return x

    denoise_by_blocks(net, labels, noise, 5, 2.0, walk)
    expected = torch.zeros(5, 2, 8, dtype=torch.float64)
    for s in range(5):
        for j in range(1, min(s, 2) + 1):
            for k, (now, before) in enumerate(zip(outputs[s], outputs[s - j], strict=True)):
                rows = [(a - b).norm(p=1) / a.norm(p=1) for a, b in zip(now, before)]
                expected[s, j - 1, k] = torch.stack(rows).mean()
    found = branch_errors(Trajectory(net, labels, steps=5, guidance=2.0), noise, 2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def by_hand(monkeypatch, attention, feed_forward, seen=None):
    """Errors by hand in place of measured ones, the blocks' about their mean."""
    def errors(trajectory, noise, longest):
        if seen is not None:
            seen.append((trajectory, noise))
        both = torch.tensor([attention, feed_forward], dtype=torch.float64)[:, :, :longest]  # [type, T, longest]
        return torch.stack([both[k % 2] * (1.5 if k < 4 else 0.5) for k in range(8)], -1)

    monkeypatch.setitem(smoothcache.__globals__, "branch_errors", errors)


def test_types_are_decided_one_by_one_on_the_mean_of_their_blocks(net, monkeypatch):
    seen = []
    by_hand(monkeypatch, ERRORS, [[2 * e for e in row] for row in ERRORS], seen)
    made = smoothcache(net, 7, 0.25, images=3, guidance=2.0, seed=5)
    assert made.compute[:, ::2].T.tolist() == [[c == "1" for c in "1010010"]] * 4
    assert made.compute[:, 1::2].T.tolist() == [[c == "1" for c in "1010011"]] * 4  # as with half the α
    assert made.guidance == 2.0 and len(made.timesteps) == 7 and made.origin.startswith("SmoothCache, α = 0.25,")
    assert len({int(trajectory.labels) for trajectory, _ in seen}) == 3
    noises = image_noise(5, FIRST_IMAGE, 3, net.sample_shape)
    assert torch.equal(torch.cat([noise for _, noise in seen]), noises)


def test_a_speedup_takes_the_least_alpha(net, monkeypatch):
    by_hand(monkeypatch, ERRORS, ERRORS)
    speedups = {alpha: smoothcache(net, 7, alpha).speedup for alpha in {e for row in ERRORS for e in row}}
    for speedup in (1.0, 1.3, 1.6, 2.0, 2.2):
        expected = min(alpha for alpha in speedups if speedups[alpha] >= speedup)
        assert smoothcache(net, 7, speedup=speedup).origin.startswith(f"SmoothCache, α = {expected:.4g},")
    with pytest.raises(ValueError, match=r"speedup: got 9, expected at most [\d.]+, which is that of 3 steps reused"):
        smoothcache(net, 7, speedup=9)


@pytest.mark.parametrize("arguments, message", [
    (dict(), "alpha, speedup: give exactly one"), (dict(alpha=-1.0), "alpha: got -1.0"),
    (dict(alpha=0.1, longest=4), "longest: got 4, expected at most 3"), (dict(alpha=0.1, longest=0), "longest: got 0"),
    (dict(alpha=0.1, images=0), "images: got 0"), (dict(alpha=0.1, seed=-1), "seed: got -1"),
    (dict(speedup=0.5), "speedup: got 0.5"), (dict(alpha=0.1, steps=0), "steps: got 0")])
def test_what_is_out_of_range_is_refused(net, arguments, message):
    with pytest.raises(ValueError, match=message):
        smoothcache(net, **dict(steps=7) | arguments)


def test_only_a_denoiser_can_be_calibrated(net):
    with pytest.raises(TypeError, match="net: got DiTAdapterLike, expected a denoiser"):
        smoothcache(type("DiTAdapterLike", (), {})(), 7, 0.1)
