"""Samples kept on disk, so that a comparison goes on where it stopped and its metrics can be taken anew."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from harmonica_dit.evaluate import Method
from harmonica_dit.evaluate.compare import time_sample
from harmonica_dit.files import load_tensors, save_tensors
from harmonica_dit.sample.schedulers import make_scheduler
from harmonica_dit.schedule import Schedule

PART = 500  # images a file


def kept_samples(net, method: Method, labels: Tensor, folder: Path, **options) -> Iterator[Tensor]:
    """The images of a method [n, C, H, W], part by part: those in the folder, and those that are made now.

    labels: [n], one for each image, from noise 0, 1, … of the seed. options: seed, guidance, batch, scheduler.
    """
    place = folder / digest(net, method, **options)
    for first in range(0, len(labels), PART):
        path = place / f"{first}.safetensors"
        part = labels[first : first + PART]
        if path.exists():
            tensors, metadata = load_tensors(path)
            if metadata["labels"][: len(part)] == part.tolist():
                yield tensors["images"][: len(part)]
                continue
        images, _ = time_sample(net, part, method, first=first, **options)
        save_tensors(path, {"images": images}, {"labels": part.tolist(), "method": method.name})
        yield images


def digest(net, method: Method, *, seed: int, guidance: float, scheduler="ddim", batch: int = 0) -> str:
    """Checksum of everything that decides the images, but for the labels."""
    made = make_scheduler(method.scheduler or scheduler, method.steps, net)
    config = {name: str(value) for name, value in made.config.items() if not name.startswith("_")}
    parts = [json.dumps([type(made).__name__, config, method.steps, seed, guidance], sort_keys=True).encode()]
    tensors = list(net.state_dict().values())
    if method.schedule is not None:
        settings, tables = content(method.schedule)
        parts.append(json.dumps(settings).encode())
        tensors += tables
    parts += [t.detach().contiguous().view(torch.uint8).numpy().tobytes() for t in tensors]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def content(schedule: Schedule) -> tuple[list, list[Tensor]]:
    """What of a schedule decides the images: settings, as JSON takes them, and tables."""
    settings = [schedule.timesteps, getattr(schedule.forecaster, "order", None)]
    settings += [] if schedule.runs is None else [schedule.runs]
    tables = [schedule.compute, schedule.extrapolation]
    if schedule.forecaster is not None:
        tables += [t for t in vars(schedule.forecaster).values() if isinstance(t, Tensor)]
    return settings, tables
