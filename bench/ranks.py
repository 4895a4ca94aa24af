"""What ranks tell each other in a training of the bundled model, and how much less each has to compute.

    torchrun --nproc-per-node 2 -m bench.ranks    its row of bench/results/ranks-cpu.json; under a minute on one core

Also without torchrun, as one rank, to which the others' seconds compare. Seconds are a rank's own on the processor, so
that ranks that share cores do not slow each other down in them; waiting is not among them. λ is measured in the first
trajectory alone, which is not in the table's other lines.
"""

import json
import time
import warnings
from contextlib import contextmanager

import torch.distributed as dist

import harmonica_dit
from bench import RESULTS
from bench.record import machine, moment
from harmonica_dit import ranks
from harmonica_dit.files import replacement
from harmonica_dit.train.log import Log

OUT = RESULTS / "ranks-cpu.json"
STEPS, BATCH, TRAJECTORIES, ITERATIONS = 10, 8, 4, 4
warnings.simplefilter("ignore")  # so short trainings meet no target


@contextmanager
def counted(sent: list[int]):
    """Notes the bytes of each mean."""
    whole = dist.all_reduce

    def all_reduce(tensor, *arguments, **options):
        sent.append(tensor.nbytes)
        return whole(tensor, *arguments, **options)

    dist.all_reduce = all_reduce
    try:
        yield
    finally:
        dist.all_reduce = whole


def measure() -> list[tuple[str, int, int, float]]:
    """What, means taken in it, their bytes, and this rank's seconds."""
    net, sent, marks = harmonica_dit.load("fashion-dit"), [], []
    mark = lambda *_, **__: marks.append((len(sent), sum(sent), time.process_time()))
    line = Log.line
    Log.line = lambda self, **values: (mark(), line(self, **values))
    with counted(sent):
        mark()
        harmonica_dit.train_router(net, steps=STEPS, batch=BATCH, trajectories=TRAJECTORIES, target_speedup=1.6,
                                   refresh=10**6, progress=False)
        (first, *_, before, last), found = marks[-TRAJECTORIES - 1 :], []
        found.append(("trajectory with λ", *(b - a for a, b in zip(first, marks[-TRAJECTORIES]))))
        found.append(("trajectory", *(b - a for a, b in zip(before, last))))
        took = []
        for iterations in (1, 1 + ITERATIONS):
            mark()
            harmonica_dit.train_forecaster(net, 2.0, steps=STEPS, batch=BATCH, iterations=iterations, images=BATCH,
                                           held_out=1, target="uncached", progress=False)
            mark()
            took.append([b - a for a, b in zip(*marks[-2:])])
        messages, size, seconds = ((b - a) / ITERATIONS for a, b in zip(*took))
        found.append(("forecast iteration", messages, size, seconds))
    Log.line = line
    return found


def write(rows: list[tuple[str, int, int, float]]) -> None:
    """This number of ranks' row of the file; the others stay."""
    kept = json.loads(OUT.read_text()) if OUT.exists() else {}
    kept[str(ranks.world())] = moment() | machine() | dict(steps=STEPS, batch=BATCH, rows=[
        dict(what=what, means=messages, bytes=size, seconds=seconds) for what, messages, size, seconds in rows])
    with replacement(OUT) as path:
        path.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    with ranks.launched():
        rows = measure()
        if ranks.is_main():
            write(rows)
            print(f"ranks: {ranks.world()}, steps: {STEPS}, batch: {BATCH}")
            print(f"{'':20}{'means':>8}{'bytes':>10}{'seconds':>10}")
            for what, messages, size, seconds in rows:
                print(f"{what:20}{messages:8.0f}{size:10,.0f}{seconds:10.2f}")
