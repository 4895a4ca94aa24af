"""Training images from folders: which label each has, and what a model is given of it."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from harmonica_dit.fashion import data
from harmonica_dit.sample.decoding import decode, encode
from harmonica_dit.train.training_images import read_training_images, training_files
from support.pipeline_folders import small_vae


def a_net(channels=3, side=8, classes=3, vae=None):
    return SimpleNamespace(name="small", sample_shape=(channels, side, side), num_classes=classes, vae=vae,
                           parameters=lambda: iter([torch.zeros(1, dtype=torch.bfloat16)]))


def put(folder, **colours):
    """Images of one colour each: name of a class, its images' greys."""
    for name, greys in colours.items():
        (folder / name).mkdir()
        for i, grey in enumerate(greys):
            Image.new("RGB", (20, 16), (grey,) * 3).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("names, classes, labels", [
    (("cat", "ant", "bee"), 3, (2, 0, 1)), (("2", "0", "1"), 3, (2, 0, 1)),
    (("10", "9", "2"), 11, (10, 9, 2))])  # numbers are labels, in whatever order
def test_a_class_is_a_folder(tmp_path, names, classes, labels):
    put(tmp_path, **{names[0]: [200], names[1]: [0, 51], names[2]: [102]})
    images, found = read_training_images(a_net(classes=classes), training_files("small", tmp_path))
    assert images.shape == (4, 3, 8, 8) and images.dtype == torch.bfloat16
    greys = (images.float() + 1).mul(127.5).mean((1, 2, 3)).round().int().tolist()
    a, b, c = labels
    assert sorted(zip(greys, found.tolist())) == [(0, b), (51, b), (102, c), (200, a)]


def test_a_latent_models_images_are_encoded(tmp_path):
    vae = small_vae(scaling_factor=0.5, shift_factor=0.25).eval()
    net = a_net(channels=4, classes=2, vae=vae)
    images, labels = read_training_images(net, training_files("small", put(tmp_path, a=[0, 255, 90], b=[40] * 4)))
    assert images.shape == (7, 4, 8, 8) and labels.tolist() == [0] * 3 + [1] * 4
    with torch.no_grad():
        white = vae.encode(torch.ones(1, 3, 64, 64)).latent_dist.mean
    torch.testing.assert_close(images[1:2].float(), (white - 0.25) * 0.5, rtol=0.01, atol=0.01)
    some = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        again = vae.decode(vae.encode(some).latent_dist.mean).sample
    torch.testing.assert_close(decode(net, encode(net, some)), again)


def test_the_bundled_models_are_its_data_set(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "load", lambda split, folder: (torch.ones(2, 1, 28, 28), [split, folder]))
    for name in ("images-idx3", "labels-idx1"):
        (tmp_path / f"train-{name}-ubyte.gz").touch()
    images, labels = read_training_images(a_net(), training_files("fashion-dit", tmp_path))
    assert images.dtype == torch.bfloat16 and labels == ["train", tmp_path]


@pytest.mark.parametrize("net, message", [
    (a_net(classes=2), "images: got 3 subfolders, .*, expected one for each of the 2 classes of small"),
    (a_net(channels=4), "images: small makes latents; load it with vae="),
    (a_net(channels=1), "images: small makes latents; load it with vae=")])
def test_other_classes_and_models_are_refused(tmp_path, net, message):
    files = training_files("small", put(tmp_path, a=[1], b=[1], c=[1]))
    with pytest.raises(ValueError, match=message):
        read_training_images(net, files)


def test_a_number_that_is_no_label_is_refused(tmp_path):
    with pytest.raises(ValueError, match="images: got a subfolder 3, expected labels from 0 to 2"):
        read_training_images(a_net(), training_files("small", put(tmp_path, **{"3": [1], "0": [1]})))


def test_what_is_no_folder_of_classes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="images: Learning-to-Cache trains on images; give a folder"):
        training_files("small", None)
    with pytest.raises(FileNotFoundError, match="no images"):
        training_files("small", tmp_path)
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"images: .*x.png is in no class; expected a subfolder"):
        training_files("small", tmp_path)
    with pytest.raises(FileNotFoundError, match="name the folder that holds the four idx files"):
        training_files("fashion-dit", tmp_path)
