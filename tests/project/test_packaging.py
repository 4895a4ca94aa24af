"""What an installation promises: pins for every Python, and one clear line for what is missing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from harmonica_kernels._command import main

ROOT = Path(__file__).resolve().parents[2]


def requirements(path):
    """Those of constraints.txt, or of pyproject.toml's dependencies and extras."""
    text = (ROOT / path).read_text()
    if path == "pyproject.toml":  # Python 3.10 has no tomllib
        lines = re.findall(r'"([a-z][\w.\[\]-]*>=[^"]*)"', text[text.index("[project]"):])
    else:
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
def test_every_minimum_has_one_pin_that_meets_it(python):
    minimums = requirements("pyproject.toml")
    assert {"torch", "numpy", "typer", "pytest"} <= {minimum.name for minimum in minimums}
    pins = [pin for pin in requirements("constraints.txt")
            if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    for minimum in minimums:
        (pin,) = [pin for pin in pins if pin.name == minimum.name]
        (exact,) = pin.specifier
        assert exact.operator == "==" and minimum.specifier.contains(exact.version)


def test_the_command_names_the_extra_that_is_missing(monkeypatch):
    monkeypatch.delitem(sys.modules, "harmonica_dit.cli", raising=False)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"^harmonica: typer is missing; pip install 'harmonica-kernels\[dit\]'"):
        main()


@pytest.mark.parametrize("change, message", [
    ("import sysconfig; sysconfig.get_path = lambda name: '/nowhere'", r"no Python\.h in /nowhere.*python3\.\d+-dev\)"),
    ("import shutil; which = shutil.which; shutil.which = lambda name, **k: None if '++' in name else which(name, **k)",
     r"no C\+\+ compiler found.*g\+\+"),
])
def test_the_build_names_what_is_missing(change, message, tmp_path):
    for tool in ("cmake", "ninja"):
        (tmp_path / tool).touch(mode=0o755)
    (tmp_path / "pybind11.py").touch()
    code = f"{change}\nimport sys, runpy\nsys.argv = ['setup.py', 'build_ext', '--build-lib', {str(tmp_path)!r}, " \
           f"'--build-temp', {str(tmp_path)!r}]\nrunpy.run_path('setup.py', run_name='__main__')"
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}
    environment.pop("CXX", None)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert re.fullmatch(f"harmonica-kernels: .*{message}.*", result.stderr.strip().splitlines()[-1])
