"""Other caches beside ours on several models: `python -m bench.pipelines overhead`.

The models are real classes with random weights, so large that a forward takes some milliseconds. Each method is put on
a pipeline twice: so that it computes everything, which shows what it costs, and so that it computes about every second
step. Of random weights errors say nothing; see quality.py for them.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

from diffusers import DiffusionPipeline
from rich.progress import track
from torch import Tensor

from bench.bench_caches import silence
from bench.pipelines.checks import relative_difference, words
from bench.pipelines.leftovers import LEFTOVERS, leftovers
from bench.pipelines.rivals import RIVALS, Rival, ours, put, tune
from bench.problems import random_weights
from bench.record import installed_version
from bench.timing import quartiles
from harmonica_dit.flops import flop_counter
from harmonica_dit.timing import interleave, medians
from support.many_pipes import PIPES
from support.small_pipe import SmallPipe

STEPS = 20
HALF = 0.5  # of the FLOPs: what settings with a threshold are tuned to
KINDS = ("everything", "second")  # of a Rival's settings


@dataclass(frozen=True)
class Model:
    """An entry of PIPES with a larger transformer. call: its arguments. layers: the names of its depths."""

    entry: str
    transformer: dict
    call: dict = field(default_factory=dict)
    unguided: bool = False  # guidance is an input of the model, so that a step is one forward
    layers: tuple[str, ...] = ("num_layers",)

    def pipe(self, layers: int | None = None) -> DiffusionPipeline:
        pipe = PIPES[self.entry].pipe()
        old = pipe.transformer
        config = {name: value for name, value in old.config.items() if not name.startswith("_")} | self.transformer
        if layers is not None:
            config |= dict.fromkeys(self.layers, layers)
        pipe.register_modules(transformer=random_weights(type(old)(**config)))
        return pipe

    def run(self, pipe: DiffusionPipeline, steps: int = STEPS, **changes) -> Tensor:
        entry: SmallPipe = PIPES[self.entry]
        return entry.call(pipe, steps=steps, **(entry.unguided if self.unguided else {}) | self.call | changes)


MODELS: dict[str, Model] = {
    "dit": Model("dit", dict(num_attention_heads=16, num_layers=8, sample_size=16)),
    "sd3": Model("sd3", dict(num_attention_heads=16, num_layers=4, caption_projection_dim=128),
                 dict(height=128, width=128)),
    "flux": Model("flux", dict(num_attention_heads=8, num_layers=3, num_single_layers=6), dict(height=128, width=128),
                  unguided=True, layers=("num_layers", "num_single_layers")),
    "qwen": Model("qwen", dict(num_attention_heads=8, num_layers=4), dict(height=128, width=128)),
    "wan": Model("wan", dict(num_attention_heads=10, ffn_dim=480, num_layers=6), dict(height=64, width=96)),
    "hunyuan-video": Model("hunyuan-video", dict(num_attention_heads=16, num_layers=3, num_single_layers=6),
                           dict(height=64, width=96), unguided=True, layers=("num_layers", "num_single_layers")),
    "ltx": Model("ltx", dict(num_attention_heads=10, cross_attention_dim=120, num_layers=6),
                 dict(height=128, width=192)),
}


def measure(name: str, rounds: int, layers: int | None = None, steps: int = STEPS,
            rivals: Mapping[str, Rival] | None = None) -> dict:
    """A model's rows, one for each method, and the plain pipeline's time. A method that cannot run says why."""
    model = MODELS[name]
    pipe = model.pipe(layers)
    candidates = {key: partial(model.run, pipe, steps) for key in ("plain", "plain again")}
    rows = {}
    with silence(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, whole = model.run(pipe, steps), flops_of(candidates["plain"])
        for method, rival in track((RIVALS if rivals is None else rivals).items(), name):
            rows[method] = row = dict(method=method, lines=rival.lines(pipe), note=rival.note)
            if installed_version(rival.package) is None:
                row["words"] = f"{rival.package} is not installed"
                continue
            for kind in KINDS:
                try:
                    settings = settle(rival, getattr(rival, kind), model, pipe, steps, whole)
                    run = partial(model.run, put(rival, pipe, steps, settings), steps)
                    row[kind] = dict(settings=settings) | examine(run, plain, whole)
                except Exception as error:  # whatever their code raises is the finding
                    if rival.method is ours:
                        raise
                    row[kind] = dict(words=words(error))
                    continue
                candidates[f"{method}: {kind}"] = run
            if "words" not in row["second"]:
                row["leftovers"] = leftovers(partial(put, rival, pipe, steps, row["second"]["settings"]), model.run,
                                             steps)
        seconds = interleave(candidates, rounds)
    add_times(rows, seconds, steps)
    return dict(model=name, plain_ms=1000 * medians(seconds)["plain"] / steps, again=ratios(seconds, "plain again"),
                rows=list(rows.values()))


def settle(rival: Rival, settings: dict, model: Model, pipe: DiffusionPipeline, steps: int, whole: float) -> dict:
    """The settings, with a threshold that was to be found."""
    if settings.get("threshold", 0.0) is not None:
        return settings
    return tune(rival, settings, lambda tried: flops_of(partial(
        model.run, put(rival, pipe, steps, tried), steps)) / whole, HALF)


def examine(run: Callable[[], Tensor], plain: Tensor, whole: float) -> dict:
    """What a method gives, and what share of the FLOPs it computes."""
    output = run()
    return dict(difference=relative_difference(output, plain), flops=flops_of(run) / whole)


def flops_of(run: Callable[[], object]) -> float:
    with flop_counter() as counter:
        run()
    return counter.get_total_flops()


def add_times(rows: Mapping[str, dict], seconds: Mapping[str, Sequence[float]], steps: int) -> None:
    """A call's time over the plain pipeline's, round by round; and how much longer a step takes, in milliseconds."""
    for method, row in rows.items():
        for kind in KINDS:
            key = f"{method}: {kind}"
            if key in seconds:
                more = median(one - plain for one, plain in zip(seconds[key], seconds["plain"]))
                row[kind] |= dict(time=ratios(seconds, key), more_ms=1000 * more / steps)


def ratios(seconds: Mapping[str, Sequence[float]], name: str) -> list[float]:
    """Quartiles of the rounds' ratios to the plain pipeline."""
    return quartiles([one / plain for one, plain in zip(seconds[name], seconds["plain"])])


def markdown(found: Sequence[dict]) -> str:
    lines = []
    for model in found:
        low, middle, high = model["again"]
        lines += [f"**{model['model']}**: {model['plain_ms']:.1f} ms a step; the plain pipeline again: {middle:.3f} "
                  f"({low:.3f} … {high:.3f}) times that", "",
                  "| method | lines | all computed: time | more, ms a step | output | FLOPs | time | second call "
                  "| after an interruption | other steps |", "|---" * 10 + "|"]
        notes = []
        for row in model["rows"]:
            said = [row["words"]] if "words" in row else [row[kind]["words"] for kind in KINDS if "words" in row[kind]]
            notes += [f"- {row['method']}: {text}" for text in dict.fromkeys(said)]
            lines.append(f"| {row['method']} | {row['lines']} | {' | '.join(cells(row))} |")
        lines += ["", *notes, ""] if notes else [""]
    return "\n".join(lines)


def cells(row: dict) -> list[str]:
    everything, second, after = (row.get(name, {}) for name in (*KINDS, "leftovers"))
    made = [f"{timed(everything)}", f"{everything['more_ms']:+.2f}" if "time" in everything else "–",
            "–" if "difference" not in everything else
            "=" if everything["difference"] == 0 else f"{everything['difference']:.0e}",
            f"{second['flops']:.0%}" if "flops" in second else "fails", timed(second)]
    return made + [after.get(name, "–") for name in LEFTOVERS]


def timed(of: dict) -> str:
    if "time" not in of:
        return "fails"
    low, middle, high = of["time"]
    return f"{middle:.3f} ({low:.3f} … {high:.3f})"
