"""Targets: the images that a forecaster is trained towards, made once from their noise and kept on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from harmonica_dit import ranks
from harmonica_dit.files import load_tensors, remove_leftovers, save_tensors
from harmonica_dit.sample import sample

from .checkpoint import check_like

PART = 40  # images a file


class Target(NamedTuple):
    """How target images are made: by so many steps of a scheduler, on the noise and labels of the training."""

    steps: int
    scheduler: str | None  # None: the trajectory's own

    @property
    def name(self) -> str:
        return f"{self.scheduler or 'own'}-{self.steps}"


def make_targets(net, target: Target, labels: Tensor, *, seed: int, first: int, guidance: float,
                 guidance_channels: int | None, scheduler, batch: int, about: dict, folder: Path | None,
                 progress: Callable[[int], None]) -> Tensor:
    """The target images [n, C, H, W] of the images number first, first + 1, … of a seed, with labels [n], on the CPU.

    Each rank makes, or reads, every so many-th part, and hands it to the others.

    folder: where they are kept, part by part, and found the next time; None keeps nothing. about: what else decides
    them; a part that is there must have been made with the same. batch: images at a time. progress: called with the
    number of images done.

    Raises:
        ValueError: a part that is there is of other targets, or damaged; the message names it.
    """
    place = None if folder is None else folder / f"targets-{target.name}-seed{seed}"
    if place is not None:
        ranks.on_main(remove_leftovers, place)

    def part(start: int) -> Tensor:
        mine = labels[start : start + PART]
        made_of = about | dict(target=target.name, seed=seed, first=first + start, guidance=guidance,
                               guidance_channels=guidance_channels, labels=mine.tolist())
        path = None if place is None else place / f"{start}.safetensors"
        if path is not None and path.exists():
            return _read(path, made_of, torch.empty(len(mine), *net.sample_shape))
        made = sample(net, mine, steps=target.steps, guidance=guidance, guidance_channels=guidance_channels,
                      scheduler=target.scheduler or scheduler, seed=seed, first=first + start, batch=batch,
                      latents=True).cpu()
        if path is not None:
            save_tensors(path, {"images": made}, made_of)
        return made

    images, starts = torch.empty(len(labels), *net.sample_shape), range(0, len(labels), PART)
    for i in range(0, len(starts), ranks.world()):
        together = starts[i : i + ranks.world()]
        if ranks.rank() < len(together):
            own = together[ranks.rank()]
            images[own : own + PART] = part(own)
        for source, start in enumerate(together):
            ranks.broadcast(images[start : start + PART], source)
            progress(min(start + PART, len(labels)))
    return images


def _read(path: Path, made_of: dict, like: Tensor) -> Tensor:
    tensors, metadata = load_tensors(path)
    for name, value in made_of.items():
        if metadata.get(name) != value:
            raise ValueError(f"{path}: holds targets made with {name}={metadata.get(name)!r}, expected {value!r}; give "
                             "another folder, or remove it")
    try:
        return check_like("images", tensors["images"], like)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: is damaged ({error}); remove it, and it is made again") from None
