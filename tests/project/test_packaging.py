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


@pytest.mark.parametrize("package", ["typer", "diffusers"])
def test_what_is_missing_and_the_extra_that_brings_it_are_named(package):
    """By the command in a line, and by Python."""
    code = f"import sys; sys.modules[{package!r}] = None; "
    said = f"{package} is missing; pip install 'harmonica-kernels[dit]' brings it"
    for then, expected in (("import harmonica_dit", f"ModuleNotFoundError: {said}"),
                           ("import harmonica_kernels._command as c; c.main()", f"harmonica: {said}")):
        run = subprocess.run([sys.executable, "-c", code + then], capture_output=True, text=True)
        assert run.returncode == 1 and run.stderr.splitlines()[-1] == expected
    assert run.stderr.count("\n") == 1


def test_ctrl_c_while_importing_is_quiet(monkeypatch):
    class Interrupted:
        def find_spec(self, name, *_):
            if name == "harmonica_dit.cli":
                raise KeyboardInterrupt

    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "harmonica_dit.cli", raising=False)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130


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
