"""Every small pipeline of the tests, and what holds for it: `python -m bench.pipelines table`."""

import warnings
from collections.abc import Sequence
from dataclasses import replace

from diffusers import ChromaImg2ImgPipeline, ZImageImg2ImgPipeline
from rich.progress import track

from bench.bench_caches import silence
from bench.pipelines.checks import CHECKS, REFUSED, SPEEDUP, STEPS, judge, refusal
from support.many_pipes import PIPES
from support.small_pipe import Draw, SmallPipe, image_vae


def from_image(name: str, cls: type, channels: int) -> SmallPipe:
    """The parts of a pipeline in its class for image to image, with a VAE of so many channels."""
    entry, size = PIPES[name], dict(height=16, width=16)

    def arguments(batch: int, draw: Draw) -> dict:
        return entry.arguments(batch, draw) | size | dict(image=draw(batch, 3, 16, 16).sigmoid())

    return replace(entry, build=lambda: cls(**entry.build().components | dict(vae=image_vae(channels))),
                   arguments=arguments, strength=0.5)


IMG2IMG: dict[str, SmallPipe] = {
    **{name: PIPES[f"{name}-img2img"] for name in ("flux", "sd3", "qwen")},
    "chroma": from_image("chroma", ChromaImg2ImgPipeline, 1),
    "z-image": from_image("z-image", ZImageImg2ImgPipeline, 4),
}
LEGEND = f"""=: at speedup 1 each call equals the plain pipeline's to the bit; at {SPEEDUP:g} times fewer FLOPs the
first step's forwards, which the cache keeps, equal the plain ones' (a number: the largest difference over the largest
value), and each call equals to the bit what it gives on a newly enabled cache. Each column is several calls on one
pipeline, of {STEPS} steps unless it says so. img2img: in the class for image to image that diffusers has for the model.
path, unit, FLOPs and cache: of the first column."""


def measure(names: Sequence[str]) -> list[dict]:
    """A row for each of these pipelines."""
    rows = []
    for name in track(names, "pipelines"):
        entry = PIPES[name]
        pipe = entry.pipe()
        with silence(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cells = {column: judge(entry, check) for column, check in CHECKS.items()}
            if name in IMG2IMG:
                cells["img2img"] = judge(IMG2IMG[name], CHECKS["call"])
            refusals = {kind: refusal(entry, prepare) for kind, prepare in REFUSED.items()}
        rows.append(dict(pipeline=name, cls=type(pipe).__name__, transformer=type(pipe.transformer).__name__,
                         checks=cells, refusals=refusals))
    return rows


def shown(cell: dict | None) -> str:
    """A cell in few characters."""
    if cell is None or cell["result"] == "lacks":
        return "–"
    if "difference" not in cell:
        return cell["result"]
    text = "=" if cell["result"] == "equal" else f"{cell['difference']:.0e}"
    text += {"differs": ", DIFFERS"}.get(cell["result"], "")
    return text + ("" if cell["repeats"] else ", LEFTOVERS") + ("" if cell["felt"] else ", REUSES NOTHING")


def markdown(rows: Sequence[dict]) -> str:
    columns = [column for column in (*CHECKS, "img2img") if any(column in row["checks"] for row in rows)]
    lines = [f"| pipeline | {' | '.join(columns)} | path, unit | FLOPs | cache |", "|---" * (len(columns) + 4) + "|"]
    notes: dict[str, list[str]] = {}
    for row in rows:
        first = row["checks"]["call"]
        about = (f"{first['path']}, {first['unit']} | {first['speedup']:.2f}× | {first['nbytes']:,} B"
                 if "path" in first else "– | – | –")
        cells = [shown(row["checks"].get(column)) for column in columns]
        lines.append(f"| {row['cls']} ({row['pipeline']}) | {' | '.join(cells)} | {about} |")
        for column, cell in row["checks"].items():
            if "words" in cell:
                notes.setdefault(f"{column}, {cell['result']}: {cell['words']}", []).append(row["pipeline"])
            elif cell["path"] != first.get("path"):
                notes.setdefault(f"{column}, path: {cell['path']}", []).append(row["pipeline"])
    for kind in REFUSED:
        for words in dict.fromkeys(row["refusals"][kind] for row in rows):
            said = {None: "diffusers does not have it here", "": "NOT REFUSED"}.get(words, words)
            notes[f"{kind}: {said}"] = [row["pipeline"] for row in rows if row["refusals"][kind] == words]
    said = (f"- {note} ({'all' if len(names) == len(rows) else ', '.join(names)})" for note, names in notes.items())
    return "\n".join([*lines, "", LEGEND, "", *said])


def holds(rows: Sequence[dict]) -> bool:
    """Whether nothing is wrong that should be right."""
    cells = [cell for row in rows for cell in row["checks"].values()]
    good = all(cell["result"] == "lacks"
               or cell["result"] in ("equal", "close") and cell["repeats"] and cell["felt"] for cell in cells)
    return good and all(words != "" for row in rows for words in row["refusals"].values())
