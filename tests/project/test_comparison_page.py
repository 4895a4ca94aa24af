"""docs/comparison.md shows what was measured, and nothing else."""

import json

from harmonica_dit.evaluate.report import COLUMNS, MORE, cells


def test_the_table_is_that_of_the_file(pytestconfig):
    rows = json.loads((pytestconfig.rootpath / "bench" / "results" / "comparison-cpu.json").read_text())["rows"]
    page = (pytestconfig.rootpath / "docs" / "comparison.md").read_text().splitlines()
    columns = cells(rows, COLUMNS | MORE)
    assert f"| {' | '.join(columns)} |" in page
    lines = {f"| {' | '.join(line)} |" for line in zip(*columns.values())}
    assert len(lines) == len(rows) and lines <= set(page)
    head = page.index(f"| {' | '.join(columns)} |")
    assert page[head + 2 + len(rows)] == ""  # no other line stands in it
