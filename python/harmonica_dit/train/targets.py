"""Targets: the images that a forecaster is trained towards, made once from their noise and kept in a file."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from harmonica_dit.files import load_tensors, save_tensors
from harmonica_dit.sample import sample

from .settings import fingerprint


class Target(NamedTuple):
    """How target images are made: by so many steps of a scheduler, on the noise and labels of the training."""

    steps: int
    scheduler: str | None  # None: the trajectory's own

    @property
    def name(self) -> str:
        return f"{self.scheduler or 'own'}-{self.steps}"


def make_targets(net, target: Target, labels: Tensor, *, seed: int, first: int, guidance: float,
                 guidance_channels: int | None, scheduler, batch: int, folder: Path | None,
                 progress: Callable[[int], None]) -> Tensor:
    """The target images [n, C, H, W] of the images number first, first + 1, … of a seed, with labels [n].

    folder: where they are kept, and found the next time; None keeps nothing. A file that is there must have been made
    with the same model, solver, seed, labels and guidance. progress: called with the number of images that are done.

    Raises:
        ValueError: the file is of another model or other labels.
    """
    about = dict(target=target.name, weights=fingerprint(net), seed=seed, first=first, guidance=guidance,
                 labels=labels.tolist())
    path = None if folder is None else folder / f"targets-{target.name}-seed{seed}-{len(labels)}.safetensors"
    if path is not None and path.exists():
        tensors, metadata = load_tensors(path)
        if metadata != about or "images" not in tensors:
            raise ValueError(f"{path}: holds targets of another model, seed, guidance or labels; give another folder, "
                             "or remove it")
        progress(len(labels))
        return tensors["images"]
    images = []
    for start in range(0, len(labels), batch):
        images.append(sample(net, labels[start : start + batch], steps=target.steps, guidance=guidance,
                             guidance_channels=guidance_channels, scheduler=target.scheduler or scheduler, seed=seed,
                             first=first + start, batch=batch).cpu())
        progress(start + len(images[-1]))
    made = torch.cat(images)
    if path is not None:
        save_tensors(path, {"images": made}, about)
    return made
