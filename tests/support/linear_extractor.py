"""An extractor that formulas can follow: all it sees are fixed linear maps of the pixels."""

import torch
from torch import nn


class Linear(nn.Module):
    """Of images [n, 1, 2, 2]: 4 features, 3 spatial features, and logits for 3 labels."""

    name, num_features, num_spatial, num_labels = "linear", 4, 3, 3

    def __init__(self, seed: int = 0):
        super().__init__()
        self.register_buffer("map", torch.randn(4, 10, generator=torch.Generator().manual_seed(seed)))

    def extract(self, images):
        return (images.flatten(1) @ self.map).split((4, 3, 3), dim=1)


def images_of(count: int, seed: int):
    """Random images [count, 1, 2, 2] in [-1, 1]."""
    return torch.rand(count, 1, 2, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
