"""bench/forecasts.py and its neighbours: what is kept is found again, and the tables hold together."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import convergence, forecasts, generalisation
from harmonica_dit import load, sample
from harmonica_dit.sample.schedulers import make_scheduler


@pytest.fixture(scope="module")
def fashion():
    return load("fashion-dit")


def test_the_table_holds_together(fashion, tmp_path, monkeypatch):
    monkeypatch.setattr("harmonica_dit.evaluate.metrics.Judge._enough", True)
    monkeypatch.setattr("harmonica_dit.evaluate.bootstrap.RESAMPLES", 5)
    monkeypatch.setattr(forecasts, "ACCURATE", "DPM-Solver++, 20 steps")  # cheaper
    monkeypatch.setattr(forecasts.data, "FOLDER", tmp_path)  # no data set: no precision and recall
    names = ["DDIM, 20 steps", "trunk, n = 5, Adams", "branches, n = 5, order 2", "DDIM, 4 steps"]
    command = ["forecasts.py", "table", "--samples", "10", "--errors", "5", "--folder", str(tmp_path / "kept"),
               "--out", str(tmp_path / "rows.json"), "--only", *names]
    monkeypatch.setattr(sys, "argv", command)
    forecasts.main()
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert rows.keys() == set(names)
    base = rows["DDIM, 20 steps"]
    assert base["error"]["uncached"] == 0 and base["flops_speedup"] == 1 and base["error"]["accurate"] > 0
    for judged in base["judges"].values():
        assert judged["above"] == 0 and judged["interval"] == [0, 0]
    for name in names[1:]:
        assert rows[name]["error"]["uncached"] > 0 and rows[name]["flops_speedup"] > 3
        for judged in rows[name]["judges"].values():
            assert judged["interval"][0] <= judged["interval"][1] and "resampled" not in judged
    assert rows[names[1]]["parameters"] > 0

    kept = dict(name="kept", judges={})
    old = [kept, base | dict(samples=0), *map(rows.get, names[2:])]
    (tmp_path / "rows.json").write_text(json.dumps(dict(rows=old)))
    monkeypatch.setattr(sys, "argv", command[:-2])
    monkeypatch.setattr(forecasts, "markdown", str)
    forecasts.main()
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == [
        kept, base, *map(rows.get, names[2:]), rows[names[1]]]


def test_every_rival_has_a_name_of_its_own_and_is_what_it_says(fashion):
    every = list(forecasts.methods(fashion))
    assert len({method.name for method in every}) == len(every)
    by_name = {method.name: method for method in every}
    assert by_name["DDIM, 7 steps, evenly"].speedup(20) == pytest.approx(20 / 7, rel=1e-3)
    lines = forecasts.evenly_spaced(fashion, 7, 20)
    torch.testing.assert_close(sample(fashion, [1], schedule=lines), sample(fashion, [1], schedule=replace(
        lines, forecaster=replace(lines.forecaster, states=torch.zeros_like(lines.forecaster.states)))))
    assert forecasts.solver(fashion, "UniPC", 7, 2, "lu", 20) is None
    assert forecasts.solver(fashion, "DPM-Solver++", 7, 3, "karras", 20).scheduler.config.solver_order == 3


@pytest.mark.parametrize("steps, chosen", [(1, [0]), (4, [0, 6, 12, 18]), (5, [0, 5, 9, 14, 18]),
                                           (7, range(0, 19, 3)), (19, range(19)), (20, range(20))])
def test_even_timesteps_end_at_the_last_one_above_0(fashion, steps, chosen):
    times = make_scheduler("ddim", 20).timesteps.tolist()
    assert forecasts.evenly_spaced(fashion, steps, 20).timesteps == tuple(times[s] for s in chosen) and times[18] > 0
    assert times[19] == 0


def test_errors_of_each_half_of_the_labels(fashion, tmp_path, monkeypatch):
    monkeypatch.setattr(generalisation, "SHOWN", ("DDIM, 4 steps",))
    monkeypatch.setattr(generalisation, "ACCURATE", "DDIM, 5 steps")
    monkeypatch.setattr(sys, "argv", ["generalisation.py", "--guidance", "1", "3", "--samples", "10", "--folder",
                                      str(tmp_path / "kept"), "--out", str(tmp_path / "rows.json")])
    generalisation.main()
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["guidance"] for row in rows] == [1, 3]
    for row in rows:
        errors = row["errors"]["DDIM, 4 steps"]
        assert errors["all"] == pytest.approx((errors["first half"] + errors["second half"]) / 2) and errors["all"] > 0


def test_distances_between_solutions(fashion):
    few = {"a": (2, "ddim"), "b": (3, "ddim"), "again": (2, "ddim")}
    found = convergence.distances(fashion, 2, 0, few)
    assert found["a"]["again"] == 0 and found["a"]["b"] == found["b"]["a"] == found["b"]["again"] > 0


def test_spacings_that_are_not_tried_anew_stay(fashion, monkeypatch, tmp_path):
    kept, old = (dict(solver="UniPC", steps=7, order=2, spacing=spacing, frechet=d)
                 for spacing, d in (("trailing", 3.0), ("karras", 2.0)))
    (tmp_path / "chosen.json").write_text(json.dumps(dict(rows=[old, kept])))
    monkeypatch.setattr(forecasts, "CHOSEN", tmp_path / "chosen.json")
    monkeypatch.setattr(forecasts, "solver", lambda *_: None)  # has no such spacing
    forecasts.choose_solvers(fashion, SimpleNamespace(spacings=["karras"], samples=10, folder=tmp_path, seed=0))
    found = json.loads((tmp_path / "chosen.json").read_text())
    assert found["rows"] == found["chosen"] == [kept]
