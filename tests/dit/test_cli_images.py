"""`harmonica train --recipe learning-to-cache`: on images, to a schedule that `compare` takes."""

import gzip
import json

import pytest
import torch
from typer.testing import CliRunner

import harmonica_dit.cli
from harmonica_dit.methods import fora
from harmonica_dit.router import Router
from harmonica_dit.train import RECIPES, train_learning_to_cache
from harmonica_dit.train import learning_to_cache as training

SMALL = ["--recipe", "learning-to-cache", "--steps", 4, "--batch", 2]


def harmonica(*arguments):
    return CliRunner().invoke(harmonica_dit.cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def images(tmp_path):
    """Twenty of noise, in Fashion-MNIST's format."""
    folder = tmp_path / "images"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for kind, sizes, most in (("images-idx3", (20, 28, 28), 256), ("labels-idx1", (20,), 10)):
        values = torch.randint(most, sizes, dtype=torch.uint8, generator=generator)
        header = bytes([0, 0, 8, len(sizes)]) + b"".join(size.to_bytes(4, "big") for size in sizes)
        (folder / f"train-{kind}-ubyte.gz").write_bytes(gzip.compress(header + values.numpy().tobytes()))
    return folder


def test_it_is_trained_goes_on_and_is_compared(tmp_path, images, monkeypatch):
    out = tmp_path / "ltc"
    command = ["train", *SMALL, "--images", images, "--iterations", 6, "--lr", 0.5, "--beta", 1e-3, "--out", out]
    real, calls = training._train_pair, []

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(training, "_train_pair", interrupt)
    result = harmonica(*command)
    assert result.exit_code == 130 and "stopped after 3 of 6 iterations" in result.stderr
    result = harmonica(*command)
    assert result.exit_code == 0 and len(calls) == 4 + 3, result.output
    assert "4 steps, CUR" in " ".join(result.output.split())
    net = harmonica_dit.load("fashion-dit")
    wanted = train_learning_to_cache(net, *harmonica_dit.fashion.data.load("train", images), steps=4, batch=2, lr=0.5,
                                     beta=1e-3, iterations=6, progress=False)
    for mine, theirs in zip(Router.load(out / "router.safetensors").logits, wanted.logits):
        assert torch.equal(mine, theirs)
    result = harmonica("compare", "--schedule", out / "router.safetensors", "--method", "fora", "--speedup", 1.5,
                       "--steps", 4, "--samples", 1, "--out", tmp_path / "comparison")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "comparison" / "rows.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["uncached", "ltc", "FORA 1.5×"]
    assert rows[1]["cur"] == Router.load(out / "router.safetensors").schedule().cur > 0


def test_a_target_that_is_missed_is_exit_status_1(tmp_path, images):
    """One branch less in two steps is 1.02 or more."""
    most = fora(harmonica_dit.load("fashion-dit"), 2, 2).speedup
    for target, code in ((most, 0), (1.001, 1)):
        result = harmonica("train", *SMALL, "--steps", 2, "--images", images, "--iterations", 1, "--target-speedup",
                           target, "--out", tmp_path / f"{target}")
        assert result.exit_code == code, result.output
        assert (code == 1) == ("--target-speedup=1.001: the nearest schedule" in result.stderr)


OF_OTHERS = dict(trajectories=3, eps=1e-5, importance="gain", importance_rows="hard", importance_scale="raw", refresh=7,
                 extrapolation="learned", costs="ones", compare="noise", halves="both")


def test_the_settings_of_other_trainings_are_all_there():
    assert OF_OTHERS.keys() == RECIPES["paper"].keys() - {"beta", "batch", "lr", "threshold", "reseed"}


@pytest.mark.parametrize("arguments, said", [
    *((["--" + name.replace("_", "-"), value], f"--{name.replace('_', '-')}: is another training's")
      for name, value in OF_OTHERS.items()),
    (["--reseed"], "--reseed: is another"), (["--guidance", 2], "--guidance: is another"),
    (["--scheduler", "ddim"], "--scheduler: is another"), (["--checkpointing"], "--checkpointing: is another"),
    (["--forecast", "accurate"], "--forecast: is another"), (["--steps", 5], "--steps: got 5, expected an even number"),
    (["--iterations", 0], "--iterations: got 0"), (["--threshold", 2], "--threshold: got 2"),
    (["--dtype", "float16"], "float16"), (["--images", "nowhere"], "is missing"),
    (["--model", "DiT-XL/2"], "--images: Learning-to-Cache trains on images"),
    (["--target-speedup", 1.2, "--target-cur", 0.2], "--target-speedup, --target-cur: give at most one")])
def test_what_is_not_of_this_training_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch, arguments, said):
    monkeypatch.setattr(harmonica_dit, "load", lambda *_, **__: pytest.fail("it was loaded"))
    result = harmonica("train", *SMALL, *arguments, "--out", tmp_path)
    assert result.exit_code == 2 and said in result.stderr, result.output


@pytest.mark.parametrize("option", ["--images", "--vae"])
@pytest.mark.parametrize("other", [[], ["--forecast", "accurate"]])
def test_other_trainings_take_no_images(tmp_path, monkeypatch, option, other):
    monkeypatch.setattr(harmonica_dit, "load", lambda *_, **__: pytest.fail("it was loaded"))
    result = harmonica("train", *other, option, tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 2 and f"{option}: is for --recipe learning-to-cache" in result.stderr
