"""Real images and their labels from files, as a model is trained on them."""

import os
from pathlib import Path

import torch
from torch import Tensor

from harmonica_dit.evaluate.reference import image_files, read_images
from harmonica_dit.fashion import data
from harmonica_dit.models import VAE_FACTOR
from harmonica_dit.progress import progress_bar
from harmonica_dit.sample.decoding import encode, makes_images, vae_of
from harmonica_dit.validate import shorten

AT_ONCE = 64  # files


def training_files(model: str, folder: str | os.PathLike | None) -> dict[str, list[Path]]:
    """The image files in each subfolder of a folder, by the subfolder's name; found before the model is loaded.

    model: its name. Of "fashion-dit" the files are Fashion-MNIST's four, under "", in Debian's folder if none is given.

    Raises:
        ValueError: no folder is given. FileNotFoundError: there are no such files; the message says which.
    """
    if model == "fashion-dit":
        return {"": data.files("train", data.FOLDER if folder is None else folder)}
    if folder is None:
        raise ValueError("images: Learning-to-Cache trains on images; give a folder of them")
    found: dict[str, list[Path]] = {}
    for path in image_files(folder):
        parts = path.relative_to(folder).parts
        if len(parts) == 1:
            raise ValueError(f"images: {path} is in no class; expected a subfolder of {folder} for each class")
        found.setdefault(parts[0], []).append(path)
    return found


def read_training_images(net, files: dict[str, list[Path]]) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W] as `net` samples them, in the dtype of its weights, and their labels [N].

    They are the middle squares at the model's resolution; of a latent model their latents. All are kept in memory.

    files: of `training_files`. Subfolders that are numbers are labels; else there is one for each class of the model,
        in the order of their names.

    Raises:
        ValueError: there are other classes than the model's, or it makes latents and has no VAE; the message says so.
    """
    weight = next(net.parameters())
    if "" in files:
        images, labels = data.load("train", files[""][0].parent)
        return images.to(weight.dtype), labels
    names = sorted(files)
    numbers = [int(name) if name.isdecimal() else -1 for name in names]
    if -1 in numbers:
        numbers = list(range(len(names)))
        if len(names) != net.num_classes:
            raise ValueError(f"images: got {len(names)} subfolders, {shorten(names)}, expected one for each of the "
                             f"{net.num_classes} classes of {net.name}, or subfolders named by the labels' numbers")
    elif max(numbers) >= net.num_classes:
        raise ValueError(f"images: got a subfolder {max(numbers)}, expected labels from 0 to {net.num_classes - 1}")
    latent = vae_of(net) is not None
    if not makes_images(net) or not latent and net.sample_shape[0] != 3:
        raise ValueError(f"images: {net.name} makes latents; load it with vae=, the VAE that encodes images to them")
    labels = torch.tensor([number for name, number in zip(names, numbers) for _ in files[name]])
    paths = [path for name in names for path in files[name]]
    made = []
    with progress_bar() as bar:
        task = bar.add_task("reading images", total=len(paths))
        for batch in read_images(paths, net.sample_shape[-1] * (VAE_FACTOR if latent else 1), AT_ONCE):
            made.append(encode(net, batch).to("cpu", weight.dtype))
            bar.update(task, advance=len(batch))
    return torch.cat(made), labels
