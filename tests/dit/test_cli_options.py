"""What options are when they are not given: as the files say that are."""

from types import SimpleNamespace

import pytest

import harmonica_dit
from harmonica_dit.cli_options import scheduler_value


def test_files_agree_on_a_scheduler():
    """One that names no settings has the model's; what one diffusers has set and another has not may differ."""
    net = harmonica_dit.load("fashion-dit")
    dpm = dict(scheduler="DPMSolverMultistepScheduler", steps=20)
    second, third, older, named = (SimpleNamespace(**dpm, scheduler_config=config) for config in (
        {"solver_order": 2, "use_lu_lambdas": False}, {"solver_order": 3}, {"solver_order": 2}, None))
    plain = SimpleNamespace(scheduler=None, scheduler_config=None)
    assert scheduler_value(None, [named, plain, None], net) == dpm["scheduler"]
    assert scheduler_value("ddim", [second, third], net) == "ddim"
    for agreeing in ([second, older], [older, second, plain], [second, named], [third, plain]):
        order = agreeing[0].scheduler_config["solver_order"]
        assert scheduler_value(None, agreeing, net).config.solver_order == order
    for differing in ([second, third], [third, named], [named, older, third]):
        with pytest.raises(ValueError, match="DPMSolverMultistepScheduler of different settings"):
            scheduler_value(None, differing, net)
    few = SimpleNamespace(scheduler="PNDMScheduler", scheduler_config={"num_train_timesteps": 1000}, steps=4)
    assert scheduler_value(None, [few], net).config.num_train_timesteps == 1000  # it has no trajectory of one step
