"""What a feature extractor sees in a set of real images, kept on disk: the side that samples are compared with."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from harmonica_dit.files import load_tensors, save_tensors
from harmonica_dit.validate import describe, is_number, shorten

from .extractors import extractor_checksum

KEPT = 10_000  # features of so many images at most: precision and recall take distances between all pairs


class Gaussian(NamedTuple):
    """mean [F] and covariance [F, F], float64, of the features of `count` images."""

    mean: Tensor
    covariance: Tensor
    count: int


class Kept:
    """A random choice of at most `KEPT` rows of all that are added; all of them, in their order, if no more are.

    (Reservoir sampling: Vitter, 1985, algorithm R. The choice depends on the number of rows alone.)
    """

    def __init__(self):
        self.rows: list[Tensor] = []
        self.seen = 0
        self.generator = np.random.default_rng(0)

    def add(self, rows: Tensor) -> None:
        for row in rows:
            self.seen += 1
            if self.seen <= KEPT:
                self.rows.append(row.clone())  # a view would keep its whole batch in memory
            elif (place := self.generator.integers(self.seen)) < KEPT:
                self.rows[place] = row.clone()

    def stack(self) -> Tensor:
        """The rows [≤ KEPT, F]."""
        return torch.stack(self.rows)


class _Features(nn.Module):
    """Stands in for torchmetrics' feature extractor: images are looked at once, for all metrics."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features.double()


def frechet_metric(num_features: int, real: Gaussian | None = None) -> FrechetInceptionDistance:
    """torchmetrics' Fréchet distance of features [n, F] that are given as they are, from what `real` describes."""
    metric = FrechetInceptionDistance(feature=_Features(num_features), reset_real_features=False)
    if real is not None:
        metric.real_features_sum = real.mean * real.count
        metric.real_features_cov_sum = (real.covariance * (real.count - 1)
                                        + real.count * torch.outer(real.mean, real.mean))
        metric.real_features_num_samples = torch.tensor(real.count)
    return metric


def _gaussian(metric: FrechetInceptionDistance) -> Gaussian:
    count = int(metric.real_features_num_samples)
    mean = metric.real_features_sum / count
    return Gaussian(mean, (metric.real_features_cov_sum - count * torch.outer(mean, mean)) / (count - 1), count)


@dataclass(frozen=True)
class Reference:
    """Statistics of real images in an extractor's eyes.

    Args:
        features, spatial: mean, covariance and count of both kinds of features.
        kept: features [≤ KEPT, F] of a random choice of the images, float16.
        extractor: the extractor's checksum. data: that of the images.
    """

    features: Gaussian
    spatial: Gaussian
    kept: Tensor
    extractor: str
    data: str

    @classmethod
    @torch.inference_mode()
    def measure(cls, extractor: nn.Module, batches: Iterable[Tensor], data: str) -> "Reference":
        """Looks at batches [n, C, H, W] in [-1, 1], one after the other. data: their checksum, see `data_checksum`.

        Raises:
            ValueError: there are fewer than two images.
        """
        pooled, spatial, kept = frechet_metric(extractor.num_features), frechet_metric(extractor.num_spatial), Kept()
        device = next(iter(extractor.state_dict().values())).device
        for images in batches:
            features, at_places, _ = (part.cpu() for part in extractor.extract(images.to(device)))
            pooled.update(features, real=True)
            spatial.update(at_places, real=True)
            kept.add(features.half())
        if kept.seen < 2:
            raise ValueError(f"batches: got {kept.seen} images, expected at least two")
        return cls(_gaussian(pooled), _gaussian(spatial), kept.stack(), extractor_checksum(extractor), data)

    def save(self, path: str | os.PathLike) -> None:
        save_tensors(path, {"mean": self.features.mean, "covariance": self.features.covariance,
                            "spatial_mean": self.spatial.mean, "kept": self.kept,
                            "spatial_covariance": self.spatial.covariance.float()},
                     {"count": self.features.count, "extractor": self.extractor, "data": self.data})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Reference":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: there is no such file, or it holds something else.
        """
        tensors, metadata = load_tensors(path)
        try:
            count, extractor, data = metadata["count"], metadata["extractor"], metadata["data"]
            pooled = Gaussian(tensors["mean"], tensors["covariance"], count)
            spatial = Gaussian(tensors["spatial_mean"], tensors["spatial_covariance"].double(), count)
            found = cls(pooled, spatial, tensors["kept"], extractor, data)
        except KeyError as error:
            raise ValueError(f"{path} is no reference: it lacks {error}") from None
        for one in (pooled, spatial):
            if one.mean.dim() != 1 or one.covariance.shape != 2 * one.mean.shape:
                raise ValueError(f"{path} is no reference: a mean is {describe(one.mean)}, its covariance "
                                 f"{describe(one.covariance)}")
        if not is_number(count) or count < 2 or found.kept.shape[1:] != pooled.mean.shape:
            raise ValueError(f"{path} is no reference: of {shorten(count)} images, it keeps {describe(found.kept)}")
        return found

    def check(self, extractor: nn.Module) -> None:
        """Refuses an extractor of other weights than those that looked at the real images."""
        if (found := extractor_checksum(extractor)) != self.extractor:
            raise ValueError(f"reference: it was made by an extractor with checksum {self.extractor}, this one's is "
                             f"{found}")


def cached_reference(path: str | os.PathLike, extractor: nn.Module, batches: Iterable[Tensor], data: str) -> Reference:
    """The reference at `path` if it is of these images and this extractor; else it is measured and put there.

    `batches` and `data` as in `Reference.measure`; batches are not read where the file is right.
    """
    if Path(path).is_file():
        found = Reference.load(path)
        if (found.extractor, found.data) == (extractor_checksum(extractor), data):
            return found
    measured = Reference.measure(extractor, batches, data)
    measured.save(path)
    return measured


def data_checksum(files: Sequence[str | os.PathLike]) -> str:
    """Of the bytes of files, in the order given."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def image_files(folder: str | os.PathLike) -> list[Path]:
    """The images in a folder and those below it, sorted.

    Raises:
        FileNotFoundError: there are none.
    """
    endings = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in endings)
    if not found:
        raise FileNotFoundError(f"no images ({', '.join(endings)}) in {folder}")
    return found


def read_images(files: Sequence[str | os.PathLike], size: int, batch: int = 64) -> Iterator[Tensor]:
    """Batches [n, 3, size, size] in [-1, 1] of image files: the middle square, resized (bicubic).
    """
    for first in range(0, len(files), batch):
        images = []
        for path in files[first : first + batch]:
            with Image.open(path) as opened:
                side = min(opened.size)
                left, top = ((length - side) // 2 for length in opened.size)
                square = opened.convert("RGB").crop((left, top, left + side, top + side))
            square = square.resize((size, size), Image.Resampling.BICUBIC)
            images.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
        yield torch.stack(images).float() / 127.5 - 1
