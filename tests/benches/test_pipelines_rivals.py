"""bench/pipelines/: other caches beside ours, and that their failures, leftovers and shares are seen as they are."""

import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers.models.cache_utils import CacheMixin

import harmonica_dit
from bench.pipelines import __main__ as command
from bench.pipelines import overhead, quality, rivals
from bench.pipelines.fashion import NO_LABEL, fashion_pipe, fashion_transformer
from bench.pipelines.leftovers import LEFTOVERS, leftovers
from bench.pipelines.overhead import MODELS, flops_of
from bench.pipelines.rivals import RIVALS, Rival, put, tune

TINY = dict(rounds=1, layers=2, steps=6)
pytestmark = pytest.mark.filterwarnings("ignore:forecasts to order 0, not 1", "ignore:reuses nothing")


@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_ours_and_keeps_its_own(name):
    model = MODELS[name]
    pipe = model.pipe(layers=2)
    plain = model.run(pipe, 6)
    theirs = put(RIVALS["ours"], pipe, 6, dict(config=1.6))
    assert not torch.equal(model.run(theirs, 6), plain) and torch.equal(model.run(pipe, 6), plain)
    assert harmonica_dit.summary(theirs).speedup >= 1.6 and plain.isfinite().all() and plain.std() > 0.01
    own = dict(theirs.transformer.named_parameters())
    assert all(own[name] is p for name, p in pipe.transformer.named_parameters())


def failing(pipe, steps, *, words):
    raise RuntimeError(words)


def counting(pipe, steps, *, by):
    """What it adds grows from call to call, and an interruption leaves it in the middle of one."""
    pipe.transformer.register_forward_hook(lambda module, args, output: counted.append(by) or (
        output[0] + sum(counted),))
    counted = []


@pytest.fixture(scope="module")
def measured():
    made = {name: RIVALS[name] for name in ("ours", "diffusers PyramidAttentionBroadcast", "diffusers FirstBlockCache")}
    made["failing"] = Rival(failing, dict(words="at first"), dict(words="at last"))
    made["absent"] = replace(RIVALS["cache-dit DBCache"], package="no-such-package")
    made["counting"] = Rival(counting, dict(by=0.0), dict(by=1e-3))
    return overhead.measure("ltx", **TINY, rivals=made)


def test_rows_of_methods(measured):
    rows = {row["method"]: row for row in measured["rows"]}
    ours, pyramid, first = list(rows.values())[:3]
    for row in (ours, pyramid, first):
        assert row["everything"]["difference"] == 0 and row["everything"]["flops"] == 1
        assert row["second"]["difference"] > 1e-3 and min(row["second"]["time"]) > 0
        assert row["leftovers"]["second call"] == row["leftovers"]["other steps"] == "right"
    assert ours["second"]["flops"] == pytest.approx(0.5, abs=0.03) and set(ours["leftovers"].values()) == {"right"}
    assert 0.6 < pyramid["second"]["flops"] < 0.9 and first["second"]["settings"]["threshold"] > 0
    assert (ours["lines"], first["lines"]) == (2, 2)
    assert measured["plain_ms"] > 0 and len(measured["again"]) == 3


def test_what_fails_is_said_and_what_is_left_is_seen(measured):
    rows = {row["method"]: row for row in measured["rows"]}
    assert rows["failing"]["everything"] == dict(words="RuntimeError: at first") and "leftovers" not in rows["failing"]
    assert rows["absent"]["words"] == "no-such-package is not installed"
    assert rows["counting"]["leftovers"] == dict.fromkeys(LEFTOVERS, "wrong")
    printed = overhead.markdown([measured])
    for said in ("- failing: RuntimeError: at last", "- absent: no-such-package", "| wrong | wrong | wrong |",
                 "| failing | 1 | fails | – | – | fails | fails | – | – | – |"):
        assert said in printed


def test_an_error_of_ours_is_not_a_finding(monkeypatch):
    def broken(pipe, config):
        raise ValueError("ours")

    monkeypatch.setattr(harmonica_dit, "enable_cache", broken)
    with pytest.raises(ValueError, match="ours"):
        overhead.measure("ltx", **TINY, rivals={"ours": RIVALS["ours"]})
    with pytest.raises(ValueError, match="ours"):
        quality.measure(2, 0, lambda pipe, seed: iter([quality.Candidate(quality.OURS, RIVALS["ours"],
                                                                         dict(config=2.0), 2.0)]))


def test_an_error_in_a_later_call_is_said():
    model, calls = MODELS["ltx"], []

    def run(pipe, steps):
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("lost")
        return model.run(pipe, steps)

    found = leftovers(lambda: model.pipe(layers=2), run, 6)
    assert found == {"second call": "KeyError: 'lost'", "after an interruption": "right", "other steps": "right"}


def test_a_pipeline_that_names_no_calls_is_called_in_a_context():
    dit = MODELS["dit"].pipe(layers=2)
    assert rivals.needs_context(dit) and not isinstance(dit.transformer, CacheMixin)
    assert not rivals.needs_context(MODELS["ltx"].pipe(layers=2))
    assert RIVALS["diffusers FirstBlockCache"].lines(dit) == 2 + 4 and RIVALS["ours"].lines(dit) == 2


def test_the_threshold_that_is_nearest_is_found():
    tried = []

    def share(settings):
        tried.append(settings["threshold"])
        assert settings["other"] == 1
        return 1.0 if settings["threshold"] < 0.2 else 0.55 if settings["threshold"] < 0.4 else 0.1

    found = tune(RIVALS["diffusers FirstBlockCache"], dict(other=1, threshold=None), share, 0.5)
    assert 0.2 <= found["threshold"] < 0.4 and len(tried) == 8 and found["other"] == 1


def test_the_bundled_model_is_the_same_in_diffusers():
    net, transformer = harmonica_dit.load("fashion-dit"), fashion_transformer()
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(22, 1, 28, 28, generator=generator), torch.arange(22) * 47
    y = torch.arange(22) % 11
    with torch.no_grad():
        found = transformer(x, t, torch.where(y == 10, NO_LABEL, y)).sample
        torch.testing.assert_close(found, net(x, t, y), rtol=1e-4, atol=1e-5)


def test_images_of_the_bundled_model_and_what_is_computed_for_them():
    pipe = fashion_pipe()
    images, share, flops = quality.observe(pipe, 4, seed=0)
    assert share == 1
    assert images.shape == (4, 1, 28, 28) and -1.5 < images.min() < -0.9 and 0.5 < images.max() < 1.5
    every = put(RIVALS["diffusers TaylorSeer"], pipe, quality.STEPS, dict(every=4))
    assert quality.observe(every, 2, 0)[1] == 0.3  # steps 0, 2, 6, 10, …
    ours = put(RIVALS["ours"], pipe, quality.STEPS, dict(config=2.0))
    quality.run(ours, 4, seed=0)
    _, share, fewer = quality.observe(ours, 4, seed=0)
    summary = harmonica_dit.summary(ours)
    assert share == 0.45 == pytest.approx(1 - summary.cur)
    assert flops / fewer == pytest.approx(summary.speedup, rel=0.05)
    ratios = quality.calibrated(pipe, 0)
    assert len(ratios) == quality.STEPS and ratios[0] == 1 and all(0.5 < ratio < 2 for ratio in ratios)


def test_errors_at_a_share(tmp_path, monkeypatch, capsys):
    chosen = {quality.OURS, "diffusers FirstBlockCache", "enable_cache(pipe, fora(…, order=0))"}
    every = quality.candidates

    def few(pipe, seed):
        made = [one for one in every(pipe, seed) if one.speedup == 2.7]
        assert len({one.method for one in made}) == len(made)
        yield from (one for one in made if one.method in chosen)
        yield quality.Candidate("failing", Rival(failing, {}, {}), dict(words="no"), 2.7)

    monkeypatch.setattr(command.quality, "measure", partial(quality.measure, made=few))
    monkeypatch.setattr(quality, "FEW", 2)
    monkeypatch.setattr(sys, "argv", ["pipelines", "quality", "--samples", "4", "--out", str(tmp_path / "rows.json")])
    command.main()
    rows = {row["method"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    ours, fora, first = (rows[name] for name in (quality.OURS, "enable_cache(pipe, fora(…, order=0))",
                                                 "diffusers FirstBlockCache"))
    assert ours["computed"] == fora["computed"] == 0.35 and ours["flops_speedup"] >= 2.7
    assert 0 < ours["error"] < fora["error"] < 1 and ours["worst"] >= ours["error"]
    assert first["computed"] == pytest.approx(0.35, abs=0.1) and first["settings"]["threshold"] > 0
    assert fora["nbytes"] == 2 * 16 * 49 * 128 * 4 and rows["failing"]["words"] == "RuntimeError: no"
    assert "| 2.7× | failing | RuntimeError: no |" in capsys.readouterr().out


def test_the_command_measures_the_models_that_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(overhead, "RIVALS", {"ours": RIVALS["ours"]})
    monkeypatch.setattr(sys, "argv", ["pipelines", "overhead", "--only", "ltx", "--rounds", "1", "--layers", "1",
                                      "--out", str(tmp_path / "rows.json")])
    command.main()
    [model] = json.loads((tmp_path / "rows.json").read_text())["models"]
    assert model["model"] == "ltx" and [row["method"] for row in model["rows"]] == ["ours"]
    assert "**ltx**: " in capsys.readouterr().out


def test_flops_are_those_that_are_run():
    linear = torch.nn.Linear(4, 8)
    assert flops_of(lambda: linear(torch.ones(3, 4))) == 2 * 3 * 4 * 8
