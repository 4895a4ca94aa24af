"""The solvers that `compare` takes as rivals are set as they were chosen."""

import json
from itertools import groupby

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

import harmonica_dit
from bench import RESULTS
from harmonica_dit.evaluate.solvers import BEST, EVENLY, SOLVERS, solver
from harmonica_dit.sample.schedulers import make_scheduler


def test_solvers_take_the_same_evenly_spaced_timesteps():
    net, made = harmonica_dit.load("fashion-dit"), []
    for name in SOLVERS:
        method = solver(net, name, 7, 3, EVENLY, 20)
        made.append(make_scheduler(method.scheduler, 7, net, method.schedule.timesteps))
    dpm, unipc = made
    assert isinstance(dpm, DPMSolverMultistepScheduler) and isinstance(unipc, UniPCMultistepScheduler)
    assert unipc.timesteps.tolist() == dpm.timesteps.tolist() == [999, 841, 684, 526, 368, 210, 53]
    torch.testing.assert_close(unipc.sigmas, dpm.sigmas)  # diffusers' own


def test_the_rivals_have_the_settings_with_the_smallest_distance():
    """Each from the fewest steps on at which it had it, the first from one step on: so `best_solver` looks them up."""
    found = json.loads((RESULTS / "solvers-cpu.json").read_text())
    for row in found["chosen"]:
        of = [other for other in found["rows"] if (other["solver"], other["steps"]) == (row["solver"], row["steps"])]
        assert row == min(of, key=lambda row: row["frechet"])
    for name, settings in BEST.items():
        chosen = sorted((row["steps"], (row["order"], row["spacing"])) for row in found["chosen"]
                        if row["solver"] == name)
        (_, first), *others = [(next(run)[0], setting) for setting, run in groupby(chosen, key=lambda one: one[1])]
        assert list(settings.items()) == [*others[::-1], (1, first)]
