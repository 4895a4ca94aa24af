"""`--costs` of `harmonica train`, `schedule` and `compare`: speedups in time, by a made-up table."""

import json
from functools import partial

import pytest
from typer.testing import CliRunner

import harmonica_dit.cli
from harmonica_dit.costs import Seconds
from harmonica_dit.evaluate import read_schedule
from harmonica_dit.schedule import Schedule
from harmonica_dit.train import train_forecaster

TINY = ["--steps", "3", "--trajectories", "2", "--batch", "1"]


def harmonica(*arguments):
    return CliRunner().invoke(harmonica_dit.cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def seconds(monkeypatch):
    """What is measured, wherever it is: attention takes long."""
    table = Seconds((8.0, 1.0) * 8, 1.0, 0.1, 2.0, 0.5, 72.0)
    for module in ("harmonica_dit", "harmonica_dit.train.start"):
        monkeypatch.setattr(f"{module}.measure_costs", lambda net, **_: table)
    return table


@pytest.mark.parametrize("kept", [False, True])
def test_a_speedup_in_time(tmp_path, monkeypatch, seconds, kept):
    """Of a router, of a forecaster; measured now, or read from a file."""
    file = tmp_path / "measured.json"
    seconds.save(file)
    costs = file if kept else "time"
    result = harmonica("train", *TINY, "--target-speedup", 1.5, "--costs", costs, "--out", tmp_path / "router")
    assert result.exit_code == 1, result.output  # in three steps few entries make a large difference
    assert "harmonica: --target-speedup=1.5: the nearest schedule" in result.stderr
    schedule = read_schedule(tmp_path / "router" / "router.safetensors")
    assert schedule.speedup_by(seconds) >= 1.5 - 1e-9
    assert f"in time by what was measured {schedule.speedup_by(seconds):.2f}×" in " ".join(result.output.split())
    monkeypatch.setattr("harmonica_dit.train.train_forecaster", partial(train_forecaster, images=2, held_out=2))
    result = harmonica("train", "--forecast", "uncached", "--steps", 4, "--iterations", 1, "--batch", 2,
                       "--target-speedup", 1.5, "--costs", costs, "--out", tmp_path / "forecast")
    assert result.exit_code == 0, result.output
    schedule = Schedule.load(tmp_path / "forecast" / "forecast.safetensors")
    assert schedule.compute[:, 0].sum() == 2  # 4·72 / (2·73 + 2·2)
    assert f"measured {schedule.speedup_by(seconds):.2f}×" in " ".join(result.output.split())


@pytest.mark.parametrize("kept", [False, True])
def test_schedules_and_comparisons_at_a_speedup_in_time(tmp_path, monkeypatch, kept):
    """Which one computed step reaches, where in FLOPs two do."""
    slow, file = Seconds((8.0, 1.0) * 8, 40.0, 0.1, 40.0, 0.5, 112.0), tmp_path / "measured.json"
    monkeypatch.setattr("harmonica_dit.measure_costs", lambda net, **_: slow)
    slow.save(file)
    in_time = ["--speedup", 1.5, "--costs", file if kept else "time", "--steps", 4]
    result = harmonica("schedule", "--method", "trunk", *in_time, "--out", tmp_path / "trunk.safetensors")
    assert result.exit_code == 0, result.output
    schedule = Schedule.load(tmp_path / "trunk.safetensors")
    assert schedule.compute[:, 0].sum() == 1 and schedule.speedup_by(slow) == 448 / 232  # two steps: 448 / 304
    assert schedule.speedup > 2.5 and "in time by what was measured 1.93×" in " ".join(result.output.split())
    result = harmonica("compare", "--method", "trunk", *in_time, "--samples", 1, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    row = json.loads((tmp_path / "out" / "rows.json").read_text())["rows"][1]
    assert (row["name"], row["cur"]) == ("trunk forecast 1.5× in time", 0.75)


def test_what_is_measured_is_what_is_sampled(tmp_path, monkeypatch, seconds):
    """As many images at a time, with the same guidance and scheduler."""
    asked = []
    monkeypatch.setattr("harmonica_dit.measure_costs", lambda net, **how: asked.append(how) or seconds)
    harmonica("schedule", "--speedup", 1.5, "--costs", "time", "--batch", 3, "--out", tmp_path / "s.safetensors")
    harmonica("compare", "--method", "fora", "--speedup", 1.5, "--costs", "time", "--batch", 5, "--guidance", 2,
              "--samples", 1, "--steps", 4, "--out", tmp_path / "out")
    assert asked == [dict(batch=3, guidance=None, scheduler=None), dict(batch=5, guidance=2.0, scheduler="ddim")]


@pytest.mark.parametrize("command", [["schedule", "--speedup", 2, "--out", "x.safetensors"], ["compare", "--out", "x"]])
@pytest.mark.parametrize("costs, said", [("much", "--costs: got 'much', expected"), ("no.json", "no file at no.json")])
def test_other_costs_of_methods_are_refused_before_the_model_is_loaded(tmp_path, monkeypatch, command, costs, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harmonica_dit, "load", lambda *_, **__: pytest.fail("the work began"))
    result = harmonica(*command, "--costs", costs)
    assert result.exit_code == 2 and said in result.stderr


def test_costs_are_a_speedups(tmp_path):
    result = harmonica("schedule", "--every", 2, "--costs", "time", "--out", tmp_path / "x.safetensors")
    assert result.exit_code == 2 and "--costs: is what --speedup is in; --every has none" in result.stderr


@pytest.mark.parametrize("arguments, said", [
    (["--costs", "much"], "costs: got 'much'"), (["--costs", "nowhere.json"], "no file at nowhere.json"),
    (["--forecast", "accurate", "--costs", "ones"], "--costs: got 'ones', expected")])
def test_other_costs_are_refused(tmp_path, monkeypatch, arguments, said):
    monkeypatch.setattr(harmonica_dit, "load", lambda *_: pytest.fail("the work began"))
    result = harmonica("train", "--out", tmp_path, *arguments)
    assert result.exit_code == 2 and said in result.stderr
