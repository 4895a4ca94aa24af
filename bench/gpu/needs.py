"""What the parts of bench/gpu.sh import, and whether it is there: `python -m bench.gpu.needs [PART ...]`.

Ends with 1, and names what is missing and how its wheels are fetched, before anything is built. Imports none of them.
"""

import os
import re
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from bench import ROOT

# By the names that Python imports. The second line is what harmonica_dit refuses to be imported without, in every part;
# the third what diffusers needs, for a wheel is carried without its dependencies.
EVERY = ("torch", "triton",
         "diffusers", "filelock", "matplotlib", "numpy", "PIL", "prdc", "rich", "safetensors", "torchmetrics", "typer",
         "huggingface_hub", "regex", "requests", "sklearn", "scipy")
TESTS = "pytest", "hypothesis", "transformers", "sentencepiece"
NEEDS: dict[str, tuple[str, ...]] = dict(build=("pybind11",), tests=TESTS, sanitizer=TESTS) | dict.fromkeys(
    ("kernels", "attention", "gemm", "trajectory", "gated", "pixart", "sdt", "compiled2", "compiled16"), ())
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}  # where its name is another
WHEELS = "cmake", "ninja"  # programs that packages of the same name bring
TOOLS = {"build": WHEELS, "sanitizer": ("compute-sanitizer", "nvcc"), "gated": ("nvcc",)}


def missing(parts: list[str]) -> tuple[list[str], list[str]]:
    """The packages and the programs that these parts need and that are not there."""
    packages = {name: None for part in parts for name in (*EVERY, *NEEDS[part]) if find_spec(name) is None}
    tools = {name: None for part in parts for name in TOOLS.get(part, ()) if program(name) is None}
    return list(packages), list(tools)


def program(name: str) -> str | None:
    """Its path: from PATH, or else from the environment of this interpreter, whose programs need not be on PATH."""
    if found := shutil.which(name):
        return found
    folders = [Path(sysconfig.get_path("scripts"))]
    if name in WHEELS and (spec := find_spec(name)) and spec.origin:
        package = Path(spec.origin).parent
        folders += [package / "data" / "bin", package.parent / "bin"]  # the latter of `pip install --target`
    return shutil.which(name, path=os.pathsep.join(map(str, folders)))


def wheels(packages: list[str]) -> str:
    """The command that fetches their wheels where there is a network, in the versions that the tests run with."""
    found = re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pins = dict(reversed(found))  # the first of two is the newer Pythons'
    wanted = (DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in packages)
    return "python -m pip download --no-deps --dest .whl " + " ".join(
        f"{name}=={pins[name]}" if name in pins else name for name in wanted)


def main() -> None:
    parts = sys.argv[1:] or list(NEEDS)
    packages, tools = missing(parts)
    if tools:
        print(f"neither on PATH nor in Python's environment: {', '.join(tools)}")
    packages += [tool for tool in tools if tool in WHEELS]
    if packages:
        print(f"missing: {', '.join(packages)}. Fetch the wheels into .whl/ where there is a network:\n"
              f"    {wheels(packages)}")
    sys.exit(bool(packages))


if __name__ == "__main__":
    main()
