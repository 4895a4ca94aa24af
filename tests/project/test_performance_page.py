"""docs/performance.md's table is that of the file."""

import json

from bench import RESULTS
from bench.performance_page import PAGE, TABLE, table, write_table


def test_what_a_router_costs_is_that_of_the_file():
    rows = [one["extra_info"] for one in json.loads((RESULTS / "overhead-cpu.json").read_text())["benchmarks"]]
    assert len(rows) == 6
    for row in rows:
        ratios = [f"{row[key]:.2f}" if row["loop"] != "ours" else "1" for key in ("time_over_ours", "ours_over_peak")]
        measured = f"{row['seconds']:.1f} | {ratios[0]} | {row['peak_gib']:.2f} | {ratios[1]}"
        shares = f"{row['parameters_share']:.1e} | {row['flops_share']:.1e}"
        assert f"| {row['model']} | {row['loop']} | {measured} | {shares} |" in PAGE.read_text()


def test_its_table_is_that_of_the_file():
    page = PAGE.read_text()
    assert len(TABLE.findall(page)) == 1 and write_table(page) == page and len(table().splitlines()) > 15
