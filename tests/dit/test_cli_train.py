"""`harmonica train` and a router's recipe: every setting of it is an option, and what a router is like is said."""

import warnings

import pytest
import torch
from typer.testing import CliRunner

import harmonica_dit.cli
from harmonica_dit.router import Router
from harmonica_dit.train import RECIPES

OTHERS = dict(beta=1e-3, trajectories=3, batch=2, lr=0.5, eps=1e-5, threshold=0.3, importance="gain",
              importance_rows="hard", importance_scale="raw", refresh=7, reseed=True, extrapolation="learned",
              costs="ones", compare="noise", halves="both")


def harmonica(*arguments):
    return CliRunner().invoke(harmonica_dit.cli.app, [str(argument) for argument in arguments])


def options(settings):
    flags = {True: ["--reseed"], False: ["--no-reseed"]}
    return [word for name, value in settings.items()
            for word in (flags[value] if name == "reseed" else [f"--{name.replace('_', '-')}", value])]


@pytest.fixture
def calls(monkeypatch):
    """What trainings are called with."""
    found = []

    def train_router(net, **arguments):
        found.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(harmonica_dit.train, "train_router", train_router)
    return found


def test_every_setting_of_a_recipe_is_an_option(calls, tmp_path):
    assert OTHERS.keys() == RECIPES["paper"].keys()
    for settings in (OTHERS, OTHERS | dict(reseed=False, extrapolation=0.0)):
        assert harmonica("train", "--out", tmp_path, "--recipe", "paper", *options(settings)).exit_code == 130
        assert settings | dict(recipe="paper", target_speedup=None) == {
            name: calls[-1][name] for name in (*settings, "recipe", "target_speedup")}


def test_what_is_not_given_is_the_recipes(calls, tmp_path):
    result = harmonica("train", "--out", tmp_path, "--recipe", "paper", "--batch", 8)
    assert "recipe: paper, but batch=8 (not 32)" in result.stdout
    assert {calls[0][name] for name in RECIPES["paper"].keys() - {"batch"}} == {None}
    assert calls[0]["target_speedup"] is None  # the recipe has a β
    assert "recipe: recommended\n" in harmonica("train", "--out", tmp_path).stdout
    assert calls[1]["target_speedup"] == 1.6


@pytest.mark.parametrize("name", sorted(RECIPES["paper"].keys() - {"batch", "lr", "costs"}))
def test_a_forecaster_has_no_recipe(tmp_path, name):
    result = harmonica("train", "--out", tmp_path, "--forecast", "accurate", *options({name: OTHERS[name]}))
    assert result.exit_code == 2 and f"--{name.replace('_', '-')}: is a router's" in result.stderr


def test_an_unknown_recipe_is_refused(tmp_path):
    result = harmonica("train", "--out", tmp_path, "--recipe", "best")
    assert result.exit_code == 2
    assert result.stderr == ("harmonica: --recipe: got 'best', expected one of recommended, paper, "
                             "learning-to-cache\n")


def test_show_says_how_soft_a_router_is_and_its_recipe(tmp_path):
    router = Router.load("fashion-dit-2.0x")
    router.recipe = "recommended, but lr=0.2 (not 0.1)"
    router.save(tmp_path / "soft.safetensors")
    with pytest.warns(UserWarning, match="soft_share: "):
        result = harmonica("show", tmp_path / "soft.safetensors")
    assert f"{router.soft_share:.0%} of the scores soft, recipe: {router.recipe}" in result.stdout
    for row in router.logits:
        row.data.copy_(torch.where(row > 0, 5.0, -5.0))
    router.threshold = 0.5
    router.save(tmp_path / "hard.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert ", 0% of the scores soft" in harmonica("show", tmp_path / "hard.safetensors").stdout
