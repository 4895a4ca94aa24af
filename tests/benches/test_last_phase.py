"""bench/last_phase.py: every way goes on from the same start and does what it says."""

import csv
import warnings
from pathlib import Path

import pytest
import torch

from bench import last_phase as bench
from harmonica_dit import load
from harmonica_dit.train.budget import Budget
from harmonica_dit.train.student import Student


def log(folder: Path) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_way_goes_on_from_one_start(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "STEPS", 4)
    net, learn, seen = load("fashion-dit"), Student.learn, []
    monkeypatch.setattr(Student, "learn", lambda self, r, *rest: seen.append(r.detach()) or learn(self, r, *rest))
    routers, rows = {}, {}
    for way in (bench.USUAL, bench.MONOTONE, bench.GROWING, bench.HARD):
        with warnings.catch_warnings(action="ignore"):  # so short trainings meet no target
            routers[way] = bench.train(net, way, tmp_path, start=2, total=4, batch=1, progress=False)
        rows[way] = torch.stack(seen[-6:])
        assert [row["loss"] for row in log(tmp_path / way.replace(" ", "-").replace(",", ""))[:2]] == [
            row["loss"] for row in log(tmp_path / "start")]
    hard = {way: bool(((r == 0) | (r == 1)).all()) for way, r in rows.items()}
    assert hard == dict.fromkeys(routers, False) | {bench.HARD: True}
    scores = [router.scores() for router in routers.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(scores) for b in scores[:i])
    assert routers[bench.GROWING].soft_share < routers[bench.USUAL].soft_share
    assert list(bench.raw_means(tmp_path / "as-before")) == [0]


def test_pulling_apart_puts_the_cut_at_the_threshold():
    router = bench.Router.load("fashion-dit-2.0x")
    budget, before = Budget(router.flops, router.steps, speedup=bench.SPEEDUP), router.scores()[1:]
    for _ in range(2):
        bench.pull_apart(router, 0.5, 2)
    assert budget.threshold(router) == pytest.approx(0.5, abs=1e-2)
    assert router.soft_share < 0.2
    after = router.scores()[1:]
    order = before.flatten().argsort()
    assert (after.flatten()[order].diff() >= 0).all()
