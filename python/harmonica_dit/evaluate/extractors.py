"""What looks at images on behalf of the metrics: networks that give features, spatial features and logits, and CLIP.

The bundled model's are the classifiers in `harmonica_dit.fashion.classifier`; real models have Inception. An extractor
is a frozen module with

    name          of its features, for captions
    num_features  F, num_spatial S
    num_labels    the model's labels are its classes 0 … num_labels - 1; None if its classes are others
    extract       images [n, C, H, W] in [-1, 1] -> features [n, F], spatial features [n, S] and logits [n, classes]

Weights come from a path on this machine; nothing is downloaded, and nothing pickled is run.
"""

import hashlib
import os
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

SPATIAL_CHANNELS = 7  # the first ones of an intermediate map: Nash et al., 2021 (arXiv 2103.03841)


def extractor_checksum(extractor: nn.Module) -> str:
    """Of the class and of all tensors in the state dict: features of one extractor say nothing to another."""
    digest = hashlib.sha256(type(extractor).__name__.encode())
    for name, tensor in sorted(extractor.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def as_bytes(images: Tensor) -> Tensor:
    """uint8 [n, 3, H, W], as Inception and CLIP take them, of images [n, 1 or 3, H, W] in [-1, 1]."""
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images: got {images.shape[1]} channels, expected 1 or 3; latents have to be decoded first")
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte().expand(-1, 3, -1, -1)


class Inception(nn.Module):
    """Inception v3 as published for FID and IS, through torch-fidelity: the 2015 graph with its own resizing.

    Features are those of the last pooling (Heusel et al., 2017), spatial ones the first 7 channels of the map that
    TensorFlow's graph calls mixed_6/conv, 17×17 (Nash et al., 2021, as guided-diffusion's evaluator has it); logits are
    without bias, as torch-fidelity and torchmetrics take them for the inception score.

    Args:
        weights: torch-fidelity's file, weights-inception-2015-12-05-6726825d.pth.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it holds something else.
        ModuleNotFoundError: torch-fidelity is not installed.
    """

    name, num_features, num_spatial, num_labels = "Inception v3", 2048, SPATIAL_CHANNELS * 17 * 17, None

    def __init__(self, weights: str | os.PathLike):
        super().__init__()
        if not Path(weights).is_file():
            raise FileNotFoundError(f"weights: no file at {weights}; torch-fidelity's releases hold "
                                    "weights-inception-2015-12-05-6726825d.pth")
        try:
            from torch_fidelity import FeatureExtractorInceptionV3
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"Inception's features need torch-fidelity ({error}): "
                                      "pip install 'harmonica-kernels[inception]'") from None
        try:
            torch.load(weights, weights_only=True)  # torch-fidelity would run what is pickled in the file
            self.net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(weights))
        except (UnpicklingError, RuntimeError) as error:
            raise ValueError(f"weights: {weights} does not hold Inception's tensors: {error}") from None
        self.spatial: Tensor | None = None
        self.net.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module, inputs, output: Tensor) -> None:
        self.spatial = output[:, :SPATIAL_CHANNELS].flatten(1)

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[n, 2048], [n, 2023] and [n, 1008] for images [n, 1 or 3, H, W] in [-1, 1]."""
        features, logits = self.net(as_bytes(images))
        return features, self.spatial, logits


def load_clip(folder: str | os.PathLike) -> tuple:
    """(model, processor) of the CLIP in a folder as transformers saves it, for `Judge(clip=...)`.

    Raises:
        FileNotFoundError: there is no such folder.
        OSError: transformers finds no safetensors weights or no processor in it.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"folder: no CLIP at {folder}; expected a folder as transformers saves it")
    from transformers import CLIPModel, CLIPProcessor

    class Clip(CLIPModel):
        """Gives torchmetrics the features alone; from transformers 5 on the methods return them with other things."""

        def get_image_features(self, *args, **kwargs) -> Tensor:
            return super().get_image_features(*args, **kwargs).pooler_output

        def get_text_features(self, *args, **kwargs) -> Tensor:
            return super().get_text_features(*args, **kwargs).pooler_output

    model = Clip.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return model.eval().requires_grad_(False), CLIPProcessor.from_pretrained(folder, local_files_only=True)
