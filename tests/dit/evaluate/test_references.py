"""Statistics of real images: streamed, kept on disk, and only of the images and the extractor that they are of."""

import numpy as np
import pytest
import torch
from PIL import Image

from harmonica_dit.evaluate import Judge, Reference, reference
from harmonica_dit.evaluate.reference import Kept, cached_reference, data_checksum, image_files, read_images
from harmonica_dit.files import save_tensors
from support.linear_extractor import Linear, images_of


def test_statistics_are_those_of_all_images_whatever_the_batches(tmp_path):
    images = images_of(50, seed=0)
    features, spatial, _ = (part.double() for part in Linear().extract(images))
    for size in (50, 7):
        Reference.measure(Linear(), images.split(size), "these").save(tmp_path / "reference.safetensors")
        found = Reference.load(tmp_path / "reference.safetensors")
        for gaussian, rows in ((found.features, features), (found.spatial, spatial)):
            torch.testing.assert_close(gaussian.mean, rows.mean(0), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(gaussian.covariance, rows.T.cov(), rtol=1e-5, atol=1e-6)
            assert gaussian.count == 50 and gaussian.covariance.dtype == torch.float64
        assert torch.equal(found.kept, features.half()) and found.data == "these"
    with pytest.raises(ValueError, match="batches: got 1 images"):
        Reference.measure(Linear(), [images[:1]], "")


def test_what_is_kept_is_a_random_choice_of_all(monkeypatch):
    monkeypatch.setattr(reference, "KEPT", 100)
    few, many = Kept(), Kept()
    few.add(torch.arange(100.0)[:, None])
    assert torch.equal(few.stack()[:, 0], torch.arange(100.0))
    for part in torch.arange(1000.0)[:, None].split(64):
        many.add(part)
    chosen = many.stack()[:, 0]
    assert len(chosen) == len(set(chosen.tolist())) == 100
    assert abs(chosen.mean() - 499.5) < 3 * 289 / 10  # uniform: mean 499.5, deviation 289
    assert 0 < (chosen < 100).sum() < 30


def test_a_kept_row_does_not_hold_its_batch():
    kept = Kept()
    kept.add(torch.zeros(50, 3))
    assert kept.rows[0].untyped_storage().nbytes() == 3 * 4


def test_a_reference_is_measured_once_and_anew_for_other_data_or_another_extractor(tmp_path):
    path, images = tmp_path / "cache" / "reference.safetensors", images_of(20, seed=1)
    first = cached_reference(path, Linear(), images.split(9), "a")
    again = cached_reference(path, Linear(), (pytest.fail("read again") for _ in [0]), "a")
    assert torch.equal(first.features.mean, again.features.mean)
    assert cached_reference(path, Linear(), [images[:9]], "b").features.count == 9
    assert cached_reference(path, Linear(seed=1), [images[:7]], "b").features.count == 7
    with pytest.raises(ValueError, match="reference: it was made by an extractor with checksum"):
        Judge(Linear(), path)
    Judge(Linear(seed=1), path)


def test_another_file_is_refused(tmp_path):
    save_tensors(tmp_path / "old.safetensors", {"mean": torch.zeros(4)}, {"count": 3})
    with pytest.raises(ValueError, match="old.safetensors is no reference: it lacks 'extractor'"):
        Reference.load(tmp_path / "old.safetensors")


def test_images_are_read_from_folders_as_middle_squares(tmp_path):
    (tmp_path / "below").mkdir()
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = (255, 0, 127)  # the middle square
    Image.fromarray(wide).save(tmp_path / "below" / "wide.png")
    Image.fromarray(np.full((5, 5), 255, np.uint8)).save(tmp_path / "gray.png")
    (tmp_path / "notes.txt").write_text("no image")
    files = image_files(tmp_path)
    assert [path.name for path in files] == ["wide.png", "gray.png"]
    (batch,) = read_images(files, 4)
    assert batch.shape == (2, 3, 4, 4) and batch.dtype == torch.float32
    torch.testing.assert_close(batch[0], torch.tensor([1.0, -1.0, 127 / 127.5 - 1]).view(3, 1, 1).expand(3, 4, 4))
    assert (batch[1] == 1).all() and [len(part) for part in read_images(files, 4, batch=1)] == [1, 1]
    before = data_checksum(files)
    assert before == data_checksum(files) != data_checksum(files[::-1])
    files[1].write_bytes(files[1].read_bytes() + b"0")
    assert data_checksum(files) != before
    with pytest.raises(FileNotFoundError, match="no images"):
        image_files(tmp_path / "elsewhere")
