"""Merges the parts' files into bench/results/<gpu>.json: `python -m bench.gpu.merge [--tiny] [--plots] FOLDER`.

A part that was not run again, or not to its end, keeps what the file had, if that is whole. A dry run is merged into
FOLDER alone. $OUT, where it is set, receives a copy of all. No torch is imported here: it runs after each part.
"""

import argparse
import json
import os
import re
import shutil
from pathlib import Path

from bench import RESULTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--plots", action="store_true", help="draw them too, where matplotlib is")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    written = merge(args.folder, args.folder if args.tiny else RESULTS, args.tiny)
    if args.plots:
        written += [picture for path in written for picture in plots(path)]
    if out := os.environ.get("OUT"):
        for path in written:
            shutil.copy2(path, out)


def merge(folder: Path, results: Path, tiny: bool) -> list[Path]:
    """Writes the merged file, if there is anything to merge; its path. Prints what was reached."""
    parts = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.stem != "dry-run"]
    parts = [part for part in parts if part["machine"]["dry_run"] == tiny]
    if not parts:
        return []
    results.mkdir(parents=True, exist_ok=True)
    gpu = parts[0]["machine"]["gpu"]
    path = results / f"{'dry-run' if tiny else re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"
    merged = json.loads(path.read_text()) if path.exists() else dict(gpu=gpu, dry_run=tiny, parts={})
    for part in parts:
        kept = merged["parts"].get(part["part"])
        if part["finished"] or not (kept and kept["finished"]):
            merged["parts"][part["part"]] = part
    path.write_text(json.dumps(merged, indent=1))
    print(f"\n{gpu}")
    for name, part in merged["parts"].items():
        state = "finished" if part["finished"] and not part["failed"] else f"NOT WHOLE, last at: {part['stage']}"
        print(f"{name}: {part['seconds']:.0f} s, {state}; {part['machine']['date']}, {part['machine']['commit']}")
        for failure in part["failed"]:
            print(f"  failed: {failure}")
        for ratio in part["ratios"]:
            print(f"  {ratio_line(ratio)}")
    return [path]


def ratio_line(ratio: dict) -> str:
    reached = ratio["value"] <= ratio["reach"] if ratio["at_most"] else ratio["value"] >= ratio["reach"]
    return (f"{ratio['measure']}: {ratio['value']:.3f}, to reach {'≤' if ratio['at_most'] else '≥'} {ratio['reach']}"
            f"{'' if reached else ': SHORT'}{'' if ratio.get('valid', True) else ', NOT VALID: a check failed'}")


def plots(path: Path) -> list[Path]:
    """A picture of the ratios to reach, and one of the kernels; none where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    merged = json.loads(path.read_text())
    parts = merged["parts"].values()
    ratios = [(ratio["measure"], ratio["value"], ratio["reach"]) for part in parts for ratio in part["ratios"]]
    kernels = [(row["case"], row["ours / copy"], 0.92 if row["case"].startswith("residual_norm") else None)
               for row in merged["parts"].get("kernels", dict(rows=[]))["rows"] if "ours / copy" in row]
    return [draw(bars, path.with_name(f"{path.stem}-{name}.png"), f"{merged['gpu']}: {title}")
            for name, bars, title in (("ratios", ratios, "ratios, and what was to be reached (|)"),
                                      ("kernels", kernels, "share of a copy's bandwidth")) if bars]


def draw(bars: list[tuple[str, float, float | None]], path: Path, title: str) -> Path:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 1 + 0.28 * len(bars)), layout="constrained")
    places = range(len(bars), 0, -1)
    axes.barh(places, [value for _, value, _ in bars], color="tab:blue")
    for place, (_, value, reach) in zip(places, bars):
        axes.annotate(f"{value:.2f}", (value, place), xytext=(3, -3), textcoords="offset points", fontsize=7)
        if reach is not None:
            axes.plot([reach, reach], [place - 0.4, place + 0.4], color="black")
    axes.set_yticks(list(places), [name for name, _, _ in bars], fontsize=7)
    axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


if __name__ == "__main__":
    main()
