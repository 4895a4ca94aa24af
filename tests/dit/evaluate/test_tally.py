"""A method's row: errors to both references, intervals of the values and of differences; and who judges."""

import pytest
import torch

import harmonica_dit
from harmonica_dit.evaluate import Judge, Method
from harmonica_dit.evaluate.catalogue import make_methods
from harmonica_dit.evaluate.fashion import fashion_judge
from harmonica_dit.evaluate.judging import judge_of
from harmonica_dit.evaluate.tally import Made, Tally, add_intervals

METHOD = Method("a method", "methods", 4)


@pytest.fixture(scope="module")
def fashion():
    return harmonica_dit.load("fashion-dit")



def test_errors_to_both_references():
    uncached, accurate, own = (Made(t, t) for t in torch.rand(3, 5, 1, 4, 4))
    tally = Tally(Judge(), latents=True)
    for part in (slice(0, 3), slice(3, 5)):
        each = [Made(of.samples[part], of.images[part]) for of in (own, uncached, accurate)]
        tally.update(each[0], torch.zeros(len(each[0].images), dtype=torch.long), *each[1:])
    row = tally.row(METHOD, 8, None, 3)
    for column, reference in (("error", uncached), ("accurate_error", accurate), ("latent_error", uncached),
                              ("accurate_latent_error", accurate)):
        expected = (own.images - reference.images).square().flatten(1).mean(1).sqrt().mean().item()
        assert row[column] == pytest.approx(expected, rel=1e-5)
    assert (row["name"], row["seed"], row["samples"], row["flops_speedup"]) == ("a method", 3, 5, 2)


def test_latents_that_nothing_decodes_have_one_error():
    tally, own, other = Tally(None, latents=True), torch.full((2, 4, 3, 3), 5.0), torch.full((2, 4, 3, 3), 2.0)
    tally.update(Made(own, None), torch.tensor([0, 1]), Made(other, None), Made(own, None))
    row = tally.row(METHOD, 4, None, 0)
    assert row["latent_error"] == 3 and row["accurate_latent_error"] == 0 and "error" not in row


def test_intervals_hold_the_value_and_those_of_a_difference_are_narrower(monkeypatch):
    """The second method's samples are the first one's, a little noisier: their distances differ by little."""
    monkeypatch.setattr("harmonica_dit.evaluate.metrics.MIN_FRECHET", 50)
    monkeypatch.setattr("harmonica_dit.evaluate.metrics.precision_recall", lambda *_: None)  # which takes seconds
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(800, 1, 28, 28, generator=draw) * 2 - 1
    noisy = (images + 0.2 * torch.randn(images.shape, generator=draw)).clamp(-1, 1)
    tallies = [Tally(fashion_judge()) for _ in range(2)]
    for tally, own in zip(tallies, (images, noisy)):
        tally.update(Made(own, own), torch.zeros(800, dtype=torch.long), Made(images, images))
    rows = [tally.row(METHOD, 4, None, 0) for tally in tallies]
    add_intervals(rows, tallies)
    assert rows[0]["error_low"] == rows[0]["error_high"] == 0 and rows[0]["frechet_above"] == 0
    assert rows[1]["error_low"] < rows[1]["error"] < rows[1]["error_high"] < 1.1 * rows[1]["error_low"]
    low, above, high = (rows[1][f"frechet_above{end}"] for end in ("_low", "", "_high"))
    assert above == pytest.approx(rows[1]["frechet"] - rows[0]["frechet"]) and low < above < high
    spread = tallies[1].draws()["frechet"].std()
    assert high - low < 3 * spread  # of the distance itself it would be 3.9 of them


def test_who_judges(fashion, tmp_path):
    assert judge_of(fashion) is fashion_judge
    other = harmonica_dit.load("fashion-dit")
    other.name = "mine"
    assert judge_of(other) is None
    with pytest.raises(ValueError, match="real: real images are looked at by Inception"):
        judge_of(other, real=tmp_path)
    with pytest.raises(ValueError, match="clip: mine has no prompts"):
        judge_of(other, clip=tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        judge_of(other, inception=tmp_path / "nowhere.pth")


def test_calibrated_methods_take_the_comparisons_guidance_and_scheduler(fashion):
    (method,) = make_methods(fashion, ["smoothcache"], [1.3], 3, guidance=3.0, scheduler="DPMSolverMultistepScheduler")
    (own,) = make_methods(fashion, ["smoothcache"], [1.3], 3)
    assert (method.schedule.guidance, own.schedule.guidance) == (3.0, 1.5)
    assert method.schedule.timesteps != own.schedule.timesteps
