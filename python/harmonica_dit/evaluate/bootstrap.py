"""Bootstrap intervals (Efron, 1979), paired: for a number of images every method meets the same draws.

Methods that are compared add the images of the same noise in the same order. Then the difference of two methods' draws
has the spread of their difference, which is far smaller than that of either where both fail on the same images.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .reference import Gaussian, frechet_metric

RESAMPLES = 200


def draws(count: int) -> Iterator[Tensor]:
    """`RESAMPLES` times `count` indices of images [count], drawn with replacement; always the same."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(RESAMPLES):
        yield torch.randint(count, (count,), generator=generator)


def mean_draws(values: Tensor) -> Tensor:
    """Means [RESAMPLES] of values [n], one for each image."""
    return torch.stack([values[drawn].mean() for drawn in draws(len(values))])


def frechet_draws(features: Tensor, real: Gaussian) -> Tensor:
    """Fréchet distances [RESAMPLES] of features [n, F] from those that `real` describes."""
    metric, distances = frechet_metric(features.shape[1], real), []
    for drawn in draws(len(features)):
        metric.reset()
        metric.update(features[drawn], real=False)
        distances.append(metric.compute())
    return torch.stack(distances)


def interval(drawn: Tensor, value: float) -> tuple[float, float]:
    """The interval of 95 % around `value`: it holds the draws [RESAMPLES], moved so that their mean is the value.

    A difference of two methods' draws, and of their values, gives the interval of the difference. Draws of a Fréchet
    distance have to be moved: a draw holds only 63 % of the images, so its distance is too large on average.
    """
    low, high = (drawn - drawn.mean() + value).quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return low, high
