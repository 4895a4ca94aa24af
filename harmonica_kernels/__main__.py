"""`python -m harmonica_kernels`: what this installation is made of."""

import sys


def main() -> None:
    try:
        from ._info import info
    except ImportError as error:
        sys.exit(f"harmonica_kernels: {error}")
    for key, value in info().items():
        if isinstance(value, dict):
            value = "".join(f"\n  {name:<20} {entry}" for name, entry in value.items())
        elif isinstance(value, list):
            value = ", ".join(value)
        print(f"{key:<12} {value}")


if __name__ == "__main__":
    main()
