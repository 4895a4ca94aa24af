"""`harmonica train --costs`: speedups in time, by a made-up table."""

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


@pytest.mark.parametrize("arguments, said", [
    (["--costs", "much"], "costs: got 'much'"), (["--costs", "nowhere.json"], "no file at nowhere.json"),
    (["--forecast", "accurate", "--costs", "ones"], "--costs: got 'ones', for a forecaster")])
def test_other_costs_are_refused(tmp_path, monkeypatch, arguments, said):
    monkeypatch.setattr(harmonica_dit, "load", lambda *_: pytest.fail("the work began"))
    result = harmonica("train", "--out", tmp_path, *arguments)
    assert result.exit_code == 2 and said in result.stderr
