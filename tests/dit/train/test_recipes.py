"""Recipes: what they set, that each of it arrives, and what a router says of its own."""

import warnings
from dataclasses import asdict

import pytest
import torch

import harmonica_dit.train.train as module
from harmonica_dit.files import load_tensors
from harmonica_dit.router import ALWAYS, Router, warn_if_soft
from harmonica_dit.train import RECIPES, train_router
from harmonica_dit.train.recipes import complete
from harmonica_dit.train.start import last_refresh

TRY = dict(steps=4, trajectories=2, batch=1, progress=False)


def test_the_papers_recipe():
    """The settings of HarmoniCa's published command for DiT-XL/2, T = 10 (its README): --lr 0.01 --l1 7e-8 --lambda-c
    500 --ste-threshold 0.1 --max-steps 20000 --global-batch-size 64, which is rows, two an image; and AdamW's own eps,
    costs of one and the λ of section 3.3 as it is.
    """
    assert RECIPES["paper"] == dict(
        lr=0.01, beta=7e-8, refresh=500, threshold=0.1, trajectories=20_000 // 10, batch=64 // 2,
        eps=torch.optim.AdamW([torch.zeros(1)]).defaults["eps"], costs="ones", importance="paper",
        importance_rows="soft", importance_scale="raw", reseed=True, extrapolation=0, compare="all", halves="both")


def test_what_is_given_goes_before_the_recipe():
    settings, said = complete("paper", dict(steps=10, batch=8, reseed=False, eps=None, target_cur=None))
    assert settings == RECIPES["paper"] | dict(steps=10, batch=8, reseed=False, target_cur=None)
    assert said == "paper, but batch=8 (not 32), reseed=False (not True)"
    for goal in (dict(target_speedup=2.0), dict(target_cur=0.5), dict(beta=1e-3)):
        settings, said = complete("paper", dict(target_speedup=None, target_cur=None, beta=None) | goal)
        [(name, value)] = goal.items()
        assert {name: settings[name] for name in ("target_speedup", "target_cur", "beta") if settings[name]} == goal
        assert said == f"paper, but {name}={value} (not {'' if name == 'beta' else 'beta='}7e-08)"
    assert complete("recommended", dict(target_speedup=2.0, batch=8))[1] == "recommended"


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_a_training_has_its_recipes_settings_and_those_that_are_given(net, monkeypatch, recipe):
    """What each of them does is for test_oracle.py to say."""

    def stop(net, settings, costs):
        found.update(asdict(settings))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "start_training", stop)
    chosen, expected = ({}, "recommended") if recipe is None else (dict(recipe=recipe), recipe)
    goal = {} if recipe == "paper" else dict(target_speedup=1.5)
    other = RECIPES["recommended" if recipe == "paper" else "paper"]
    other = other | dict(importance="gain", importance_rows="hard", refresh=7, compare="noise")  # the same in both
    for given in ({}, *({name: value} for name, value in other.items() if name != "beta")):
        found = {}
        with pytest.raises(KeyboardInterrupt):
            train_router(net, **chosen, **goal, **given)
        assert {name: found[name] for name in RECIPES[expected]} == RECIPES[expected] | given


def test_a_router_says_what_differs_from_its_recipe(net):
    router = train_router(net, recipe="paper", **TRY)
    assert router.recipe == "paper, but trajectories=2 (not 2000), batch=1 (not 32)"
    assert (router.beta, router.threshold, router.coefficients) == (7e-8, 0.1, None)


def test_lambda_is_due_where_the_steps_reach_another_multiple_of_c():
    for steps, refresh in ((4, 9), (5, 10), (20, 500), (6, 3)):
        due = [n for n in range(60) if n == 0 or n * steps // refresh > (n - 1) * steps // refresh]
        for n in range(60):
            assert last_refresh(n, steps, refresh) == max(m for m in due if m <= n)


def test_the_share_of_soft_scores_is_of_the_trained_rows(make_router, tmp_path):
    router = make_router(T=3)
    scores = torch.tensor([[0.0, 0.09, 0.11, 0.5], [0.89, 0.91, 1.0, 0.05]])
    for row, values in zip(router.logits, scores, strict=True):
        row.data.copy_(values.logit(eps=1e-6))
    assert router.soft_share == 3 / 8
    with pytest.warns(UserWarning, match="soft_share: 38% of the router's scores lie between 0.1 and 0.9"):
        warn_if_soft(router)
    router.logits[1].data[1:3] = ALWAYS  # is not learned
    assert router.soft_share == 3 / 6
    router.logits[0].data[2:] = 5.0
    assert router.soft_share == 1 / 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_soft(router)
    router.recipe = "paper"
    router.save(tmp_path / "router.safetensors")
    assert load_tensors(tmp_path / "router.safetensors")[1]["soft_share"] == 1 / 6
    assert Router.load(tmp_path / "router.safetensors").recipe == "paper"
    assert Router.load("fashion-dit-2.0x").recipe is None  # older than recipes


def test_a_training_that_ends_soft_says_so(net):
    with pytest.warns(UserWarning, match="soft_share: "):
        train_router(net, beta=1e-3, **TRY | dict(trajectories=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_router(net, beta=1e-3, lr=50.0, **TRY)
