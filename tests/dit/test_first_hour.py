"""A user's first hour with the command: first_hour.txt says what is typed and what comes of it."""

import os
import re
import shlex
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
from typer.testing import CliRunner

from harmonica_dit.cli import app

SCRIPT = Path(__file__).with_name("first_hour.txt").read_text()
CALLS = re.findall(r"^\$ (.*)\n(\d+) ?(.*)$", SCRIPT, re.M)
MINE = """
import harmonica_dit, torch

def make():
    net = harmonica_dit.load("fashion-dit")
    net.name, net.branches = "mine", tuple(net.branches)
    return net

def bare():
    return torch.nn.Linear(1, 1)
"""


class Hostile:
    def __reduce__(self):
        return os.system, ("touch was-run",)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    torch.save({"model": Hostile()}, "hostile.pt")
    Path("rubbish.pt").write_bytes(b"rubbish")

    def unreachable(self, *_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)


def test_the_first_hour(folder):
    """In one go, for each call leaves what later ones take."""
    assert len(CALLS) == SCRIPT.count("\n$ ")
    for command, status, said in CALLS:
        program, *words = shlex.split(command)
        if program == "ls":
            assert not Path(*words).exists()
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "soft_share: ")
            result = CliRunner().invoke(app, words, prog_name="harmonica")
        own = [line for line in result.stderr.splitlines() if line.startswith("harmonica: ")]  # not a library's
        first = next(iter(own or result.stdout.splitlines()), "")
        found = f"{command}\n{result.exit_code} {first}\n{result.output}{result.exception!r}"
        assert str(result.exit_code) == status, found
        assert re.fullmatch(".*".join(map(re.escape, said.split("…"))), first), found
    assert not Path("was-run").exists() and not Path("no.png").exists()
