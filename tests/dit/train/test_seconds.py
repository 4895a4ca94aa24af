"""train_router by measured seconds, of made-up tables: what it weighs by, meets, and keeps for the next call."""

import csv
from dataclasses import replace

import pytest
import torch

import harmonica_dit.train.train as module
from harmonica_dit.costs import Seconds
from harmonica_dit.flops import count_flops
from harmonica_dit.train import start, train_router

SMALL = dict(steps=4, batch=2, lr=0.1, refresh=12, progress=False, trajectories=3)
pytestmark = pytest.mark.filterwarnings("ignore:target_")  # twelve entries cannot meet a target to 2 %


@pytest.fixture
def table(net):
    """Attention takes long, which has few FLOPs; a forecast takes a tenth of the quickest branch."""
    return Seconds((8.0, 1.0) * (len(net.branch_names) // 2), 1.0, 0.1, 0.5, 0.0, 18.5)


@pytest.fixture
def measured(monkeypatch, table):
    """Each measurement's options. They find the table, later ones another."""
    seen = []

    def measure_costs(net, **options):
        seen.append(options)
        return table if len(seen) == 1 else replace(table, fixed=2.0)

    monkeypatch.setattr(start, "measure_costs", measure_costs)
    return seen


@pytest.fixture
def weighed(monkeypatch):
    """The branches' costs c_k in each trajectory."""
    seen, real = [], module.train_trajectory

    def train_trajectory(router, student, optimizer, importance, costs, *arguments, **options):
        seen.append(costs)
        return real(router, student, optimizer, importance, costs, *arguments, **options)

    monkeypatch.setattr(module, "train_trajectory", train_trajectory)
    return seen


@pytest.mark.parametrize("extrapolation", [0, 1.0])
def test_the_target_is_met_and_branches_are_weighed_in_seconds(net, table, weighed, extrapolation):
    router = train_router(net, target_speedup=1.5, costs=table, extrapolation=extrapolation, **SMALL)
    schedule = router.schedule()
    lower = router.schedule(router.scores()[~schedule.compute].max().item() - 1e-6)  # the next entry is computed too
    assert lower.speedup_by(table) < 1.5 <= schedule.speedup_by(table) + 1e-9 and router.flops == count_flops(net)
    c = torch.tensor(table.branches)
    torch.testing.assert_close(weighed[-1], c / c.mean())


def test_costs_of_one_count_the_target_in_flops(net, weighed):
    router = train_router(net, target_speedup=1.5, costs="ones", **SMALL)
    assert weighed[0].tolist() == [1.0] * len(net.branch_names) and router.schedule().speedup >= 1.5


def test_time_is_measured_for_this_training_once(net, table, measured, tmp_path):
    whole = train_router(net, target_speedup=1.5, costs="time", out=tmp_path, **SMALL)
    assert measured == [dict(batch=2, guidance=net.guidance, scheduler=net.scheduler)]
    assert Seconds.load(tmp_path / "costs.json") == table
    (tmp_path / "checkpoint.safetensors").unlink()
    again = train_router(net, target_speedup=1.5, costs="time", out=tmp_path, **SMALL)
    assert len(measured) == 1 and again.threshold == whole.threshold and again.beta == whole.beta
    assert torch.equal(again.scores(), whole.scores())


def test_the_log_tells_the_speedup_in_seconds(net, table, tmp_path):
    router = train_router(net, beta=1e-5, costs=table, threshold=0.5, out=tmp_path, **SMALL | dict(trajectories=1))
    with open(tmp_path / "log.csv") as file:
        (line,) = csv.DictReader(file)
    assert float(line["speedup"]) == router.schedule().speedup_by(table) != router.schedule().speedup


def test_without_a_folder_it_is_measured_too(net, table, measured):
    router = train_router(net, target_speedup=1.5, costs="time", **SMALL)
    assert len(measured) == 1 and router.schedule().speedup_by(table) >= 1.5 - 1e-9


def test_a_folder_that_cannot_be_written_is_known_before_measuring(net, measured, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write"):
        train_router(net, target_speedup=1.5, costs="time", out=tmp_path / "file", **SMALL)
    assert not measured


def test_a_training_goes_on_by_the_same_table_only(net, table, tmp_path):
    train_router(net, beta=1e-5, costs=table, out=tmp_path, **SMALL)
    train_router(net, beta=1e-5, costs=replace(table), out=tmp_path, **SMALL)
    with pytest.raises(ValueError, match="is of a training with costs="):
        train_router(net, beta=1e-5, costs=replace(table, fixed=2.0), out=tmp_path, **SMALL)


@pytest.mark.parametrize("change, said", [
    (dict(branches=(1.0,)), "costs: expected 4 branches"),
    (dict(branches=(0.0, 1.0, 1.0, 1.0)), "costs: the branch 'blocks.0.attn' costs nothing"),
    (dict(fixed=1e3, uncached=1020.0), "target_speedup: got 1.5, expected a number above 1 and up to 1.01")])
def test_a_table_that_cannot_serve_is_refused(net, table, change, said):
    with pytest.raises(ValueError, match=said):
        train_router(net, target_speedup=1.5, costs=replace(table, **change), **SMALL)
