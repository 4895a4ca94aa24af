"""Which judge a model's samples have: the bundled model its classifier, others what its user has weights of."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from harmonica_dit.models import VAE_FACTOR
from harmonica_dit.sample.decoding import vae_of

from .extractors import Inception, load_clip
from .fashion import fashion_floor, fashion_judge
from .metrics import Judge
from .reference import cached_reference, data_checksum, image_files, read_images


def judge_of(net, *, inception: str | os.PathLike | None = None, real: str | os.PathLike | None = None,
             clip: str | os.PathLike | None = None,
             kept: str | os.PathLike | None = None) -> Callable[[], Judge] | None:
    """Makes a judge for each method of a comparison; None if nothing is there to judge by.

    Args:
        net: a denoiser.
        inception: file of Inception's weights, see `Inception`. real: folder of real images, whose statistics in
            Inception's eyes are in the file `kept`, or are put there.
        clip: folder of a CLIP, for a model with prompts.

    Raises:
        ValueError: real or kept is given without Inception, or a CLIP for a model without prompts.
        OSError: a file or folder is not there.
    """
    if real is not None and (inception is None or kept is None):
        raise ValueError("real: real images are looked at by Inception; give its weights, and a file for what it sees")
    texts = getattr(net, "prompts", None)
    if clip is not None and texts is None:
        raise ValueError(f"clip: {net.name} has no prompts to compare its images with")
    if inception is None and clip is None:
        return fashion_judge if net.name == "fashion-dit" else None
    extractor = None if inception is None else Inception(inception).eval().requires_grad_(False)
    reference = None
    if real is not None:
        files = image_files(real)
        size = net.sample_shape[-1] * (1 if vae_of(net) is None else VAE_FACTOR)
        reference = cached_reference(Path(kept), extractor, read_images(files, size), data_checksum(files))
    return partial(Judge, extractor, reference, None if clip is None else load_clip(clip))


def judged_floor(judge: Callable[[], Judge] | None) -> dict[str, float | None] | None:
    """What held-out real images score before a judge of `judge_of`; None for others than the bundled model's."""
    return fashion_floor() if judge is fashion_judge else None
