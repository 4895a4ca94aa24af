"""The bundled classifiers, and what is shipped of the real images in their eyes."""

import json

import pytest
import torch

from harmonica_dit.evaluate import Reference
from harmonica_dit.evaluate.fashion import fashion_floor, fashion_judge, write
from harmonica_dit.evaluate.reference import KEPT, data_checksum
from harmonica_dit.fashion import data
from harmonica_dit.fashion.classifier import JUDGES, floor_of, load_classifier, reference_of, weights_of
from harmonica_dit.files import save_tensors

needs_data = pytest.mark.skipif(not data.FOLDER.exists(), reason="needs Debian's package dataset-fashion-mnist")


@pytest.mark.parametrize("name", JUDGES)
def test_a_bundled_classifier_and_its_files_fit_each_other(name):
    classifier, reference = load_classifier(name), Reference.load(reference_of(name))
    reference.check(classifier)
    images = torch.rand(3, 1, 28, 28) * 2 - 1
    features, spatial, logits = classifier.extract(images)
    assert torch.equal(features, classifier.features(images)) and torch.equal(logits, classifier(images))
    assert features.shape == (3, classifier.num_features) and spatial.shape == (3, 343) and logits.shape == (3, 10)
    assert sum(p.numel() for p in classifier.parameters()) <= 300_000
    for gaussian, size in ((reference.features, classifier.num_features), (reference.spatial, 343)):
        assert gaussian.mean.shape == (size,) and gaussian.covariance.shape == (size, size)
        assert gaussian.count == 60_000 and torch.linalg.eigvalsh(gaussian.covariance).min() > -1e-6
    assert reference.kept.shape == (KEPT, classifier.num_features)
    assert json.loads(weights_of(name).with_suffix(".json").read_text())["test_accuracy"] >= 0.91
    with pytest.raises(ValueError, match=r"images: got shape \(1, 3, 28, 28\)"):
        classifier.extract(torch.zeros(1, 3, 28, 28))


@pytest.mark.parametrize("name, block", [("plain", 1), ("residual", 4)])
def test_spatial_features_are_the_first_seven_channels_of_the_second_blocks_map(name, block):
    classifier, maps = load_classifier(name), []
    classifier.body[block].register_forward_hook(lambda module, inputs, output: maps.append(output))
    found = classifier.extract(torch.rand(2, 1, 28, 28) * 2 - 1)[1].view(2, 7, 7, 7)
    assert torch.equal(found, maps[0][:, :7]) and maps[0].shape[1] > 7


@pytest.mark.parametrize("name", JUDGES)
def test_the_floor_is_shipped_for_both(name):
    floor, accuracy = fashion_floor(name), json.loads(weights_of(name).with_suffix(".json").read_text())
    assert floor["samples"] == 10_000 and floor["label_accuracy"] == accuracy["test_accuracy"]
    assert json.loads(floor_of(name).read_text())["of"]["reference"] == Reference.load(reference_of(name)).data
    assert 0 < floor["frechet"] < 0.1 and 0 < floor["spatial_frechet"] < 0.5
    assert 5 < floor["inception_score"] < 10 and floor["precision"] > 0.8 and floor["recall"] > 0.8


@needs_data
def test_what_is_shipped_is_of_debians_images_and_the_floor_is_what_they_score():
    name = JUDGES[0]
    of = json.loads(floor_of(name).read_text())["of"]
    assert (of["reference"], of["data"]) == tuple(data_checksum(data.files(split)) for split in ("train", "test"))
    judge, floor = fashion_judge(name), fashion_floor(name)
    for images, labels in zip(*(part.split(500) for part in data.load("test"))):
        judge.update(images, labels)
    assert judge.frechet_distance == pytest.approx(floor["frechet"], rel=1e-2)
    assert judge.inception_score == pytest.approx(floor["inception_score"], rel=1e-3)
    assert judge.label_accuracy == pytest.approx(floor["label_accuracy"], abs=2e-4)
    assert write(name) == floor  # nothing is measured anew


def test_a_file_of_another_model_is_refused(tmp_path):
    save_tensors(tmp_path / "other.safetensors", {"weight": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="holds no"):
        load_classifier(path=tmp_path / "other.safetensors")
