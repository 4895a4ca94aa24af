"""Fashion-MNIST (Xiao et al., 2017) from its four idx files: 60,000 + 10,000 images, 28×28, ten classes."""

import gzip
import os
from pathlib import Path

import numpy as np
import torch

FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it
CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def _idx(path: Path) -> torch.Tensor:
    """One gzipped idx file of unsigned bytes: two zero bytes, type 8, the number of sizes, the sizes, the values."""
    data = gzip.decompress(path.read_bytes())
    sizes = np.frombuffer(data, ">i4", count=data[3], offset=4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if data[:3] != b"\0\0\x08" or values.size != sizes.prod():
        raise ValueError(f"{path} is not an idx file of bytes")
    return torch.from_numpy(values.reshape(sizes).copy())


def files(split: str, folder: str | os.PathLike = FOLDER) -> list[Path]:
    """The two files of `split`, "train" or "test": images and labels.

    Raises:
        FileNotFoundError: the folder has no such file; the message says where to get the data.
    """
    stem = {"train": "train", "test": "t10k"}[split]
    paths = [Path(folder) / f"{stem}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: `apt-get install dataset-fashion-mnist`, or name the folder "
                                    "that holds the four idx files")
    return paths


def load(split: str, folder: str | os.PathLike = FOLDER) -> tuple[torch.Tensor, torch.Tensor]:
    """(images [n,1,28,28] float32 in [-1,1], labels [n] int64) of `split`, "train" or "test".

    Raises:
        FileNotFoundError: as in `files`.
    """
    paths = files(split, folder)
    return _idx(paths[0]).unsqueeze(1).float() / 127.5 - 1, _idx(paths[1]).long()
