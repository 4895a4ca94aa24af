"""docs/comparison.md shows what was measured, and nothing else."""

import re

from bench.comparison_page import PAGE, TABLE, found, table, write_tables


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
