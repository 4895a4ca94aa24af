"""Writes what comparisons found into docs/comparison.md, and their pictures beside it.

    python -m bench.comparison_page [build/comparison-2.0 …]

Each folder is one that `harmonica compare` has left: its rows.json becomes bench/results/<folder's name>-cpu.json. Then
every table of the page is written anew from its file there, and the picture of quality against speedup from all files
of T = 20 with DDIM. Pictures of the folder that the page shows (comparison-2.0-schedules.png) are copied beside it.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

from bench import RESULTS, ROOT
from harmonica_dit.evaluate.fashion import fashion_floor
from harmonica_dit.evaluate.plots import plot_tradeoff
from harmonica_dit.evaluate.report import COLUMNS, MORE, cells

PAGE = ROOT / "docs" / "comparison.md"
TABLE = re.compile(r"<!-- table of ([\w.-]+) -->\n.*?<!-- end -->", re.S)
OMITTED = ("wall clock speedup",  # of a machine that did other work too; docs/performance.md has times
           "PSNR", "SSIM")  # they order methods as the error does, and the table is wide
DRAWN = ("comparison-1.4", "comparison-2.0", "comparison-2.8", "comparison-3.8")  # of one trajectory, DDIM with T = 20
HEADING = "fashion-dit, DDIM, 20 steps"


def found(name: str) -> dict:
    return json.loads((RESULTS / f"{name}-cpu.json").read_text())


def table(name: str) -> str:
    """In Markdown, from the slowest to the fastest."""
    comparison = found(name)
    rows = sorted(comparison["rows"], key=lambda row: (row["flops_speedup"], row["name"]))
    columns = cells(rows, COLUMNS | MORE, fashion_floor())
    for heading in OMITTED:
        columns.pop(heading, None)
    lines = [list(columns), ["---"] * len(columns), *map(list, zip(*columns.values()))]
    return "\n".join([f"{comparison['samples']:,} samples a method:", "",
                      *(f"| {' | '.join(line)} |" for line in lines)])


def write_tables(page: str) -> str:
    return TABLE.sub(lambda place: f"<!-- table of {place[1]} -->\n{table(place[1])}\n<!-- end -->", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folders", nargs="*", type=Path)
    folders = parser.parse_args().folders
    for folder in folders:
        shutil.copy(folder / "rows.json", RESULTS / f"{folder.name}-cpu.json")
        for picture in re.findall(rf"\({re.escape(folder.name)}-(\w+)\.png\)", PAGE.read_text()):
            shutil.copy(folder / f"{picture}.png", PAGE.parent / f"{folder.name}-{picture}.png")
    PAGE.write_text(write_tables(PAGE.read_text()))
    drawn = {row["name"]: row for name in DRAWN for row in found(name)["rows"]}
    plot_tradeoff(list(drawn.values()), PAGE.parent / "comparison-tradeoff.png", HEADING)


if __name__ == "__main__":
    main()
