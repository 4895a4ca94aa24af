"""Options that several commands have, and what they name."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="The bundled fashion-dit, a DiT configuration such as DiT-XL/2, or the folder "
                                         "or repository of a diffusers pipeline, of any class.")]
Checkpoint = Annotated[Path | None, typer.Option(help="File of the model's weights, .pt or .safetensors; fashion-dit "
                                                      "has its own.")]
Vae = Annotated[str | None, typer.Option(help="Folder or repository of the VAE that decodes a latent model's samples; "
                                              "a pipeline has its own.")]
Prompts = Annotated[Path | None, typer.Option(help="File of prompts for a text pipeline, one a line; the labels are "
                                                   "their numbers, from 0.")]
Dtype = Annotated[str, typer.Option(help="Dtype of the model's weights: float32, bfloat16 or float16; training refuses "
                                         "float16.")]
ImageSize = Annotated[int | None, typer.Option(help="Side of the images in pixels.", show_default="the model's own")]
Device = Annotated[str | None, typer.Option(help="Device to compute on, such as cpu or cuda:1.",
                                            show_default="cuda if there is one, else cpu")]
FILE = "File of a router or a schedule, or the name of a bundled router, such as fashion-dit-2.0x"
OwnGuidance = Annotated[float | None, typer.Option(help="Classifier-free guidance scale; 1 is none.",
                                                   show_default="the router's, or the model's own")]
OwnScheduler = Annotated[str | None, typer.Option(help='"ddim", "iddpm", or the name of a diffusers scheduler.',
                                                  show_default="the router's, or the model's own")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the starting noise.")]
Batch = Annotated[int, typer.Option(help="How many images to sample at a time.")]
Threshold = Annotated[float | None, typer.Option(help="Compute a branch where the router's score is above this.",
                                                 show_default="the router's own threshold")]


def load(model: str, checkpoint: Path | None, prompts: Path | None, dtype: str, image_size: int | None,
         device: str | None, folder: Path | None = None, vae: str | None = None):
    """Loads the denoiser that the options name; `folder` keeps the encoded prompts."""
    import torch

    import harmonica_dit

    texts = kept = None
    if prompts is not None:
        from harmonica_dit.pipelines.prompts import read_texts  # with all of diffusers' models, which take seconds

        texts, kept = read_texts(prompts), folder and folder / "prompts.safetensors"
    return harmonica_dit.load(model, checkpoint, image_size=image_size, vae=vae, dtype=dtype, prompts=texts,
                              embeddings=kept, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))


def option_value(option: str, given, found: list, default):
    """An option's value: the given one, else the one that what was `found` was made for, else `default`."""
    if given is not None:
        return given
    values = {getattr(one, option) for one in found if one is not None} - {None}
    if len(values) > 1:
        raise ValueError(f"--{option}: the files were made for {', '.join(sorted(map(str, values)))}; give one")
    return values.pop() if values else default
