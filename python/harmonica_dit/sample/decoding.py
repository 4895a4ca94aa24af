"""From latents to images, by the VAE of a latent model."""

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harmonica_dit.repository import check_reachable

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

AT_ONCE = 4  # latents: a VAE's activations take more memory than the transformer's


@torch.no_grad()
def decode(net, latents: Tensor) -> Tensor:
    """Images [n, 3, H, W] in about [-1, 1], float32, of latents [n, C, h, w], by `net.vae`.

    Without a VAE the samples are what the model makes: images already, or latents that stay latents. A denoiser that is
    run by its pipeline's loop is decoded by it, to images that are clipped.
    """
    if hasattr(net, "decode"):
        return net.decode(latents)
    vae = vae_of(net)
    if vae is None:
        return latents
    scaled = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0)
    return torch.cat([vae.decode(part, return_dict=False)[0].float() for part in scaled.split(AT_ONCE)])


@torch.no_grad()
def encode(net, images: Tensor) -> Tensor:
    """Scaled latents [n, C, h, w], float32, of images [n, 3, H, W] in [-1, 1]: the means that `net.vae` gives.

    Without a VAE they are the images themselves.
    """
    vae = vae_of(net)
    if vae is None:
        return images
    parts = [vae.encode(part).latent_dist.mode() for part in images.to(vae.device, vae.dtype).split(AT_ONCE)]
    return ((torch.cat(parts) - (vae.config.shift_factor or 0)) * vae.config.scaling_factor).float()


def vae_of(net) -> "AutoencoderKL | None":
    """The VAE that decodes a denoiser's samples; None if they are images, or if it has none."""
    return getattr(net, "vae", None)


def makes_images(net) -> bool:
    """Whether a denoiser's samples are images, or are decoded to images."""
    if hasattr(net, "decodes"):
        return net.decodes
    return vae_of(net) is not None or net.sample_shape[0] in (1, 3)


def load_vae(source: str | os.PathLike, channels: int, **options) -> "AutoencoderKL":
    """Loads a VAE, in evaluation mode and without gradients, in float32: in float16 many overflow.

    Args:
        source: folder or repository. channels: of the latents that it is to decode. options: as `from_pretrained` has
            them, such as subfolder.

    Raises:
        OSError: there is none. ValueError: its latents have another number of channels.
    """
    check_reachable("vae", source, os.path.join(options.get("subfolder", ""), "config.json"))
    from diffusers import AutoencoderKL  # not at the top: with all of diffusers' models it takes seconds to import

    vae = AutoencoderKL.from_pretrained(source, **options)
    if vae.config.latent_channels != channels:
        raise ValueError(f"vae: {source} decodes latents of {vae.config.latent_channels} channels, the model makes "
                         f"{channels}")
    return vae.eval().requires_grad_(False)
