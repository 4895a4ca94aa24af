"""The solvers that `compare` takes as rivals are set as they were chosen."""

import json
from itertools import groupby

from bench import RESULTS
from harmonica_dit.evaluate.solvers import BEST


def test_the_rivals_have_the_settings_with_the_smallest_distance():
    """Each from the fewest steps on at which it had it, the first from one step on: so `best_solver` looks them up."""
    found = json.loads((RESULTS / "solvers-cpu.json").read_text())
    for row in found["chosen"]:
        of = [other for other in found["rows"] if (other["solver"], other["steps"]) == (row["solver"], row["steps"])]
        assert row == min(of, key=lambda row: row["frechet"])
    for solver, settings in BEST.items():
        chosen = sorted((row["steps"], (row["order"], row["spacing"])) for row in found["chosen"]
                        if row["solver"] == solver)
        (_, first), *others = [(next(run)[0], setting) for setting, run in groupby(chosen, key=lambda one: one[1])]
        assert list(settings.items()) == [*others[::-1], (1, first)]
