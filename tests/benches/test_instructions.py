"""Instructions of the CPU's kernels, counted by callgrind: no pass more than is kept in bench/results/."""

import json

import pytest

from bench import instructions

KEPT = json.loads(instructions.KEPT.read_text())


@pytest.mark.skipif(bool(instructions.missing()), reason="needs g++ and valgrind")
def test_the_kernels_take_the_instructions_that_are_kept(tmp_path):
    """Of the smallest size; `make instructions` counts all, and says how to keep others."""
    if not KEPT.items() >= instructions.built_with().items():
        pytest.skip(f"counts are kept of {KEPT['compiler']}, {KEPT['target']}")
    found = instructions.count(instructions.build(tmp_path), instructions.SIZES[0])
    assert len(found) == 6 and instructions.changed(found, KEPT["counts"]) == []


def test_counts_are_kept_of_every_size():
    assert {name.partition("]")[0] + "]" for name in KEPT["counts"]} == {str(list(size)) for size in instructions.SIZES}


@pytest.mark.parametrize("found, changed", [(100, False), (103, False), (104, True), (96, True)])
def test_a_count_may_differ_by_the_tolerance(found, changed):
    assert instructions.changed(dict(kernel=found), dict(kernel=100, other=5)) == ["kernel"] * changed


def test_a_count_that_is_not_kept_is_a_change():
    assert instructions.changed(dict(kernel=1), {}) == ["kernel"]


def test_only_the_kernels_own_instructions_count():
    text = """\
fn=void harmonica::(anonymous namespace)::read<float>(void const*)
0 20
calls=1 0
0 1000
12 3

fn=malloc
0 500

fn=std::_Function_handler<void (int), harmonica::forward<float>(harmonica::Shape)>
0 7
totals: 1530
"""
    assert instructions.kernel_instructions(text) == 30


def test_other_counts_end_with_1_and_another_build_is_not_compared(monkeypatch, tmp_path, capsys):
    path = tmp_path / "kept.json"
    monkeypatch.setattr(instructions, "KEPT", path)
    monkeypatch.setattr(instructions, "ROOT", tmp_path)
    monkeypatch.setattr(instructions, "missing", lambda: [])
    monkeypatch.setattr(instructions, "build", lambda folder: folder)
    monkeypatch.setattr(instructions, "built_with", lambda: dict(compiler="one", target="this"))
    counts = dict(kernel=100)
    monkeypatch.setattr(instructions, "count", lambda driver, size: {f"{list(size)} {k}": n for k, n in counts.items()})
    assert instructions.main(["--keep"]) == 0 and instructions.main([]) == 0
    counts["kernel"] = 110
    assert instructions.main([]) == 1 and "+10.0%  CHANGED" in capsys.readouterr().out
    monkeypatch.setattr(instructions, "built_with", lambda: dict(compiler="two", target="this"))
    assert instructions.main([]) == 0 and "kept of another build, one, this" in capsys.readouterr().err


def test_what_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(instructions, "TOOLS", ("g++", "no-such-tool"))
    monkeypatch.setattr(instructions, "HEADER", "no/such.h")
    with pytest.raises(SystemExit, match="2"):
        instructions.main([])
    assert capsys.readouterr().err.endswith("error: no-such-tool and no/such.h not found\n")
