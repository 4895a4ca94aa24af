"""What caching costs: error against the uncached images, label accuracy and Fréchet distance of the samples."""

import math
import os

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from harmonica_dit.files import load_tensors

MIN_FRECHET = 2000  # with fewer samples the features' covariance, and so the distance, means nothing


def rmse(images: Tensor, reference: Tensor, clip: bool = True) -> Tensor:
    """Root mean square error of each image [n], images and reference [n, C, H, W] from the same noise.

    Images are clipped to [-1, 1], as a viewer would do: an error of 2 is black for white. clip=False is for latents.
    """
    if images.shape != reference.shape:
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected the reference's {tuple(reference.shape)}")
    if clip:
        images, reference = images.clamp(-1, 1), reference.clamp(-1, 1)
    return (images - reference).square().flatten(1).mean(1).sqrt()


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of an RMSE on the scale [-1, 1]; infinite for equal images."""
    return 20 * math.log10(2 / error) if error > 0 else math.inf


class Judge:
    """Judges samples with a classifier. `update` takes them batch by batch.

    torchmetrics computes the Fréchet distance (Heusel et al., 2017) between the samples' features and statistics of
    the training images. The features are the classifier's instead of Inception's, so the scale is this project's own.

    Args:
        classifier: has `features(images)`, `head(features)` and `num_features`.
        reference: a safetensors file with the real images' feature `mean` [F], `covariance` [F, F] and, in its
            metadata, their `count`.
    """

    def __init__(self, classifier: nn.Module, reference: str | os.PathLike):
        self.classifier = classifier
        self.frechet = FrechetInceptionDistance(feature=_PassThrough(self.classifier.num_features))
        tensors, metadata = load_tensors(reference)
        mean, covariance, count = tensors["mean"].double(), tensors["covariance"].double(), metadata["count"]
        self.frechet.real_features_sum = mean * count
        self.frechet.real_features_cov_sum = covariance * (count - 1) + count * torch.outer(mean, mean)
        self.frechet.real_features_num_samples = torch.tensor(count)
        self.right = 0

    def update(self, images: Tensor, labels: Tensor) -> None:
        """Adds samples [n, C, H, W] in [-1, 1]. labels: [n], those asked for."""
        self.add(self.features(images), labels)

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """The classifier's features [n, F] of samples [n, C, H, W], clipped to [-1, 1]."""
        return self.classifier.features(images.clamp(-1, 1))

    @torch.inference_mode()
    def add(self, features: Tensor, labels: Tensor) -> None:
        """Adds samples by their features [n, F]."""
        self.right += (self.classifier.head(features).argmax(1) == labels).sum().item()
        self.frechet.update(features, real=False)

    @property
    def count(self) -> int:
        """Number of samples added."""
        return int(self.frechet.fake_features_num_samples)

    @property
    def label_accuracy(self) -> float:
        """Share of the samples to which the classifier gives the label asked for."""
        return self.right / self.count

    @property
    def frechet_distance(self) -> float | None:
        """Fréchet distance to the training images; None below `MIN_FRECHET` samples."""
        return self.frechet.compute().item() if self.count >= MIN_FRECHET else None


class _PassThrough(nn.Module):
    """Stands in for torchmetrics' feature extractor: `Judge` computes the features once, for labels and distance."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features.double()
