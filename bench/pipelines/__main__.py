"""What `enable_cache` does on diffusers' pipelines, in four tables.

    python -m bench.pipelines table       what equals the plain pipeline, what is refused: every pipeline, 2 minutes
    python -m bench.pipelines overhead    other caches beside ours on several models: time, lines, leftovers
    python -m bench.pipelines quality     other caches beside ours on trained weights: errors of the images
    python -m bench.pipelines control     what becomes of a ControlNet's changes, on random weights

Each writes bench/results/pipelines-….json and prints Markdown. Only `overhead` measures time, and wants a machine to
itself.
"""

import argparse
import json
from pathlib import Path

import torch

from bench import RESULTS
from bench.pipelines import control, overhead, quality, table
from bench.record import machine, moment
from harmonica_dit.files import replacement
from support.many_pipes import PIPES


def write(path: Path, result: dict) -> None:
    with replacement(path) as made:
        made.write_text(json.dumps(machine() | moment() | result, indent=1, ensure_ascii=False) + "\n")


def make_table(args) -> None:
    rows = table.measure(args.only or list(PIPES))
    write(args.out or RESULTS / "pipelines-cpu.json", dict(steps=table.STEPS, speedup=table.SPEEDUP, rows=rows))
    print(table.markdown(rows))
    if not table.holds(rows):
        raise SystemExit("something is wrong that should be right; see the table")


def make_overhead(args) -> None:
    found = [overhead.measure(name, args.rounds, args.layers) for name in args.only or overhead.MODELS]
    write(args.out or RESULTS / "pipelines-overhead-cpu.json",
          dict(steps=overhead.STEPS, rounds=args.rounds, layers=args.layers, models=found))
    print(overhead.markdown(found))


def make_quality(args) -> None:
    rows = quality.measure(args.samples, args.seed)
    write(args.out or RESULTS / "pipelines-quality-cpu.json", dict(
        steps=quality.STEPS, guidance=quality.GUIDANCE, samples=args.samples, seed=args.seed, rows=rows))
    print(quality.markdown(rows))


def make_control(args) -> None:
    rows = control.measure()
    write(args.out or RESULTS / "pipelines-control-cpu.json", dict(steps=control.STEPS, rows=rows))
    print(control.markdown(rows))


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("table")
    made.add_argument("--only", nargs="*", choices=PIPES, metavar="NAME", help="pipelines, by their names in PIPES")
    made.set_defaults(run=make_table)
    made = commands.add_parser("overhead")
    made.add_argument("--only", nargs="*", choices=overhead.MODELS, metavar="NAME", help="models")
    made.add_argument("--rounds", type=int, default=7, help="each calls every candidate once")
    made.add_argument("--layers", type=int, help="in place of each model's own depths")
    made.set_defaults(run=make_overhead)
    made = commands.add_parser("quality")
    made.add_argument("--samples", type=int, default=100)
    made.add_argument("--seed", type=int, default=0)
    made.set_defaults(run=make_quality)
    commands.add_parser("control").set_defaults(run=make_control)
    for command in commands.choices.values():
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--out", type=Path, help="another file than that in bench/results")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()
