"""Every method by name at a speedup in measured seconds, by a made-up table; in a pipeline too."""

import pytest

import harmonica_dit
from harmonica_dit import HarmoniCaConfig
from harmonica_dit.cli_compare import METHODS
from harmonica_dit.costs import Seconds
from harmonica_dit.evaluate.catalogue import CATALOGUE, Scheduled, make_methods
from harmonica_dit.methods.calibration import calibration_labels
from harmonica_dit.sample import sample
from harmonica_dit.sample.trajectory import FIRST_IMAGE
from support.enable_checks import check_refusal
from support.pipes import make_pipe, run
from support.plain_blocks import four_blocks

T, SPEEDUP = 20, 1.5
SLOW = Seconds((8.0, 1.0) * 4, 20.0, 0.1, 22.0, 0.5, 56.0)  # attention is slow, and so is what no schedule skips


@pytest.fixture(scope="module")
def net():
    return four_blocks()


def make(net, name, costs=None):
    (method,) = make_methods(net, [name], [SPEEDUP], T, costs=costs)
    if name == "first-block":  # whose speedup is that of the images it was calibrated on
        sample(net, calibration_labels(net, 16, 0), schedule=method.schedule, guidance=1.5, first=FIRST_IMAGE)
    return method.schedule


@pytest.mark.parametrize("name", [name for name, one in CATALOGUE.items() if isinstance(one, Scheduled)])
def test_a_speedup_in_time_is_reached_where_one_in_flops_falls_short(net, name):
    in_flops, in_time = make(net, name), make(net, name, SLOW)
    assert in_flops.speedup_by(SLOW) < SPEEDUP <= in_time.speedup_by(SLOW) < SPEEDUP * 1.4
    assert not in_time.compute.equal(in_flops.compute) and in_time.speedup > in_flops.speedup


def test_names_say_what_a_speedup_is_in_and_fewer_steps_are_as_many(net):
    names = ["fora", "fewer-steps", "dpm-solver++"]
    in_time, in_flops = (make_methods(net, names, [SPEEDUP], T, costs=costs) for costs in (SLOW, None))
    assert [one.name for one in in_time] == ["FORA 1.5× in time", "fewer steps 1.5× in time",
                                             "DPM-Solver++ 1.5× in time"]
    assert [one.steps for one in in_time] == [one.steps for one in in_flops] == [T, 13, 13]


def test_what_no_table_has_is_refused(net):
    with pytest.raises(ValueError, match="method: pruned at 1.5×: costs: what a narrower copy takes is in no table"):
        make_methods(net, ["pruned"], [SPEEDUP], T, catalogue=METHODS, costs=SLOW)
    for name in ("fora", "trunk", "step-search", "smoothcache", "delta-dit", "first-block"):
        with pytest.raises(ValueError, match=f"method: {name} at 1.5×: costs: expected 8 branches"):
            make_methods(net, [name], [SPEEDUP], T, costs=Seconds((1.0,), 1.0, 0.0, 1.0, 0.0, 2.0))


def test_a_pipeline_reaches_a_speedup_in_time():
    pipe, table = make_pipe("dit"), Seconds((8.0, 1.0) * 2, 6.0, 0.1, 7.0, 0.5, 24.0)
    summaries = []
    for config in (2.0, HarmoniCaConfig(speedup=2.0, costs=table)):
        harmonica_dit.enable_cache(pipe, config)
        run(pipe, steps=12)
        summaries.append(harmonica_dit.summary(pipe))
    in_flops, in_time = (one.streams[0].computed // 4 for one in summaries)
    assert in_flops > in_time == 3  # 12·24 / (3·24 + 9·7); of four 12·24 / (4·24 + 8·7)
    wrong = Seconds((1.0,), 1.0, 0.0, 1.0, 0.0, 2.0)
    check_refusal(pipe, ValueError, "costs: expected 4 branches", HarmoniCaConfig(speedup=2.0, costs=wrong))
    with pytest.raises(ValueError, match="costs: are what a speedup is in, got them with a schedule"):
        HarmoniCaConfig(schedule="fashion-dit-2.0x", costs=table)
    with pytest.raises(TypeError, match="costs: got str, expected measured Seconds"):
        HarmoniCaConfig(speedup=2.0, costs="time")
