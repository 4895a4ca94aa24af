"""The size of an image's latents."""

VAE_FACTOR = 8  # the side of an image / the side of its latents


def latent_side(image_size: int, patch_size: int) -> int:
    """The side of the latents, an eighth of the image's.

    Raises:
        ValueError: the latents' side is not a whole number of patches.
    """
    multiple = VAE_FACTOR * patch_size
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1 or image_size % multiple:
        raise ValueError(f"image_size: got {image_size!r}, expected a multiple of {multiple}")
    return image_size // VAE_FACTOR
