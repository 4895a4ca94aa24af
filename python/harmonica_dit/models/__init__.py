"""Denoisers, and `load` to get one."""

import argparse
import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from .dit import DiT
from .flops import Flops, count_flops

FASHION = dict(input_size=28, patch_size=4, in_channels=1, hidden_size=128, depth=8, num_heads=4, num_classes=10,
               learn_sigma=False)
FASHION_WEIGHTS = Path(__file__).parent / "weights" / "fashion_dit.safetensors"
CONFIGS = {f"DiT-{size}/{patch}": dict(hidden_size=width, depth=depth, num_heads=heads, patch_size=patch)
           for size, width, depth, heads in (("XL", 1152, 28, 16), ("L", 1024, 24, 16), ("B", 768, 12, 12),
                                             ("S", 384, 12, 6))
           for patch in (2, 4, 8)}


def load(name: str, checkpoint: str | os.PathLike | None = None, *, image_size: int = 256,
         device: str | torch.device = "cpu") -> DiT:
    """A denoiser, in evaluation mode.

    Args:
        name: "fashion-dit", the bundled model, or a configuration of facebookresearch/DiT such as "DiT-XL/2".
        checkpoint: a DiT's weights, facebookresearch's `.pt` or safetensors; required but for "fashion-dit".
        image_size: of a DiT, in pixels; the latent's side is an eighth of it.

    Raises:
        ValueError: the name is not known, or the checkpoint does not fit the model.
        FileNotFoundError: there is no such checkpoint.
    """
    if name == "fashion-dit":
        net, checkpoint = DiT(**FASHION, name=name), checkpoint or FASHION_WEIGHTS
    elif name in CONFIGS:
        if checkpoint is None:
            raise ValueError(f"checkpoint: {name} needs its weights, such as DiT-XL-2-256x256.pt from "
                             "facebookresearch/DiT")
        if image_size % (8 * CONFIGS[name]["patch_size"]):
            raise ValueError(f"image_size: got {image_size}, expected a multiple of {8 * CONFIGS[name]['patch_size']}")
        with torch.device("meta"):
            net = DiT(**CONFIGS[name], input_size=image_size // 8, name=name)
        net.to_empty(device="cpu")
    else:
        raise ValueError(f'name: got {name!r}, expected "fashion-dit" or one of {", ".join(CONFIGS)}')
    try:
        net.load_state_dict(read_weights(checkpoint))
    except RuntimeError as error:
        raise ValueError(f"{checkpoint} does not fit {name}: {error}") from None
    return net.eval().requires_grad_(False).to(device)


def read_weights(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """A state dict from safetensors or, without running any code in it, from a `.pt` file."""
    state = unpickled_tensors(path)
    if isinstance(state, dict) and "ema" in state:
        state = state["ema"]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path}: expected a state dict of tensors")
    return state


def unpickled_tensors(path: str | os.PathLike):
    """What a safetensors or `.pt` file holds: tensors in plain containers. No code in the file is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # of facebookresearch/DiT's training checkpoints
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what its readers raise: pickle, zip and runtime errors
        raise ValueError(f"{path} is not a checkpoint of plain tensors: {error}") from None


__all__ = ["CONFIGS", "FASHION", "FASHION_WEIGHTS", "DiT", "Flops", "count_flops", "load", "read_weights",
           "unpickled_tensors"]
