"""docs/comparison.md shows what was measured, and nothing else."""

import os
import re
import shutil
import subprocess
from functools import partial
from itertools import pairwise

from bench import ROOT
from bench.comparison_page import PAGE, TABLE, found, table, write_tables
from harmonica_dit.fashion import find


def test_its_tables_are_those_of_the_files():
    page = PAGE.read_text()
    assert TABLE.findall(page) and write_tables(page) == page


def test_a_table_has_a_line_for_each_row_of_its_file():
    for name in TABLE.findall(PAGE.read_text()):
        rows, (caption, _, *lines) = found(name)["rows"], table(name).splitlines()
        *lines, floor = lines
        assert floor.startswith("| 10,000 real images | – |")
        assert caption == f"{rows[0]['samples']:,} samples a method:" and len(lines) == len(rows) + 2
        assert {line.split(" | ")[0][2:] for line in lines[2:]} == {row["name"] for row in rows}
        speedups = [float(re.search(r"([\d.]+)×", line.split(" | ")[2])[1]) for line in lines[2:]]
        assert speedups == sorted(speedups)


def test_one_command_makes_every_table(tmp_path):
    """With a stand-in for harmonica: the tables are the page's, and the files that they compare are there."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "data").symlink_to(ROOT / "bench" / "data")
    shutil.copy(ROOT / "bench" / "comparison.sh", tmp_path / "bench")
    (tmp_path / "harmonica").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "harmonica").chmod(0o755)
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True,
                  env=os.environ | dict(PATH=f"{tmp_path}:{os.environ['PATH']}"))
    done = run(["bench/comparison.sh", "all", "7", "--processes", "2"], check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert sorted(line[2] for line in lines) == sorted(f"build/{name}" for name in TABLE.findall(PAGE.read_text()))
    for line in lines:
        assert line[line.index("--samples") + 1] == "7" and line[-2:] == ["--processes", "2"]
        for name in (value for key, value in pairwise(line) if key == "--schedule"):
            assert find(tmp_path / name if "/" in name else name).exists()
    assert run(["bench/comparison.sh", "4.0"]).returncode == 2
