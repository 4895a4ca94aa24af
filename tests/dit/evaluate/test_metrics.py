"""Errors and the judge's figures held to plain formulas in float64, and to what the papers define."""

import json
import math

import numpy as np
import pytest
import torch

from harmonica_dit.evaluate import Judge, Reference, image_errors, rmse
from harmonica_dit.evaluate import metrics as module
from harmonica_dit.evaluate.metrics import cached_floor, precision_recall
from support.linear_extractor import Linear, images_of

ENOUGH = 300  # samples, here


@pytest.fixture(autouse=True)
def few_samples_are_enough(monkeypatch):
    assert module.MIN_FRECHET == 2000
    monkeypatch.setattr(module, "MIN_FRECHET", ENOUGH)


@pytest.fixture(scope="module")
def reference():
    return Reference.measure(Linear(), images_of(3000, seed=1).mul(0.8).split(700), "")


@pytest.fixture(scope="module")
def judged(reference):
    """A judge that was given everything, and what it was given."""
    images, uncached = images_of(ENOUGH, seed=2), images_of(ENOUGH, seed=3)
    labels = torch.arange(ENOUGH) % 3
    judge = Judge(Linear(), reference)
    for part in torch.arange(ENOUGH).split(70):
        judge.update(images[part], labels[part], uncached=uncached[part], latents=9 * images[part],
                     uncached_latents=9 * uncached[part])
    return judge, images.double(), uncached.double(), labels


def frechet(real, fake):
    """Heusel et al., 2017, equation 6, of two sets of features."""
    values, vectors = np.linalg.eigh(np.cov(real.T))
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    between = np.sqrt(np.linalg.eigvalsh(root @ np.cov(fake.T) @ root).clip(0)).sum()
    return (((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(np.cov(real.T)) + np.trace(np.cov(fake.T))
            - 2 * between)


def test_both_frechet_distances_are_that_of_the_formula(judged):
    judge, images, _, _ = judged
    extractor = Linear().double()
    for found, place in ((judge.frechet_distance, 0), (judge.spatial_frechet_distance, 1)):
        real, fake = (extractor.extract(x)[place].numpy() for x in (images_of(3000, seed=1).mul(0.8).double(), images))
        assert found == pytest.approx(frechet(real, fake), rel=1e-5) and found > 0.01


def test_inception_score_is_that_of_the_formula(judged):
    """Salimans et al., 2016, section 4: the mean over ten parts of mixed samples, here all of one size."""
    judge, images, _, _ = judged
    state = torch.random.get_rng_state()
    found = judge.inception_score
    assert torch.equal(state, torch.random.get_rng_state())
    mixed = torch.randperm(ENOUGH, generator=torch.Generator().manual_seed(0))
    parts = Linear().double().extract(images)[2].softmax(1)[mixed].chunk(10)
    expected = [(p * (p / p.mean(0)).log()).sum(1).mean().exp().item() for p in parts]
    assert found == pytest.approx(sum(expected) / 10, rel=1e-5) and found > 1.1


def test_means_over_images_are_those_of_the_formulas(judged):
    judge, images, uncached, labels = judged
    result, error = judge.result(), (images - uncached).square().flatten(1).mean(1).sqrt()
    assert result["samples"] == ENOUGH
    assert result["error"] == pytest.approx(error.mean().item(), rel=1e-5)
    assert result["latent_error"] == pytest.approx(9 * error.mean().item(), rel=1e-5)
    assert result["psnr"] == pytest.approx((20 * (2 / error).log10()).mean().item(), rel=1e-5)
    assert result["ssim"] is None  # 2×2 pixels
    right = (Linear().extract(images.float())[2].argmax(1) == labels).double().mean().item()
    assert result["label_accuracy"] == right == judge.label_accuracy
    assert result["clip_score"] is None
    json.dumps(result)


def test_precision_and_recall_are_those_of_the_definition(judged, reference):
    """Points on a line, k = 3: a point's radius is the distance to its third neighbour."""
    real = torch.tensor([[0.0], [1.0], [2.0], [4.0], [5.0]])  # radii 4, 3, 2, 3 and 4
    samples = torch.tensor([[-3.9], [0.5], [9.1], [20.0], [21.0]])  # radii 23.9, 19.5, 13, 19.5 and 20.5
    assert precision_recall(real, samples) == (2 / 5, 1)
    assert precision_recall(real, samples + 9.2) == (1 / 5, 1)
    assert precision_recall(samples, real) == (1, 2 / 5)
    assert precision_recall(real, real + 100) == (0, 0)
    judge, images, _, _ = judged
    found = judge.result()
    assert (found["precision"], found["recall"]) == precision_recall(reference.kept, Linear().extract(
        images.float())[0])


def test_samples_without_references_or_an_extractor_have_errors_alone(reference):
    judge, images = Judge(), images_of(4, seed=5)
    judge.update(images, torch.tensor([7, 8, 9, 9]), uncached=images_of(4, seed=6))
    there = {name for name, value in judge.result().items() if value is not None}
    assert there == {"samples", "error", "psnr"} and judge.draws().keys() == {"error", "psnr"}
    judge = Judge(Linear())
    for part in images_of(ENOUGH, seed=7).split(100):
        judge.update(part)
    assert {name for name, value in judge.result().items() if value is not None} == {"samples", "inception_score"}
    with pytest.raises(ValueError, match="reference: .* need the extractor"):
        Judge(None, reference)


def test_too_few_samples_have_no_figures_of_their_distribution(reference):
    judge = Judge(Linear(), reference)
    judge.update(images_of(ENOUGH - 1, seed=8), torch.zeros(ENOUGH - 1, dtype=torch.long))
    there = {name for name, value in judge.result().items() if value is not None}
    assert there == {"samples", "label_accuracy"} == judge.draws().keys() | {"samples"}
    assert judge.frechet_distance is judge.spatial_frechet_distance is judge.inception_score is None


def test_no_more_samples_than_features_have_no_distance(reference, monkeypatch):
    """Of their covariance at least one eigenvalue is 0, whatever the method does."""
    monkeypatch.setattr(module, "MIN_FRECHET", 3)
    judge, images = Judge(Linear(), reference), images_of(5, seed=11)
    judge.update(images[:4])
    assert judge.frechet_distance is judge.spatial_frechet_distance is judge.precision_recall is None
    judge.update(images[4:])
    assert judge.frechet_distance > 0 and judge.spatial_frechet_distance > 0


def test_samples_are_judged_with_clipped_pixels(reference):
    images, labels, judges = torch.linspace(-3, 3, 12).view(3, 1, 2, 2), torch.zeros(3, dtype=torch.long), []
    for shown in (images, images.clamp(-1, 1)):
        judges.append(Judge(Linear(), reference))
        judges[-1].update(shown, labels, uncached=shown)
    for name in ("frechet", "spatial"):
        assert torch.equal(*(getattr(judge, name).fake_features_sum for judge in judges))
    assert torch.equal(*(judge.kept.stack() for judge in judges))


def test_draws_give_the_spread_and_are_the_same_for_every_method(judged, monkeypatch):
    judge, images, _, _ = judged
    monkeypatch.setattr("harmonica_dit.evaluate.bootstrap.RESAMPLES", 3)
    drawn = judge.draws()
    assert drawn.keys() == {"error", "psnr", "latent_error", "label_accuracy", "frechet"}
    torch.testing.assert_close(drawn["latent_error"], 9 * drawn["error"])
    picked = torch.randint(ENOUGH, (ENOUGH,), generator=torch.Generator().manual_seed(0))
    extractor = Linear().double()
    real, fake = (extractor.extract(x)[0].numpy() for x in (images_of(3000, seed=1).mul(0.8).double(), images[picked]))
    assert drawn["frechet"][0].item() == pytest.approx(frechet(real, fake), rel=1e-4)
    assert len(set(drawn["frechet"].tolist())) == 3
    monkeypatch.setattr(module, "KEPT", ENOUGH - 1)
    assert "frechet" not in judge.draws()


def test_image_errors_are_measured_on_clipped_pixels_and_latents_are_not_clipped():
    black, white = torch.full((2, 1, 3, 3), -7.0), torch.ones(2, 1, 3, 3)
    assert rmse(black, white).tolist() == [2, 2] and rmse(black, white, clip=False).tolist() == [8, 8]
    with pytest.raises(ValueError, match=r"images: got shape \(2, 1, 3, 3\), expected .* \(1, 1, 3, 3\)"):
        rmse(black, white[:1])


def test_ssim_and_psnr_of_an_image_are_those_of_the_definition():
    """Wang et al., 2004, equation 13 on the scale [0, 1]: of flat images the structure is 1, the luminance is left."""
    a, b, c1 = 0.5, 0.75, 0.01**2
    flat = [torch.full((1, 3, 16, 16), 2 * value - 1) for value in (a, b)]
    found = image_errors(*flat)
    assert found["ssim"].item() == pytest.approx((2 * a * b + c1) / (a**2 + b**2 + c1), rel=1e-3)  # floats
    assert found["psnr"].item() == pytest.approx(20 * math.log10(1 / 0.25), rel=1e-5)
    pair = torch.cat([flat[0], flat[0]]), torch.cat([flat[0], flat[1] * 9])
    found = image_errors(*pair)
    assert found["ssim"].shape == found["psnr"].shape == found["error"].shape == (2,)
    assert found["ssim"][0].item() == pytest.approx(1) and found["psnr"][0] == math.inf
    assert found["error"].tolist() == [0, 1]
    assert "ssim" not in image_errors(torch.zeros(1, 1, 10, 16), torch.zeros(1, 1, 10, 16))


def test_an_image_that_equals_the_uncached_one_leaves_the_psnr_out():
    judge, images = Judge(), torch.zeros(1, 1, 2, 2)
    judge.update(images, uncached=images + 0.5)
    assert judge.result()["psnr"] == pytest.approx(20 * math.log10(4))
    judge.update(images, uncached=images)
    assert judge.result()["psnr"] is None and judge.result()["error"] == 0.25
    assert judge.draws().keys() == {"error"}


GOOD = torch.zeros(2, 1, 2, 2)
NAN = torch.tensor([0.0, math.nan]).view(2, 1, 1, 1).expand(2, 1, 2, 2)


@pytest.mark.parametrize("error, message, given", [
    (TypeError, "images: got torch.uint8", dict(images=GOOD.byte())),
    (TypeError, r"images: .*\(1, 2, 2\), expected floats \[n, C, H, W\]", dict(images=GOOD[0])),
    (TypeError, "images", dict(images=GOOD[:0])), (TypeError, "images: got list", dict(images=[GOOD])),
    (ValueError, "images: 1 of 2 hold values that are not finite", dict(images=NAN)),
    (ValueError, r"images: their mean is 128 and none is below 0, expected values in \[-1, 1\]",
     dict(images=GOOD + 128)),
    (ValueError, "images: got shape", dict(uncached=torch.zeros(2, 1, 3, 3))),
    (ValueError, "uncached: got 1, expected one for each of 2", dict(uncached=GOOD[:1])),
    (ValueError, "uncached: 1 of 2", dict(uncached=NAN)),
    (ValueError, "latents: .* give both or neither", dict(latents=GOOD)),
    (ValueError, "images: got shape", dict(latents=GOOD, uncached_latents=torch.zeros(2, 4, 2, 2))),
    (ValueError, "uncached_latents: 1 of 2", dict(latents=GOOD, uncached_latents=NAN)),
    (ValueError, "labels: got 0 to 3, the extractor knows 0 to 2", dict(labels=torch.tensor([0, 3]))),
    (ValueError, "labels: got -1 to 0", dict(labels=torch.tensor([0, -1]))),
    (ValueError, "labels: got torch.float32", dict(labels=torch.zeros(2))),
    (ValueError, "labels: .* expected 2 whole", dict(labels=torch.tensor([0]))),
    (ValueError, "labels: got list", dict(labels=[0, 1])),
    (ValueError, "prompts: the CLIP score needs them, and a CLIP", dict(prompts=["a", "b"])),
])
def test_what_cannot_be_judged_is_refused_and_leaves_the_judge_as_it_was(reference, error, message, given):
    judge = Judge(Linear(), reference)
    with pytest.raises(error, match=message):
        judge.update(**dict(images=GOOD) | given)
    assert judge.count == 0 and not judge.values and judge.frechet.fake_features_num_samples == 0
    judge.update(images_of(2, seed=9), torch.tensor([0, 1]))


@pytest.mark.parametrize("second", [
    dict(images=torch.zeros(2, 1, 2, 3)), dict(images=GOOD, labels=torch.tensor([0, 1])), dict(images=GOOD)])
def test_batches_that_differ_in_shape_or_company_are_refused(second):
    judge = Judge()
    judge.update(GOOD, uncached=GOOD)
    with pytest.raises(ValueError, match=r"expected \(\(1, 2, 2\), 'uncached'\) as in the first batch"):
        judge.update(**second)


def test_the_floor_is_what_a_judge_says_and_is_kept(reference, tmp_path):
    held_out = images_of(ENOUGH, seed=10).split(100)
    labelled = [(part, torch.zeros(len(part), dtype=torch.long)) for part in held_out]
    path = tmp_path / "floor.json"
    found = cached_floor(path, Linear(), reference, labelled, "of it")
    judge = Judge(Linear(), reference)
    for part in labelled:
        judge.update(*part)
    assert found == judge.result() and found["samples"] == ENOUGH and found["frechet"] > 0
    assert cached_floor(path, Linear(), reference, (pytest.fail("read again") for _ in [0]), "of it") == found
    assert cached_floor(path, Linear(), reference, labelled[1:] + labelled, "of other data")["samples"] == 500
