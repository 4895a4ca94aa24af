"""Instructions that the CPU's kernels take, counted by callgrind: `make instructions`.

    python -m bench.instructions           # counts, and compares with bench/results/instructions.json
    python -m bench.instructions --keep    # keeps the counts there, after a change that was meant

Counts do not depend on the machine's load. They are those of residual_norm, its backward and bias_gelu on one thread,
built from csrc/ with CMake's flags, and of no function beside the kernels' own: neither of the C library nor of Python.
Valgrind knows no AVX-512, so what is counted is the AVX2 build of the row primitives, on other processors than x86-64
the portable one; AVX-512's comes from the same source with vectors of twice the width.
"""

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench import RESULTS, ROOT
from bench.record import read_output

KEPT = RESULTS / "instructions.json"
SIZES = ((1, 8, 128), (2, 49, 128), (2, 64, 1152))  # B, N, D; fashion-dit's and DiT-XL/2's widths
TOLERANCE = 0.03
ISA = "avx2" if platform.machine() in ("x86_64", "AMD64") else "portable"
SOURCES = ("bias_gelu", "residual_norm", "residual_norm_backward", "overlap", "parallel")
TOOLS, HEADER = ("g++", "valgrind"), "valgrind/callgrind.h"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.instructions", description=__doc__.partition("\n")[0])
    parser.add_argument("--keep", action="store_true", help=f"write the counts to {KEPT.relative_to(ROOT)}")
    keep = parser.parse_args(arguments).keep
    if lacks := missing():
        parser.error(f"{' and '.join(lacks)} not found")
    with tempfile.TemporaryDirectory() as folder:
        driver = build(Path(folder))
        counts = {name: n for size in SIZES for name, n in count(driver, size).items()}
    if keep:
        KEPT.write_text(json.dumps(built_with() | dict(counts=counts), indent=1) + "\n")
    kept = json.loads(KEPT.read_text())
    differ = changed(counts, kept["counts"])
    for name, n in counts.items():
        before = kept["counts"].get(name)
        more = "new" if before is None else f"{n / before - 1:+.1%}"
        print(f"{name:52}{n:>12,}  {more}{'  CHANGED' if name in differ else ''}")
    if {key: kept[key] for key in built_with()} != built_with():
        print(f"kept of another build, {kept['compiler']}, {kept['target']}: no comparison", file=sys.stderr)
        return 0
    return 1 if differ else 0


def missing() -> list[str]:
    """What is needed and not there."""
    lacks = [name for name in TOOLS if shutil.which(name) is None]
    if "g++" not in lacks and subprocess.run(["g++", "-x", "c++", "-E", "-"], input=f"#include <{HEADER}>", text=True,
                                             capture_output=True).returncode:
        lacks.append(HEADER)
    return lacks


def build(folder: Path, source: Path = ROOT / "csrc") -> Path:
    """The driver, in this folder. source: the kernels'."""
    flags = ["-std=gnu++17", "-O3", "-fPIC", f"-DHARMONICA_ISA={ISA}", f"-I{source}"]
    vectors = ["-ffp-contract=fast", "-Wno-psabi", *(["-mavx2", "-mfma", "-mf16c"] if ISA == "avx2" else [])]
    compile_one = [(source / "cpu" / "row.cpp", vectors), (ROOT / "bench" / "instructions.cpp", []),
                   *((source / "cpu" / f"{name}.cpp", []) for name in SOURCES)]
    running = [subprocess.Popen(["g++", *flags, *more, "-c", path, "-o", folder / f"{path.stem}.o"])
               for path, more in compile_one]
    if any([process.wait() for process in running]):
        raise RuntimeError("g++ failed")
    driver = folder / "driver"
    subprocess.run(["g++", *folder.glob("*.o"), "-o", driver, "-pthread", "-ldl"], check=True)
    return driver


def count(driver: Path, size: tuple[int, int, int]) -> dict[str, int]:
    """Instructions of each call for x [B, N, D]."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["valgrind", "--tool=callgrind", "--compress-strings=no", "--compress-pos=no",
                        f"--callgrind-out-file={folder}/out", driver, *map(str, size)], check=True,
                       capture_output=True)
        texts = [path.read_text() for path in Path(folder).glob("out.*")]
    named = {found[1]: kernel_instructions(text) for text in texts
             if (found := re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.M))}
    return {f"{list(size)} {name}": named[name] for name in sorted(named)}


def kernel_instructions(text: str) -> int:
    """Those of the kernels' own functions in a file of callgrind, neither compressed nor with lines."""
    total, counts, callee = 0, False, False
    for line in text.splitlines():
        if line.startswith("fn="):
            counts = "harmonica::" in line
        elif line.startswith("calls="):
            callee = True  # the next line is what the function called took
        elif line[:1].isdigit() or line[:2] == "0x":
            total += int(line.split()[1]) if counts and not callee else 0
            callee = False
    return total


def changed(counts: dict[str, int], kept: dict[str, int]) -> list[str]:
    """The names whose count is not, up to TOLERANCE, the one that is kept; one that is not kept is changed."""
    return [name for name, n in counts.items() if name not in kept or abs(n - kept[name]) > TOLERANCE * kept[name]]


def built_with() -> dict[str, str]:
    return dict(compiler=read_output("g++", "--version").partition("\n")[0], target=f"{platform.machine()}, {ISA}",
                flags="-O3")


if __name__ == "__main__":
    sys.exit(main())
