"""The short calls of bench/gpu.sh end in time."""

import re

import pytest

from bench import ROOT

SCRIPT = (ROOT / "bench/gpu.sh").read_text()
GROUPS = {name: (parts.split(), int(seconds)) for name, parts, seconds in re.findall(
    r"^    (\w+)\) set -- ([\w ]+); seconds_of_all=(\d+) ;;", SCRIPT, re.M)}


@pytest.mark.parametrize("group, most", dict(a=300, k=180, b2=400, b16=400, c=540).items())
def test_the_parts_of_a_group_fit_into_its_seconds(group, most):
    """By what they took, or are thought to take, in order, and without what is kept for the last merge."""
    limits, takes = {}, {}
    for part, limit, taken in re.findall(r"^    (\w+) +(\d+)   # \(?(\d+)\)?", SCRIPT.split('parts="')[1], re.M):
        limits[part], takes[part] = int(limit), int(taken)
    parts, seconds = GROUPS[group]
    assert seconds == most and len(GROUPS) == 5
    assert sorted(parts, key=list(limits).index) == parts, "in the order in which they run"
    assert all(takes[part] < limits[part] for part in limits)
    assert sum(takes[part] for part in parts) <= seconds - 20
    if group.startswith("b"):
        assert takes["build"] + takes["attention"] + limits[parts[-1]] <= seconds - 20
