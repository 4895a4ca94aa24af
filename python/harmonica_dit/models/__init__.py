"""The denoisers of this package. `harmonica_dit.load` loads one by its name."""

from .dit import CONFIGS, DiT
from .latents import VAE_FACTOR, latent_side
from .quantized import quantize, weight_bytes

__all__ = ["CONFIGS", "VAE_FACTOR", "DiT", "latent_side", "quantize", "weight_bytes"]
