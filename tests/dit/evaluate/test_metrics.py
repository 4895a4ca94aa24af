"""Error, label accuracy and Fréchet distance held to plain formulas in float64."""

import json
import math

import pytest
import torch

from harmonica_dit.evaluate import Judge, psnr, rmse
from harmonica_dit.evaluate.metrics import MIN_FRECHET
from harmonica_dit.fashion.classifier import JUDGES, load_classifier, reference_of, weights_of
from harmonica_dit.files import load_tensors, save_tensors


class Linear(torch.nn.Module):
    """A classifier whose features are a fixed linear map of the pixels, and whose label is the larger of two."""

    num_features = 4

    def __init__(self):
        super().__init__()
        self.map = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))

    def features(self, images):
        return images.flatten(1) @ self.map

    def head(self, features):
        return features[:, :2]


def write_reference(path, features):
    save_tensors(path, {"mean": features.mean(0), "covariance": features.T.cov()}, {"count": len(features)})


def square_root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T


def test_frechet_distance_is_that_of_the_formula(tmp_path):
    generator = torch.Generator().manual_seed(1)
    classifier = Linear()
    images = torch.rand(MIN_FRECHET, 1, 2, 2, generator=generator) - 0.5
    real = 0.7 * torch.randn(3000, 4, generator=generator, dtype=torch.float64) + 0.2
    write_reference(tmp_path / "reference.safetensors", real)

    judge = Judge(classifier, tmp_path / "reference.safetensors")
    for part in images.split(300):
        judge.update(part, torch.zeros(len(part), dtype=torch.long))

    fake = classifier.features(images).double()
    root = square_root(real.T.cov())
    expected = ((real.mean(0) - fake.mean(0)).square().sum() + real.T.cov().trace() + fake.T.cov().trace()
                - 2 * square_root(root @ fake.T.cov() @ root).trace()).item()
    assert judge.frechet_distance == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_equal_statistics_is_zero(tmp_path):
    classifier = Linear()
    images = torch.rand(MIN_FRECHET, 1, 2, 2, generator=torch.Generator().manual_seed(2))
    write_reference(tmp_path / "reference.safetensors", classifier.features(images).double())
    judge = Judge(classifier, tmp_path / "reference.safetensors")
    judge.update(images, torch.zeros(len(images), dtype=torch.long))
    assert judge.frechet_distance == pytest.approx(0, abs=1e-6)


def test_too_few_samples_have_no_frechet_distance(tmp_path):
    write_reference(tmp_path / "reference.safetensors", torch.randn(10, 4).double())
    judge = Judge(Linear(), tmp_path / "reference.safetensors")
    judge.update(torch.rand(MIN_FRECHET - 1, 1, 2, 2), torch.zeros(MIN_FRECHET - 1, dtype=torch.long))
    assert judge.frechet_distance is None


def test_label_accuracy_counts_what_the_classifier_recognises(tmp_path):
    write_reference(tmp_path / "reference.safetensors", torch.randn(10, 4).double())
    classifier = Linear()
    judge = Judge(classifier, tmp_path / "reference.safetensors")
    images = torch.rand(40, 1, 2, 2) * 2 - 1
    seen = classifier.head(classifier.features(images)).argmax(1)
    judge.update(images[:30], seen[:30])
    judge.update(images[30:], 1 - seen[30:])
    assert (judge.count, judge.label_accuracy) == (40, 0.75)


def test_samples_are_judged_with_clipped_pixels(tmp_path):
    write_reference(tmp_path / "reference.safetensors", torch.randn(10, 4).double())
    images, labels, sums = torch.linspace(-3, 3, 12).view(3, 1, 2, 2), torch.zeros(3, dtype=torch.long), []
    for shown in (images, images.clamp(-1, 1)):
        judge = Judge(Linear(), tmp_path / "reference.safetensors")
        judge.update(shown, labels)
        sums.append(judge.frechet.fake_features_sum)
    assert torch.equal(*sums)


def test_error_is_measured_on_clipped_pixels():
    black, white = torch.full((2, 1, 3, 3), -7.0), torch.ones(2, 1, 3, 3)
    assert rmse(black, white).tolist() == [2, 2]
    assert psnr(2.0) == 0 and psnr(0.2) == pytest.approx(20) and psnr(0) == math.inf
    with pytest.raises(ValueError, match="images"):
        rmse(black, white[:1])


@pytest.mark.parametrize("name", JUDGES)
def test_a_bundled_classifier_and_its_statistics_fit_each_other(name):
    classifier = load_classifier(name)
    tensors, metadata = load_tensors(reference_of(name))
    F = classifier.num_features
    assert classifier.features(torch.zeros(3, 1, 28, 28)).shape == (3, F)
    assert classifier(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    assert sum(p.numel() for p in classifier.parameters()) <= 300_000
    assert tensors["mean"].shape == (F,) and tensors["covariance"].shape == (F, F) and metadata["count"] == 60_000
    assert torch.linalg.eigvalsh(tensors["covariance"]).min() >= 0
    assert json.loads(weights_of(name).with_suffix(".json").read_text())["test_accuracy"] >= 0.91


def test_a_file_of_another_model_is_refused(tmp_path):
    save_tensors(tmp_path / "other.safetensors", {"weight": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="holds no"):
        load_classifier(path=tmp_path / "other.safetensors")
