"""The latents that an image of a given size has."""

VAE_FACTOR = 8  # pixels a latent's side


def latent_side(image_size: int, patch_size: int) -> int:
    """The side of the latent, an eighth of the image's, where a whole number of patches fits."""
    multiple = VAE_FACTOR * patch_size
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1 or image_size % multiple:
        raise ValueError(f"image_size: got {image_size!r}, expected a multiple of {multiple}")
    return image_size // VAE_FACTOR
