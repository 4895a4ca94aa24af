"""What steps take: found from made-up times of the trajectories, and kept on disk. Nothing here is timed."""

import pytest
import torch

import harmonica_dit
from harmonica_dit.costs import Seconds
from harmonica_dit.models.dit import DiT
from harmonica_dit.sample import measure, measure_costs

TRUE = Seconds((5.0, 3.0) * 2, 1.0, 0.25, 0.5, 0.125, 16.0)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return DiT(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=4,
               name="tiny").requires_grad_(False)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache folder, an empty one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "harmonica"


@pytest.fixture
def timed(monkeypatch):
    """Every trajectory runs, and takes what a true table says; the trajectories' names, measurement by measurement."""
    seen = []

    def interleave(calls, rounds, **_):
        seen.append(list(calls))
        found = {}
        for name, call in calls.items():
            assert call().isfinite().all()
            (schedule,) = call.__defaults__
            found[name] = rounds * [10 * TRUE.uncached if schedule is None else TRUE.of_trajectory(schedule)]
        return found

    monkeypatch.setattr(measure, "interleave", interleave)
    return seen


def test_the_table_that_explains_the_times_is_found(net, timed):
    costs = measure_costs(net, batch=2)
    assert costs.branches == pytest.approx(TRUE.branches)
    assert (costs.fixed, costs.forecast, costs.trunk) == pytest.approx((1.0, 0.25, 0.5))
    assert (costs.mixed, costs.uncached) == pytest.approx((0.125, 16.0))
    assert timed == [["uncached", "computed", "repeated", "forecast", "trunk", "half repeated", "half forecast",
                      "kind 0", "kind 1"]]
    where = costs.where
    assert (where["model"], where["dtype"], where["shape"], where["batch"]) == ("tiny", "torch.float32", [1, 8, 8], 2)
    assert where["torch"] == torch.__version__ and where["threads"] == torch.get_num_threads() and where["device"]


def test_times_that_no_table_explains_are_met_in_the_middle(net, monkeypatch):
    """Branches that take less where all are computed: by so much less than alone, and by so much more than together."""
    def interleave(calls, rounds, **_):
        made = {name: call.__defaults__[0] for name, call in calls.items()}
        times = {name: [10 * 16 if one is None else TRUE.of_trajectory(one)] for name, one in made.items()}
        return times | {"computed": [0.8 * 10 * TRUE.total]}

    monkeypatch.setattr(measure, "interleave", interleave)
    costs = measure_costs(net, batch=2)
    assert 0.8 < costs.total / TRUE.total < 1 and costs.uncached == 16
    assert costs.branches[0] > costs.branches[1] == costs.branches[3]


def test_branches_may_all_be_of_one_kind(net, timed, monkeypatch):
    monkeypatch.setattr(DiT, "branch_names", ("a.x", "b.x", "c.x", "d.x"))
    monkeypatch.setattr(measure, "count_flops", lambda net: harmonica_dit.flops.Flops((1.0,) * 4, 1.0))
    assert measure_costs(net, batch=2).branches == pytest.approx((4.0,) * 4, rel=0.1)


def test_it_is_measured_once(net, timed, cache, tmp_path):
    first = measure_costs(net, batch=2)
    assert measure_costs(net, batch=2) == first and len(timed) == 1 and len(list(cache.iterdir())) == 1
    for other in (dict(batch=1), dict(batch=2, guidance=1.0), dict(batch=2, scheduler="iddpm")):
        measure_costs(net, **other)
    assert len(timed) == 4 == len(list(cache.iterdir()))
    measure_costs(net, batch=2, path=tmp_path / "mine.json")
    assert len(timed) == 5 and Seconds.load(tmp_path / "mine.json").branches == pytest.approx(first.branches)


def test_a_file_of_another_measurement_is_refused(net, timed, tmp_path):
    measure_costs(net, batch=2, path=tmp_path / "mine.json")
    with pytest.raises(ValueError, match="path: .*mine.json was measured with batch=2, here it is 3; give"):
        measure_costs(net, batch=3, path=tmp_path / "mine.json")


def test_times_that_are_noise_make_no_table(net, monkeypatch, cache):
    monkeypatch.setattr(measure, "interleave", lambda calls, rounds, **_: dict.fromkeys(calls, [1.0]))
    with pytest.raises(RuntimeError, match="net: what its branches take cannot be told from noise: 0.1 s a step"):
        measure_costs(net, batch=2)
    assert not cache.exists()


@pytest.mark.parametrize("wrong", [dict(batch=0), dict(batch=1, rounds=0)])
def test_what_is_out_of_range_is_refused(net, wrong):
    with pytest.raises(ValueError, match="expected a whole number from 1 on"):
        measure_costs(net, **wrong)
