"""The command `harmonica`, for an installation that may lack what harmonica_dit needs."""

import logging
import sys
import warnings


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a Latin-1 terminal has no β
    # diffusers imports torchao if it is installed, and importing it logs warnings about torchao itself.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # This file lies outside harmonica_dit: importing any part of that package needs its dependencies.
    try:
        from harmonica_dit.cli import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("harmonica"):
            raise
        sys.exit(f"harmonica: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    warnings.showwarning = say
    app(prog_name="harmonica")


def say(message: Warning | str, *_, **__) -> None:
    """A warning in a line, without the place in the code that gave it."""
    print(f"harmonica: {' '.join(str(message).split())}", file=sys.stderr)
