"""Writes the tables of docs/gpu.md and its picture anew from what was measured on a GPU: `python -m bench.gpu.page`.

A table stands between `<!-- table: FILE, KIND -->`, FILE of bench/results and KIND of TABLES, and `<!-- end -->`.
"""

import json
import re
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from bench import RESULTS, ROOT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = ROOT / "docs" / "gpu.md"
TABLE = re.compile(r"<!-- table: ([\w.-]+), (\w+) -->\n.*?<!-- end -->", re.S)
WAYS = {"plain": "plain PyTorch", "plain, in a graph": "plain PyTorch, in one graph", "ours, eager": "ours, eager",
        "ours": "ours, in one graph",
        "LTC": "LTC's schedule (22.1 % CUR)", "LTC, reference's way, bfloat16": "LTC's, the reference's way",
        "37.5 % CUR": "37.5 % CUR, at random",
        "37.5 % CUR, reference's way, bfloat16": "37.5 % CUR, the reference's way",
        "whole steps": "trunk forecast at every second step"}
Lines = Iterator[list[str]]


def ratios(parts: dict) -> Lines:
    """All that was to be reached."""
    yield ["what", "reached", "to reach"]
    for part in parts.values():
        for ratio in part["ratios"]:
            short = ratio["value"] > ratio["reach"] if ratio["at_most"] else ratio["value"] < ratio["reach"]
            value, sign = f"{ratio['value']:.3g}", "≤" if ratio["at_most"] else "≥"
            yield [ratio["measure"], f"**{value}, short**" if short else value, f"{sign} {ratio['reach']:.3g}"]


def trajectories(parts: dict) -> Lines:
    samples = parts["trajectory"]["samples"]
    sizes = (2, 16)
    yield ["a trajectory, ms", *(f"{rows} rows" for rows in sizes)]
    for way, name in WAYS.items():
        yield [name, *(f"{1e3 * samples[f'{rows} rows: {way}']['median']:.1f}" for rows in sizes)]


def pixart(parts: dict) -> Lines:
    yield ["", "ms", "speedup", "of FLOPs", "wall / FLOPs"]
    for name, sample in parts["pixart"]["samples"].items():
        case, way = name.split(": ")
        row = next((row for row in parts["pixart"]["rows"] if (row.get("case"), row.get("way")) == (case, way)), None)
        plain = parts["pixart"]["samples"][f"{case}: plain"]["median"]
        yield [name, f"{1e3 * sample['median']:.0f}", f"{plain / sample['median']:.2f}×",
               *((f"{row['FLOPs']:.2f}×", f"{row['wall / FLOPs']:.2f}") if row else ("", ""))]


def sdt(parts: dict) -> Lines:
    yield ["rows", "loop", "ms an iteration", "peak, GiB"]
    for row in parts["sdt"]["rows"]:
        time, peak = row.get("ms an iteration"), row["peak, GiB"]
        yield [str(row["rows"]), row["loop"], "" if time is None else f"{time:.0f}",
               peak if isinstance(peak, str) else f"{peak:.1f}"]


def kernels(parts: dict) -> Lines:
    yield ["op", "MB", "µs", "PyTorch's ops / ours", "bytes per second, of a copy's"]
    for row in parts["kernels"]["rows"]:
        if "ours, µs" in row:
            copied = row.get("ours / copy")
            yield [row["case"], f"{row['MB']:.1f}", f"{row['ours, µs']:.1f}", f"{row['eager / ours']:.1f}",
                   "" if copied is None else f"{copied:.2f}"]


TABLES = dict(ratios=ratios, trajectories=trajectories, pixart=pixart, sdt=sdt, kernels=kernels)


def table(file: str, kind: str) -> str:
    heading, *lines = TABLES[kind](json.loads((RESULTS / file).read_text())["parts"])
    return "\n".join(f"| {' | '.join(line)} |" for line in (heading, ["---"] * len(heading), *lines))


def write_tables(page: str) -> str:
    return TABLE.sub(lambda found: f"<!-- table: {found[1]}, {found[2]} -->\n{table(found[1], found[2])}\n<!-- end -->",
                     page)


def draw(file: str) -> "Figure":
    """A bar for each way of making a trajectory: plain PyTorch's and the reference's in grey, ours in blue."""
    from matplotlib import pyplot as plt

    heading, *lines = trajectories(json.loads((RESULTS / file).read_text())["parts"])
    colours = ["0.6" if "plain" in way or "reference" in way else "tab:blue" for way in WAYS]
    figure, panels = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
    for i, axes in enumerate(panels, 1):
        times = [float(line[i]) for line in lines]
        bars = axes.barh(range(len(lines), 0, -1), times, color=colours, tick_label=[name for name, *_ in lines])
        axes.bar_label(bars, fmt="%.0f", padding=3)
        axes.set(title=f"{heading[i]}, ms", xlim=(0, 1.12 * max(times)))
    return figure


def main() -> None:
    import matplotlib

    from harmonica_dit.evaluate.style import save

    matplotlib.use("Agg")
    PAGE.write_text(write_tables(PAGE.read_text()))
    [file] = {file for file, kind in TABLE.findall(PAGE.read_text()) if kind == "trajectories"}
    save(partial(draw, file), PAGE.with_name("gpu-trajectories.png"))


if __name__ == "__main__":
    main()
