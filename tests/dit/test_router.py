"""Routers: scores, schedules, files."""

import re

import pytest
import torch
from safetensors.torch import save_file

from harmonica_dit import load
from harmonica_dit.evaluate.heat_maps import plot
from harmonica_dit.fashion import ROUTERS
from harmonica_dit.files import load_tensors, save_tensors
from harmonica_dit.flops import Flops
from harmonica_dit.models.dit import DiT
from harmonica_dit.router import Router


@pytest.fixture(scope="module")
def net():
    return DiT(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=4,
               name="tiny")


def make(net, T=4, **options):
    K = len(net.branch_names)
    logits = torch.randn(T, K, generator=torch.Generator().manual_seed(0))
    return Router(logits, net.branch_names, Flops((2.0,) * K, 1.0), tuple(range(T, 0, -1)), model="tiny", **options)


def test_row_0_is_fixed_and_has_no_parameter(net):
    router = make(net)
    assert len(list(router.parameters())) == 3
    assert all(p.shape == (2,) for p in router.parameters())
    assert router.scores()[0].tolist() == [1.0, 1.0]
    assert torch.equal(router.scores()[2], router.score(2).detach())
    for threshold in (0.0, 0.5, 1.0):
        assert all(router.schedule(threshold).rows[0])


def test_schedule_computes_scores_above_the_threshold(net):
    router = make(net, threshold=0.4)
    assert torch.equal(router.schedule().compute[1:], router.scores()[1:] > 0.4)
    assert router.schedule(0.0).cur == 0
    assert router.schedule(1.0).cur == 0.75
    # decided as cached_forward decides: float32 0.1 is above the Python float 0.1
    r = router.scores()[1, 0].item()
    assert not router.schedule(r).rows[1][0] and router.schedule(r - 1e-12).rows[1][0]


def test_extrapolation_reaches_the_schedule(net):
    coefficients = torch.rand(4, 2)
    schedule = make(net, extrapolation=coefficients).schedule(0.5)
    assert torch.equal(schedule.extrapolation[1:], coefficients[1:])
    assert schedule.extrapolation[0].tolist() == [0, 0]
    learned = make(net, extrapolation=coefficients, learn_extrapolation=True)
    assert sum(p.requires_grad for p in learned.parameters()) == 6
    assert sum(p.requires_grad for p in make(net, extrapolation=coefficients).parameters()) == 3


def test_clamp(net):
    router = make(net)
    with torch.no_grad():
        for row in router.logits:
            row.copy_(torch.tensor([-7.0, 7.0]))
    router.clamp_(2)
    assert router.logits[1].tolist() == [-5, 5]
    assert router.logits[0].tolist() == [-7, 7]


@pytest.mark.parametrize("options", [{}, dict(extrapolation=torch.rand(4, 2)),
                                     dict(beta=1e-3, seed=7, guidance=4.0, scheduler="DDPMScheduler", threshold=0.3)])
def test_round_trip(net, tmp_path, options):
    router = make(net, **options)
    router.save(tmp_path / "r.safetensors")
    loaded = Router.load(tmp_path / "r.safetensors", net)
    assert torch.equal(loaded.scores(), router.scores())
    for name in ("branches", "flops", "timesteps", "model", "scheduler", "guidance", "threshold", "beta", "seed"):
        assert getattr(loaded, name) == getattr(router, name), name
    mine, theirs = router.schedule(), loaded.schedule()
    assert mine.rows == theirs.rows and mine.forecast_weights == theirs.forecast_weights
    tensors, metadata = load_tensors(tmp_path / "r.safetensors")
    assert tensors["logits"].shape == (4, 2) and tensors["logits"].dtype == torch.float32
    assert metadata["format"] == 1 and metadata["cur"] == mine.cur and metadata["steps"] == 4


def test_another_model_is_refused_and_another_name_is_a_warning(net, tmp_path):
    path = tmp_path / "r.safetensors"
    make(net).save(path)
    deeper = DiT(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=4)
    with pytest.raises(ValueError, match="r.safetensors: for 2 branches of 'tiny'.*has 4"):
        Router.load(path, deeper)
    other = DiT(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=4,
                name="other")
    with pytest.warns(UserWarning, match="made for the model 'tiny', used with 'other'"):
        Router.load(path, other)
    tensors, metadata = load_tensors(path)
    save_tensors(path, tensors, metadata | {"branches": ["blocks.0.attn", "blocks.0.cross"]})
    with pytest.raises(ValueError, match="branch 1 is 'blocks.0.cross'"):
        Router.load(path, net)


def test_hostile_files_are_refused_by_name(net, tmp_path):
    path = tmp_path / "r.safetensors"
    make(net, extrapolation=torch.rand(4, 2)).save(path)
    whole = path.read_bytes()
    tensors, metadata = load_tensors(path)

    def check_refusal(message):
        with pytest.raises(ValueError, match=message) as error:
            Router.load(path)
        assert str(path) in str(error.value)

    huge_header = (10**12).to_bytes(8, "little")
    for damaged in (b"", whole[:5], whole[:-3], huge_header + whole[8:], b"PK\x03\x04" + whole):
        path.write_bytes(damaged)
        check_refusal("not a whole safetensors file")
    save_file(tensors, path)
    check_refusal("expected a router")
    for name, value, message in (
            ("kind", "schedule", "expected a router"), ("format", "1", "format version"), ("threshold", 2, "threshold"),
            ("threshold", float("nan"), "threshold"), ("guidance", "x", "guidance"), ("seed", [1], "seed"),
            ("beta", float("inf"), "beta"), ("model", 3, "model"), ("scheduler", None, "scheduler"),
            ("timesteps", [3, 2], "timesteps"), ("timesteps", None, "timesteps"), ("branches", ["a"], "branches"),
            ("flops", [[1, 2, 3], 4], "flops"), ("flops", {}, "flops"),
            ("seed", 10**400, "seed"), ("flops", [[10**400, 2], 4], "flops"), ("flops", [[1e308, 1e308], 4], "flops"),
            ("flops", [[-1, 2], 4], "flops")):
        save_tensors(path, tensors, metadata | {name: value})
        check_refusal(message)
    for name, tensor, message in (("logits", torch.randn(4, 3), "branches"), ("logits", torch.randn(4), "logits"),
                                  ("logits", torch.randn(1, 2), "T ≥ 2"),
                                  ("logits", torch.randn(4, 2).half(), "float32"),
                                  ("logits", torch.full((4, 2), float("nan")), "logits: .*not finite"),
                                  ("extrapolation", torch.randn(2, 4), "extrapolation")):
        save_tensors(path, tensors | {name: tensor}, metadata)
        check_refusal(message)
    save_tensors(path, {"extrapolation": tensors["extrapolation"]}, metadata)
    check_refusal("has to hold logits")


BUNDLED_NAMES = sorted(file.stem for file in ROUTERS.glob("*"))


def test_there_are_bundled_routers():
    assert BUNDLED_NAMES


@pytest.mark.parametrize("name", BUNDLED_NAMES)
def test_a_bundled_router_does_what_its_name_says(name):
    router = Router.load(name, load("fashion-dit"))
    assert router.model == "fashion-dit" and router.steps == 20
    speedup, forecasts = re.fullmatch(r"fashion-dit-([\d.]+)x(-forecast)?", name).groups()
    assert router.schedule().speedup == pytest.approx(float(speedup), 0.02)
    assert router.schedule().history == (1 if forecasts is None else 2)


def test_a_bare_name_is_a_file_or_a_bundled_router(net, tmp_path, monkeypatch):
    monkeypatch.setattr("harmonica_dit.fashion.ROUTERS", tmp_path / "bundled")
    monkeypatch.chdir(tmp_path)
    make(net, seed=1).save("bundled/tiny-2.0x.safetensors")
    assert Router.load("tiny-2.0x", net).seed == 1
    for wrong in ("tiny-3.0x", "folder/tiny-2.0x", ""):
        with pytest.raises(FileNotFoundError, match=f"no file at {wrong}.*bundled are tiny-2.0x"):
            Router.load(wrong)
    make(net, seed=2).save("tiny-2.0x")
    assert Router.load("tiny-2.0x", net).seed == 2


def test_picture(net, tmp_path):
    router = make(net)
    plot(router, tmp_path / "router.png")
    plot(router.schedule(), tmp_path / "schedule.png")
    assert (tmp_path / "router.png").stat().st_size > 1000 and (tmp_path / "schedule.png").stat().st_size > 1000
