"""The command `harmonica`, for an installation that may lack what harmonica_dit needs."""

import logging
import sys


def main() -> None:
    for name in ("torchao", "torch.utils._pytree"):  # diffusers imports torchao where it is, which then talks of itself
        logging.getLogger(name).setLevel(logging.ERROR)
    # Here, not in harmonica_dit: importing anything of that needs its dependencies.
    try:
        from harmonica_dit.cli import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("harmonica"):
            raise
        sys.exit(f"harmonica: {error.name} is missing; pip install 'harmonica-kernels[dit]' brings it")
    app()
