"""First-block caching: decisions and images against a walk through the blocks, and what it says that it computed."""

from dataclasses import replace

import pytest
import torch

import harmonica_kernels as hk
from harmonica_dit.adaptive import AdaptiveSchedule
from harmonica_dit.costs import Seconds
from harmonica_dit.evaluate import Method, compare
from harmonica_dit.evaluate.report import write
from harmonica_dit.evaluate.samples import Samples
from harmonica_dit.flops import Flops, count_flops
from harmonica_dit.methods import first_block
from harmonica_dit.methods.calibration import calibration_labels
from harmonica_dit.models import DiT
from harmonica_dit.sample import denoise, image_noise, sample
from harmonica_dit.sample.trajectory import FIRST_IMAGE
from support.plain_blocks import denoise_by_blocks, four_blocks

T, LABELS = 8, torch.tensor([0, 2, 3])


@pytest.fixture(scope="module")
def net():
    return four_blocks()


class Walk:
    """The method in plain torch: the first block's residual against that of the last computed step (FBCache)."""

    def __init__(self, threshold):
        self.threshold, self.computed, self.changes = threshold, [], []

    def __call__(self, s, blocks, x, c):
        first = blocks[0](x, c)
        residual = first - x
        if s:
            self.changes.append(((residual - self.residual).abs().mean() / self.residual.abs().mean()).item())
        self.computed.append(s == 0 or self.changes[-1] > self.threshold)
        if self.computed[-1]:
            after = first
            for block in blocks[1:]:
                after = block(after, c)
            self.residual, self.rest = residual, after - first
        return first + self.rest


def some_threshold(net):
    """One that some steps' changes lie above and some below, none near it."""
    walk = Walk(0.0)
    denoise_by_blocks(net, LABELS, image_noise(0, 0, 3, net.sample_shape), T, 1.5, walk)
    changes = sorted(walk.changes)
    return (changes[3] + changes[4]) / 2


def test_the_first_blocks_change_decides(net):
    walk = Walk(some_threshold(net))
    expected = denoise_by_blocks(net, LABELS, image_noise(0, 0, 3, net.sample_shape), T, 1.5, walk)
    schedule = first_block(net, T, walk.threshold)
    found = sample(net, LABELS, schedule=schedule, guidance=1.5)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert 1 < sum(walk.computed) < T
    assert schedule.compute[:, 2:].bool().all(1).tolist() == walk.computed and (schedule.compute[:, :2] == 1).all()
    assert schedule.compute.unique().tolist() == [0, 1] and schedule.runs == (2, 6)


def test_what_was_computed_is_weighed_by_the_batches():
    """By hand: of 3 steps a batch of 2 computes the second, one of 1 the third; FLOPs of 8 + 2 a step."""
    made = AdaptiveSchedule(3, ("a", "b", "c"), Flops((1.0, 1.0, 6.0), 2.0), 2, 0.5)
    far, near, zero = torch.full((2, 1, 1), 2.0), torch.full((2, 1, 1), 1.5), torch.zeros(1, 1, 1)
    with pytest.raises(RuntimeError, match="no trajectory has ended yet"):
        _ = made.speedup
    made.new_cache()
    assert made(far, torch.ones(2, 1, 1)) and not made(near, torch.ones(2, 1, 1))  # above the threshold, not at it
    made.new_cache()
    assert not made(zero, zero) and made(far[:1], zero)
    made.new_cache()
    made(far, zero)  # an interrupted trajectory does not count
    assert made.compute.tolist() == [[1, 1, 1], [1, 1, pytest.approx(2 / 3)], [1, 1, pytest.approx(1 / 3)]]
    assert made.cur == pytest.approx(1 / 9) and made.speedup == pytest.approx(30 / (6 + 6 + 6 + 6))
    seconds = Seconds((1.0, 2.0, 3.0), 1.0, 0.1, 0.5, 0.5, 8.0)  # a third and two thirds of two steps are mixed
    assert made.speedup_by(seconds) == pytest.approx(3 * 8 / (3 * (1 + 1 + 2) + 2 * 3 + 0.5))
    with pytest.raises(RuntimeError, match="no trajectory has ended yet"):
        _ = replace(made, ran=[]).compute


def test_a_comparison_says_what_its_own_samples_took(net, tmp_path):
    """Also where they were made before, and by others than this object; the batch is part of what decides."""
    schedule = first_block(net, T, some_threshold(net))
    schedule.new_cache()
    for _ in range(T - 1):
        schedule(torch.ones(9, 1, 1), torch.zeros(9, 1, 1))  # all computed, before the comparison
    alone = first_block(net, T, schedule.threshold)
    sample(net, LABELS, schedule=alone, guidance=1.5, batch=2)
    for _ in range(2):
        method = Method("first", "first block", T, replace(schedule, ran=[*schedule.ran]))
        row = compare(net, [method], LABELS, steps=T, folder=tmp_path, batch=2)[1]
        assert row["flops_speedup"] == alone.speedup > 1 and row["cur"] == alone.cur > 0 and row["error"] > 0
        assert method.schedule.ran == schedule.ran
    options = dict(guidance=1.5, folder=tmp_path)
    digests = {Samples(net, LABELS, batch=batch, **options).digest(replace(method, schedule=replace(
        schedule, threshold=threshold)), 0) for batch in (2, 3) for threshold in (0.1, 0.2)}
    assert len(digests) == 4
    rows = compare(net, [method], LABELS, steps=T, folder=tmp_path / "samples")
    write(tmp_path, net, [method], LABELS, rows, "title", steps=T, guidance=1.5, scheduler="ddim", batch=64)
    assert (tmp_path / "schedules.png").exists()


def test_a_speedup_takes_the_least_threshold_on_calibration_images(net, monkeypatch):
    numbers = set()
    monkeypatch.setitem(first_block.__globals__, "sample", lambda *args, **kwargs: numbers.add(
        kwargs["first"]) or sample(*args, **kwargs))
    made = first_block(net, T, speedup=1.2, images=4, guidance=1.5)
    assert numbers == {FIRST_IMAGE}
    speedups = []
    for threshold in (made.threshold, made.threshold - 1 / 256):  # the least but for the bisection's last half
        trial = first_block(net, T, threshold)
        sample(net, calibration_labels(net, 4, 0), schedule=trial, guidance=1.5, first=FIRST_IMAGE)
        speedups.append(trial.speedup)
    assert speedups[0] >= 1.2 > speedups[1] and made.threshold < 2
    with pytest.raises(RuntimeError, match="no trajectory has ended"):
        _ = made.speedup  # calibration does not count
    alone = count_flops(net).speedup(torch.tensor([[1.0] * 8] + [[1.0] * 2 + [0.0] * 6] * (T - 1)))
    assert first_block(net, T, speedup=alone, images=1, guidance=1.5).threshold > made.threshold
    with pytest.raises(ValueError, match=f"speedup: got 9, expected at most {alone:.4g}, which is that of the first"):
        first_block(net, T, speedup=9)


def test_other_executors(net):
    """The captured one runs alike on the CPU; the gated one needs tables and says what to use."""
    schedule = first_block(net, T, some_threshold(net))
    one, other = (sample(net, LABELS, schedule=schedule, executor=executor) for executor in ("eager", "captured"))
    assert torch.equal(one, other)
    with pytest.raises(ValueError, match='mode="gated", rule="change"'):
        sample(net, LABELS, schedule=schedule, executor=hk.compile(denoise, mode="gated"))


@pytest.mark.parametrize("arguments, message", [
    (dict(), "threshold, speedup: give exactly one"), (dict(threshold=-0.1), "threshold: got -0.1"),
    (dict(threshold="1"), "threshold: got '1'"), (dict(speedup=0.5), "speedup: got 0.5"),
    (dict(threshold=0.1, steps=0), "steps: got 0"), (dict(speedup=1.1, images=0), "images: got 0")])
def test_what_is_out_of_range_is_refused(net, arguments, message):
    with pytest.raises(ValueError, match=message):
        first_block(net, **dict(steps=T) | arguments)


def test_another_model_and_another_number_of_steps_are_refused(net):
    with pytest.raises(ValueError, match="first: got 2, expected fewer than all 2 branches"):
        first_block(DiT(8, 4, 1, 16, 1, 2, num_classes=4), T, 0.1)
    schedule = first_block(net, T, 0.1)
    with pytest.raises(ValueError, match="schedule: for 8 steps, the trajectory has 5"):
        sample(net, LABELS, steps=5, schedule=schedule)
    with pytest.raises(ValueError, match="schedule: for 8 branches"):
        sample(DiT(8, 4, 1, 16, 3, 2, num_classes=4), LABELS, schedule=schedule)
