"""Writes the table of docs/performance.md from bench/results/bench-cpu.json: `python -m bench.performance_page`."""

import json
import re

from bench import RESULTS, ROOT
from bench.cases import COMPILED, OURS, PLAIN

PAGE, FILE = ROOT / "docs" / "performance.md", "bench-cpu.json"
TABLE = re.compile(rf"<!-- table of {FILE} -->\n.*?<!-- end -->", re.S)


def table() -> str:
    """A line a case: what each candidate takes over what ours does, of a variant over our way of it."""
    cases: dict[str, dict[str, float]] = {}
    for one in json.loads((RESULTS / FILE).read_text())["benchmarks"]:
        info = one["extra_info"]
        cases.setdefault(info["what"], {})[info["candidate"]] = info["over_ours"]
    lines = [["case", "plain / ours", "torch.compile / ours", "others / ours"], ["---"] * 4]
    for what, over in cases.items():
        others = [f"{name} {value:.2f}" for name, value in over.items()
                  if name not in (PLAIN, COMPILED) and not name.endswith(OURS)]
        compiled = f"{over[COMPILED]:.2f}" if COMPILED in over else "–"
        lines.append([what, f"{over[PLAIN]:.2f}", compiled, "; ".join(others) or "–"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_table(page: str) -> str:
    return TABLE.sub(lambda _: f"<!-- table of {FILE} -->\n{table()}\n<!-- end -->", page)


if __name__ == "__main__":
    PAGE.write_text(write_table(PAGE.read_text()))
