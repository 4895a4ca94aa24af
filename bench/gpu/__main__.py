"""One part of bench/gpu.sh: `python -m bench.gpu [--tiny] PART FOLDER` writes FOLDER/PART.json."""

import argparse
import faulthandler
import importlib
import signal
import sys
from pathlib import Path

import torch

from .record import Record

SIGNALS = signal.SIGINT, signal.SIGTERM
PARTS = {"build": "commands", "tests": "commands", "sanitizer": "commands", "gated": "commands", "kernels": "kernels",
         "trajectory": "trajectory", "attention": "attention", "gemm": "gemm", "pixart": "pixart", "sdt": "sdt",
         "compiled2": "compiled", "compiled16": "compiled"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a dry run on the CPU, which measures nothing")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        print(f"{args.part}: torch {torch.__version__} sees no GPU; --tiny is a dry run without one", file=sys.stderr)
        return 2
    for number in SIGNALS:
        signal.signal(number, stop)
        faulthandler.register(number, chain=True)  # says where, even if Python does not get that far
    faulthandler.enable()
    return int(not run(args.part, args.folder, args.tiny))


def stop(*_) -> None:
    """Ends the part, which closes its record. No second signal stops that: `timeout` sends one to the group as well."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit("stopped: its time is over")


def run(part: str, folder: Path, tiny: bool) -> bool:
    """Runs one part; whether all of it went well."""
    with Record(part, folder, tiny) as record:
        importlib.import_module(f".{PARTS[part]}", __package__).run(record)
    return not record.failed


if __name__ == "__main__":
    sys.exit(main())
