"""The bundled example: a small DiT on Fashion-MNIST, with its weights, its routers and its training.

    data.py        the images
    recipe.py      the model's training
    classifier.py  the classifier that judges samples, and its training
    weights/ routers/ forecasts/   made by these and by trainings
"""

import os
from pathlib import Path

FASHION = dict(input_size=28, patch_size=4, in_channels=1, hidden_size=128, depth=8, num_heads=4, num_classes=10,
               learn_sigma=False)
FASHION_WEIGHTS = Path(__file__).parent / "weights" / "fashion_dit.safetensors"
ROUTERS, FORECASTS = (Path(__file__).parent / name for name in ("routers", "forecasts"))  # the bundled ones


def find(path: str | os.PathLike) -> Path:
    """The file at `path`; if there is none, the bundled router or forecast of that name.

    Raises:
        FileNotFoundError: there is neither; the message lists what is bundled.
    """
    path = Path(path)
    if path.is_file():
        return path
    bundled = {file.stem: file for folder in (ROUTERS, FORECASTS) for file in sorted(folder.glob("*.safetensors"))}
    if str(path) in bundled:
        return bundled[str(path)]
    raise FileNotFoundError(f"no file at {path}; bundled are {', '.join(bundled)}")


__all__ = ["FASHION", "FASHION_WEIGHTS", "FORECASTS", "ROUTERS", "find"]
