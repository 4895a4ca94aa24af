"""Measured costs: what a schedule takes by a table, counted by hand; the table's file."""

import json
from dataclasses import replace

import pytest
import torch

from harmonica_dit.costs import Seconds
from harmonica_dit.flops import Flops
from harmonica_dit.forecaster import BranchForecaster, taylor
from harmonica_dit.methods import fora, trunk_forecast
from harmonica_dit.schedule import Schedule

NAMES = ("a", "b", "c")
FLOPS = Flops((1.0, 1.0, 1.0), 0.0)
TABLE = Seconds((5.0, 3.0, 2.0), 1.0, 0.25, 0.5, 0.125, 11.0, {"device": "an abacus", "shape": [1, 2, 2]})


def schedule_of(rows, **how):
    return Schedule(torch.tensor(rows, dtype=torch.bool), NAMES, FLOPS, **how)


ROWS = [[1, 1, 1], [1, 0, 0], [1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("how, seconds", [
    ({}, 4 * 1 + 10 + 5 + 10 + 2 + 2 * 0.125),  # two steps compute some of their branches
    # step 1 has one output to forecast from, so it repeats; step 3 forecasts a and b
    (dict(extrapolation=torch.ones(4, 3)), 31.25 + 2 * 0.25),
    # of second order a reads two further outputs (steps 0, 1, 2), b one (0, 2)
    (dict(forecaster=BranchForecaster(2)), 31.25 + 3 * 0.25)])
def test_seconds_of_a_trajectory_by_hand(how, seconds):
    schedule = schedule_of(ROWS, **how)
    assert TABLE.of_trajectory(schedule) == pytest.approx(seconds, abs=1e-12)
    assert schedule.speedup_by(TABLE) == pytest.approx(4 * 11 / seconds) != schedule.speedup


def test_entries_of_runs_are_counted_once_a_run():
    rows = [[1, 1, 1], [1, 1, 1], [0, 0, 0]]
    schedule = schedule_of(rows, extrapolation=torch.ones(3, 3), runs=(2, 1))
    assert TABLE.of_trajectory(schedule) == pytest.approx(3 * 1 + 20 + 2 * 0.25)


def test_a_step_whose_trunk_is_forecast_has_a_time_of_its_own():
    computed = [True, False, True, False]
    schedule = schedule_of([[c] * 3 for c in computed], forecaster=taylor(computed, 1, size=7))
    assert TABLE.of_trajectory(schedule) == pytest.approx(2 * 11 + 2 * 0.5)
    assert FLOPS.of_trajectory(schedule) == 2 * 3 + schedule.forecaster.flops(computed)


def test_for_a_routers_rows_all_is_linear_in_what_they_compute():
    """And right where all steps are mixed and all that is not computed is forecast."""
    linear = TABLE.of_router(forecasts=True)
    assert linear == replace(TABLE, branches=(4.75, 2.75, 1.75), fixed=1.875, forecast=0.0, mixed=0.0)
    assert TABLE.of_router(forecasts=False) == replace(TABLE, fixed=1.125, forecast=0.0, mixed=0.0)
    assert FLOPS.of_router(True) is FLOPS
    rows = [[1, 1, 1], [1, 1, 1], [0, 1, 0]]
    forecast = schedule_of(rows, extrapolation=torch.ones(3, 3))
    assert linear.of_trajectory(forecast) == pytest.approx(TABLE.of_trajectory(forecast) + 2 * 0.125)


def test_a_method_meets_a_speedup_in_measured_seconds():
    flops = Flops((1e4,) * 3, 0.0)
    net = type("Net", (), dict(branch_names=NAMES, name="it", flops=flops, trunk_flops=None, trunk_size=4))()
    for speedup in (1.3, 2.0, 3.0, 6.0):
        for method, skipped in ((fora, 1.0), (trunk_forecast, 0.5)):
            made = method(net, 20, speedup=speedup, costs=TABLE)
            computed = int(made.compute[:, 0].sum())
            found, with_one_more = (220 / (11 * n + skipped * (20 - n)) for n in (computed, computed + 1))
            assert found >= speedup > with_one_more
            assert made.flops == flops and made.speedup_by(TABLE) == pytest.approx(found)
        assert fora(net, 20, speedup=speedup).compute.sum() > fora(net, 20, speedup=speedup, costs=TABLE).compute.sum()
    with pytest.raises(ValueError, match=r"speedup: got 30, expected at most 7.333, .* only the first is computed"):
        fora(net, 20, speedup=30, costs=TABLE)
    with pytest.raises(ValueError, match="costs: expected 3 branches"):
        trunk_forecast(net, 20, speedup=2, costs=replace(TABLE, branches=(1.0,)))
    with pytest.raises(TypeError, match="costs: got str, expected Costs"):
        fora(net, 20, speedup=2, costs="time")


def test_speedups_compare_with_a_step_without_a_cache():
    """Which may take less than one that stores all it computes."""
    table, schedule = replace(TABLE, uncached=10.0), schedule_of(ROWS)
    assert schedule.speedup_by(table) == pytest.approx(4 * 10 / 31.25)
    assert table.speedup(schedule.compute) == pytest.approx(4 * 10 / 31)
    assert table.of_router(True).uncached == 10 and table.total == 11 and FLOPS.uncached == FLOPS.total
    net = type("Net", (), dict(branch_names=NAMES, name="it", flops=FLOPS))()
    made = fora(net, 20, speedup=2, costs=table)  # 9 steps would be 200 / 110
    assert made.compute[:, 0].sum() == 8 and made.speedup_by(table) == pytest.approx(200 / (8 * 11 + 12))


def test_a_table_comes_back_from_its_file(tmp_path):
    TABLE.save(tmp_path / "new" / "table.json")
    assert Seconds.load(tmp_path / "new" / "table.json") == TABLE


@pytest.mark.parametrize("change", [dict(fixed=-1.0), dict(trunk=float("nan")), dict(branches=[1.0, "x"]),
                                    dict(branches=3), dict(more=1), dict(forecast=None),
                                    dict(uncached=-1), dict(uncached=0), dict(trunk=True)])
def test_a_file_of_something_else_is_refused(tmp_path, change):
    path = tmp_path / "table.json"
    TABLE.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"table.json is no table of seconds"):
        Seconds.load(path)


def test_no_file_and_no_json_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file at .*nowhere.json"):
        Seconds.load(tmp_path / "nowhere.json")
    (tmp_path / "text.json").write_text("text")
    with pytest.raises(ValueError, match="text.json is no table of seconds"):
        Seconds.load(tmp_path / "text.json")
