"""What methods sample to be calibrated: images from noise that no sampled image has."""

import numpy as np
import torch
from torch import Tensor

from harmonica_dit.flops import is_denoiser
from harmonica_dit.validate import check_whole


def calibration_labels(net, images: int, seed: int) -> Tensor:
    """Labels [images] of the images number FIRST_IMAGE, FIRST_IMAGE + 1, … of a seed, each class as often as the rest.

    Where there are more classes than images, no class comes twice.

    Raises:
        TypeError: net is no denoiser. ValueError: images or seed is out of range; the message names it.
    """
    if not is_denoiser(net):
        raise TypeError(f"net: got {type(net).__name__}, expected a denoiser: images are sampled to calibrate")
    check_whole("images", images, 1)
    check_whole("seed", seed, 0)
    classes = np.random.default_rng((seed, 5)).permutation(net.num_classes)
    return torch.from_numpy(classes[np.arange(images) % net.num_classes])
