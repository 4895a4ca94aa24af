"""The files of examples/ run as they are."""

import runpy
import sys
from pathlib import Path

import pytest

from support.pipeline_folders import save_flux

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_all_of_them_are_run_here():
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == {"own_model.py", "pipeline.py"}


def test_a_model_of_ones_own(run):
    even, router = run("own_model.py")
    assert even.startswith("evenly spaced steps: 1.") and router.startswith("router: 1.")


def test_a_pipeline(run, tmp_path):
    told, *lines = run("pipeline.py", save_flux(tmp_path / "flux"), "a red cat", "--speedup", 1.5, "--steps", 4)
    assert told.startswith("uncached ") and "fewer FLOPs" in "".join(lines)
    assert (tmp_path / "uncached.png").read_bytes() != (tmp_path / "cached.png").read_bytes()
