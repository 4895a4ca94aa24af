"""The programs that the build on a GPU's machine needs."""

import re
import sys
from types import SimpleNamespace

import pytest

from bench.gpu import commands, needs


def test_programs_of_the_environment_are_found(tmp_path, monkeypatch):
    """Beside the interpreter, in a package, and where `pip install --target` puts them; else they are asked for."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(needs, "find_spec", lambda name: SimpleNamespace(origin=f"{tmp_path}/site/{name}/__init__.py"))
    monkeypatch.setattr(needs.sysconfig, "get_path", lambda _: f"{tmp_path}/scripts")
    assert needs.missing(["build"])[1] == ["cmake", "ninja"]
    for folder, name in (("site/cmake/data/bin", "cmake"), ("site/bin", "ninja"), ("scripts", "cmake")):
        program = tmp_path / folder / name
        program.parent.mkdir(parents=True)
        program.write_text("")
        program.chmod(0o755)
        assert needs.program(name) == str(program)
    assert needs.missing(["build"])[1] == []
    called = []
    monkeypatch.setattr(commands, "call", lambda record, steps, **_: called.extend(steps.values()) or True)
    monkeypatch.setitem(sys.modules, "pybind11", SimpleNamespace(get_cmake_dir=str))
    assert commands.compile_extension(None, "build/x")
    assert [command[0].rpartition("/")[2] for command in called] == ["cmake", "ninja", "cmake"]
    assert all(command[0].startswith(str(tmp_path)) for command in called)
    assert f"-DCMAKE_MAKE_PROGRAM={tmp_path}/site/bin/ninja" in called[0]


def test_programs_that_are_wheels_are_fetched_as_such(monkeypatch, capsys):
    monkeypatch.setattr(needs, "program", lambda name: None)
    monkeypatch.setattr(needs, "find_spec", lambda name: name)
    monkeypatch.setattr(sys, "argv", ["needs", "build"])
    with pytest.raises(SystemExit) as ended:
        needs.main()
    out = capsys.readouterr().out
    assert ended.value.code and re.search(r"--dest .whl cmake==\S+ ninja==\S+$", out.strip())
