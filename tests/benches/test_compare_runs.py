"""bench/compare.py on made-up files: what has changed beyond noise, whatever the machine's load."""

import json

import numpy as np
import pytest

from bench import compare

MACHINE = dict(processor="some", cores=2, threads=2, python="3.11.2", versions=dict(torch="2.13.0"))
LOAD = (1.0, 1.0, 3.0, 1.2, 1.0, 1.1, 1.0)  # of each round; the machine is slow in the third
NOISE = (1.0, 0.99, 1.02, 1.0, 1.01, 1.03, 0.98)


@pytest.fixture
def made(tmp_path):
    """Writes a file of candidates whose times are these times plain PyTorch's, at a load; all candidates feel it."""
    def write(name, ratios, load=LOAD, rounds=7, noise=NOISE, **machine):
        def entry(candidate, seconds):
            return dict(name="test", extra_info=dict(what="a step", candidate=candidate, yardstick="plain"),
                        stats=dict(data=seconds))

        plain = [0.1 * slower for slower in load[:rounds]]
        entries = [entry("plain", plain)] + [
            entry(candidate, [ratio * one * own for one, own in zip(plain, noise)])
            for candidate, ratio in ratios.items()]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(dict(machine_info=MACHINE | machine, benchmarks=entries)))
        return path
    return write


def verdicts(old, new) -> dict:
    return {row["candidate"]: row.get("verdict") for row in compare.compare(compare.read(old)[0], compare.read(new)[0])}


def test_what_is_slower_and_faster_at_another_load(made, capsys):
    old = made("old", {"ours": 0.5, "rival": 0.8, "third": 1.0, "gone": 1.0})
    new = made("new", {"ours": 0.6, "rival": 0.7, "third": 1.02, "come": 1.0}, load=[4 * one for one in LOAD[::-1]])
    assert verdicts(old, new) == {"plain": None, "ours": "slower", "rival": "faster", "third": "the same",
                                  "gone": "missing", "come": "new"}
    assert compare.main([str(old), str(new)]) == 1
    said = capsys.readouterr().out
    assert "slower (1): a step: ours\n" in said and "missing (1): a step: gone\n" in said and "another" not in said
    assert "new (1): a step: come\n" in said and "faster (1): a step: rival\n" in said
    assert compare.main([str(new), str(old)]) == 1 and compare.main([str(old), str(old)]) == 0


def test_what_lies_within_the_rounds_noise_is_the_same(made):
    """A difference of a fifth is seen in quiet rounds, and not in rounds that differ by more."""
    restless = (1.0, 0.6, 1.5, 0.9, 1.3, 0.7, 1.1)
    for noise, found in ((NOISE, "slower"), (restless, "the same")):
        old, new = (made(name, {"ours": ratio}, noise=noise) for name, ratio in (("old", 0.5), ("new", 0.6)))
        assert verdicts(old, new)["ours"] == found


def test_what_is_certain_and_small_is_the_same():
    """From one process to the next more changes than in a process's rounds."""
    assert [compare.judge(np.full(9, 1.0), np.full(9, ratio))["verdict"] for ratio in (1.04, 0.96, 1.06, 0.94)] == [
        "the same", "the same", "slower", "faster"]


def test_the_interval_is_of_the_medians_ratio():
    row = compare.judge(np.full(9, 0.5), np.linspace(0.55, 0.65, 9))
    assert row["change"] == pytest.approx(1.2) and 1.1 <= row["interval"][0] < 1.2 < row["interval"][1] <= 1.3


def test_of_few_rounds_nothing_is_said(made):
    old, new = (made(name, {"ours": ratio}, rounds=4) for name, ratio in (("old", 0.5), ("new", 5.0)))
    assert verdicts(old, new)["ours"] == "too few rounds" and compare.main([str(old), str(new)]) == 0


def test_another_machine_is_said(made, capsys):
    old, new = made("old", {"ours": 0.5}), made("new", {"ours": 0.5}, threads=1, versions=dict(torch="2.14.0"))
    assert compare.main([str(old), str(new)]) == 0
    said = capsys.readouterr().out
    assert "another machine: threads: 2 before, 1 now" in said and "{'torch': '2.14.0'} now" in said


@pytest.mark.parametrize("text", ["{", "{}", '{"benchmarks": [{"extra_info": {}}]}', None])
def test_what_is_no_such_file_is_refused(made, tmp_path, capsys, text):
    old, other = made("old", {"ours": 0.5}), tmp_path / "other.json"
    if text is not None:
        other.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        compare.main([str(old), str(other)])
    assert "other.json" in capsys.readouterr().err


def test_rounds_that_do_not_belong_together_are_refused(made):
    path = made("old", {"ours": 0.5})
    found = json.loads(path.read_text())
    found["benchmarks"][1]["stats"]["data"].pop()
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="a step: ours has not the rounds of plain"):
        compare.read(path)
