"""The command line: what it leaves behind, and one clear line for everything that it cannot do."""

import csv
import dataclasses
import json
import sys
import warnings
from functools import partial

import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import harmonica_dit.cli
from harmonica_dit import demo
from harmonica_dit.evaluate import compare, read_schedule, report, samples
from harmonica_dit.files import load_tensors
from harmonica_dit.flops import Flops
from harmonica_dit.router import Router
from harmonica_dit.schedule import Schedule
from harmonica_dit.train import train_forecaster
from support.pipeline_folders import save_pixart

TINY = ["--steps", "3", "--target-speedup", "1.3", "--trajectories", "2", "--batch", "1"]


def harmonica(*arguments):
    return CliRunner().invoke(harmonica_dit.cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def router(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    result = harmonica("train", "--out", folder, *TINY)
    assert result.exit_code == 0, result.output
    assert "FLOPs speedup" in result.output
    return folder / "router.safetensors"


@pytest.fixture
def sample_calls(monkeypatch):
    """What `sample` is called with, by the command or by a comparison."""
    calls = []

    def sample(net, labels, **options):
        calls.append(options)
        return torch.zeros(len(labels), *net.sample_shape)

    for module in (harmonica_dit, sys.modules[compare.__module__], samples):
        monkeypatch.setattr(module, "sample", sample)
    return calls


def test_every_command_has_help():
    for command in ("demo", "train", "sample", "compare", "show"):
        result = harmonica(command, "--help")
        assert result.exit_code == 0 and "--out" in result.output


def test_sample_takes_names_and_numbers(tmp_path):
    result = harmonica("sample", "--labels", "Dress, ankle boot,3", "--steps", 2, "--out", tmp_path / "x.png")
    assert result.exit_code == 0 and "3 images" in result.output
    with Image.open(tmp_path / "x.png") as sheet:
        assert sheet.width > 3 * 28


def test_sample_with_a_router_uses_its_steps(router, tmp_path):
    result = harmonica("sample", "--labels", "0,1", "--router", router, "--out", tmp_path / "x.safetensors")
    assert result.exit_code == 0 and "fewer FLOPs" in result.output
    assert load_tensors(tmp_path / "x.safetensors")[0]["samples"].shape == (2, 1, 28, 28)
    assert harmonica("sample", "--router", router, "--steps", 4, "--out", tmp_path / "x.png").exit_code == 2


@pytest.mark.parametrize("command", [["sample"], ["compare", "--samples", 1, "--method", "fora", "--steps", 4]])
@pytest.mark.parametrize("given, guidance, scheduler", [
    ([], 3.0, "DPMSolverMultistepScheduler"),
    (["--guidance", 1, "--scheduler", "ddim"], 1.0, "ddim")])
def test_guidance_and_scheduler_are_the_routers_own_unless_given(sample_calls, tmp_path, command, given, guidance,
                                                                 scheduler):
    make_router(tmp_path / "own.safetensors", guidance=3.0, scheduler="DPMSolverMultistepScheduler")
    out = tmp_path / ("x.safetensors" if command[0] == "sample" else "folder")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "schedule: made for")
        result = harmonica(*command, "--router", tmp_path / "own.safetensors", *given, "--out", out)
    assert result.exit_code == 0, result.output
    assert {(options["guidance"], options["scheduler"]) for options in sample_calls} == {(guidance, scheduler)}


def test_without_a_router_guidance_and_scheduler_are_the_defaults(sample_calls, tmp_path):
    assert harmonica("sample", "--out", tmp_path / "x.safetensors").exit_code == 0
    assert (sample_calls[0]["guidance"], sample_calls[0]["scheduler"]) == (1.5, "ddim")


def test_routers_that_disagree_need_an_answer(tmp_path):
    for name, guidance in (("a", 3.0), ("b", 2.0)):
        make_router(tmp_path / f"{name}.safetensors", guidance=guidance)
    result = harmonica("compare", "--router", tmp_path / "a.safetensors", "--router", tmp_path / "b.safetensors",
                       "--out", tmp_path / "out")
    assert result.exit_code == 2 and "--guidance: the files were made for 2.0, 3.0" in result.stderr


def test_a_forecasts_own_guidance_and_scheduler_are_used(sample_calls, tmp_path):
    """So that no warning says that it is used with others."""
    forecast = dataclasses.replace(Schedule.load("fashion-dit-forecast-2.8x"), guidance=2.0)
    forecast.save(tmp_path / "f.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = harmonica("sample", "--labels", "0", "--schedule", tmp_path / "f.safetensors", "--out",
                           tmp_path / "x.safetensors")
    assert result.exit_code == 0, result.output
    assert (sample_calls[0]["guidance"], sample_calls[0]["scheduler"]) == (2.0, "ddim")


@pytest.mark.parametrize("command", [["sample"], ["compare", "--samples", 1, "--method", "fora"]])
def test_a_forecasts_schedulers_settings_are_used(sample_calls, tmp_path, command):
    """By what it is compared with too; of files that disagree none is chosen."""
    forecast = Schedule.load("fashion-dit-forecast-2.8x")
    for order in (2, 3):
        dataclasses.replace(forecast, scheduler="DPMSolverMultistepScheduler", scheduler_config={"solver_order": order}
                            ).save(tmp_path / f"{order}.safetensors")
    out = tmp_path / ("x.safetensors" if command[0] == "sample" else "folder")
    result = harmonica(*command, "--schedule", tmp_path / "3.safetensors", "--out", out)
    assert result.exit_code == 0, result.output
    assert {options["scheduler"].config.solver_order for options in sample_calls} == {3}
    if command[0] == "compare":
        kept = json.loads((out / "rows.json").read_text())
        assert (kept["scheduler"], kept["scheduler_config"]["solver_order"]) == ("DPMSolverMultistepScheduler", 3)
        result = harmonica(*command, "--schedule", tmp_path / "3.safetensors", "--schedule", tmp_path / "2.safetensors",
                           "--out", out)
        assert result.exit_code == 2 and "DPMSolverMultistepScheduler of different settings" in result.stderr


def make_router(path, **options):
    net = harmonica_dit.load("fashion-dit")
    K = len(net.branch_names)
    Router(torch.zeros(4, K), net.branch_names, Flops((1.0,) * K, 1.0), (999, 666, 333, 0), threshold=0.5,
           model=net.name, **options).save(path)


def test_a_bundled_router_goes_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("harmonica_dit.fashion.ROUTERS", tmp_path / "bundled")
    monkeypatch.chdir(tmp_path)
    make_router(tmp_path / "bundled" / "fashion-dit-2.5x.safetensors")
    result = harmonica("show", "fashion-dit-2.5x")
    assert result.exit_code == 0 and (tmp_path / "fashion-dit-2.5x.png").exists(), result.output
    result = harmonica("sample", "--labels", 1, "--router", "fashion-dit-2.5x", "--out", "x.png")
    assert result.exit_code == 0, result.output
    result = harmonica("show", "fashion-dit-9x")
    assert result.exit_code == 2 and "fashion-dit-2.5x" in result.stderr


def test_show_of_a_missing_file_leaves_nothing_behind(tmp_path):
    assert harmonica("show", tmp_path / "typo" / "x.safetensors").exit_code == 2
    assert not list(tmp_path.iterdir())


def test_show_draws_routers_and_schedules(router, tmp_path):
    result = harmonica("show", router, "--out", tmp_path / "router.png", "--threshold", "1")
    assert result.exit_code == 0 and "CUR 66.7%" in result.output and (tmp_path / "router.png").exists()
    read_schedule(router).save(tmp_path / "frozen.safetensors")
    result = harmonica("show", tmp_path / "frozen.safetensors")
    assert result.exit_code == 0 and "CUR" in result.output and (tmp_path / "frozen.png").exists()
    refused = harmonica("show", tmp_path / "frozen.safetensors", "--threshold", "0.2")
    assert refused.exit_code == 2 and "threshold" in refused.stderr


def test_compare_leaves_tables_and_pictures_and_goes_on(router, tmp_path, monkeypatch):
    command = ["compare", "--router", router, "--method", "fora", "--method", "fewer-steps", "--speedup", 1.5,
               "--steps", 3, "--samples", 3, "--seed", 1, "--seeds", 2, "--accurate", "--out", tmp_path]
    followed, errors = [], report.errors_along
    monkeypatch.setattr(report, "errors_along", lambda *given, **options: followed.append(options["seed"]) or
                        errors(*given, **options))
    result = harmonica(*command)
    assert result.exit_code == 0 and followed == [1], result.output
    names = ["uncached", "DPM-Solver++ 40 steps", router.parent.name, "FORA 1.5×", "fewer steps 1.5×"]
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"] for row in found["rows"]] == 2 * names and {row["seed"] for row in found["rows"]} == {1, 2}
    assert all(found["rows"][3][f"{mean}_low"] < found["rows"][3][mean] for mean in ("error", "psnr", "ssim"))
    assert (found["model"], found["steps"], found["guidance"], found["scheduler"]) == ("fashion-dit", 3, 1.5, "ddim")
    with open(tmp_path / "table.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == 2 * names and float(lines[3]["error"]) == found["rows"][3]["error"]
    page = (tmp_path / "table.md").read_text().splitlines()
    assert page[0] == "# fashion-dit, 3 steps, 3 images a method and seed" and len({line.count("|") for line in page
                                                                                   if "|" in line}) == 1
    assert page[-3].startswith("| 10,000 real images | – |") and "10,000 real images" in result.output
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"tradeoff.png", "schedules.png", "along.png", "images.png"}
    monkeypatch.setattr(samples, "sample", lambda *_, **__: pytest.fail("it sampled"))
    assert harmonica(*command).exit_code == 0


def test_compare_decodes_the_latents_of_a_pipeline(tmp_path):
    folder, texts = save_pixart(tmp_path / "pipeline"), tmp_path / "prompts.txt"
    texts.write_text("a cat\nthe sea\n")
    result = harmonica("compare", "--model", folder, "--prompts", texts, "--method", "fora", "--speedup", 1.5,
                       "--steps", 3, "--samples", 2, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())["rows"]
    assert 0 < rows[1]["error"] < 2 and rows[1]["latent_error"] > 0
    with Image.open(tmp_path / "out" / "images.png") as image:
        assert image.mode.startswith("RGB")
    sheet = tmp_path / "sheet.png"
    assert harmonica("sample", "--model", folder, "--prompts", texts, "--steps", 2, "--out", sheet).exit_code == 0
    with Image.open(sheet) as image:
        assert image.width > 2 * 64 * 3
    latents = tmp_path / "latents.safetensors"
    assert harmonica("sample", "--model", folder, "--prompts", texts, "--steps", 2, "--out", latents).exit_code == 0
    assert load_tensors(latents)[0]["samples"].shape == (2, 4, 8, 8)


def test_a_forecaster_is_trained_sampled_with_and_shown(tmp_path):
    small = ["--steps", "4", "--iterations", "1", "--batch", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harmonica_dit.train.train_forecaster", partial(train_forecaster, images=2, held_out=2))
        result = harmonica("train", "--forecast", "uncached", "--target-speedup", "1.5", "--out", tmp_path, *small)
    assert result.exit_code == 0 and "FLOPs speedup" in result.output, result.output
    file = tmp_path / "forecast.safetensors"
    result = harmonica("sample", "--schedule", file, "--labels", "bag", "--out", tmp_path / "bag.png")
    assert result.exit_code == 0 and (tmp_path / "bag.png").exists(), result.output
    assert harmonica("show", file, "--out", tmp_path / "table.png").exit_code == 0


@pytest.mark.parametrize("option", ["--beta", "--trajectories", "--threshold"])
def test_a_routers_option_beside_a_forecaster_is_refused(tmp_path, option):
    result = harmonica("train", "--forecast", "accurate", "--out", tmp_path, option, "1")
    assert result.exit_code == 2 and f"{option}: is a router's" in result.output


def test_no_speedup_is_taken_for_another(tmp_path):
    result = harmonica("train", "--forecast", "accurate", "--out", tmp_path, "--target-speedup", 0)
    assert result.exit_code == 2 and "speedup: got 0.0, expected a number from 1 on" in result.stderr


def test_demo_leaves_its_pictures(tmp_path):
    theirs = tmp_path / "training" / "of something else"
    theirs.mkdir(parents=True)
    rows = demo.run(tmp_path, Console(quiet=True), iterations=1, images=2, held_out=1, samples=4)
    assert {path.name for path in tmp_path.iterdir()} == {"grid.png", "router.png", "tradeoff.png", "rows.json",
                                                          "forecast.safetensors", "training"}
    assert theirs.exists()
    assert rows == json.loads((tmp_path / "rows.json").read_text())


@pytest.mark.parametrize("arguments, said", [
    (["sample", "--labels", "10"], "labels"),
    (["sample", "--labels", "dress,hat"], "hat"),
    (["sample", "--labels", ""], "labels"),
    (["sample", "--steps", "0"], "steps"),
    (["sample", "--steps", "many"], "steps"),
    (["sample", "--guidance", "nan"], "guidance"),
    (["sample", "--batch", "0"], "batch"),
    (["sample", "--seed", "-1"], "seed"),
    (["sample", "--router", "nowhere.safetensors"], "nowhere.safetensors"),
    (["sample", "--router", __file__], "test_cli.py"),
    (["sample", "--model", "DiT-XXL"], "DiT-XXL"),
    (["compare", "--model", "DiT-XL/2"], "--checkpoint: "),
    (["sample", "--checkpoint", "nowhere.pt"], "nowhere.pt"),
    (["sample", "--what"], "--what"),
    (["sample", "--threshold", "0.2"], "--threshold"),
    (["sample", "--image-size", "64"], "--image-size: "),
    (["sample", "--device", "nonsense"], "device"),
    (["compare", "--device", "cuda:99"], "cuda:99"),
    (["compare", "--scheduler", "HeunDiscreteScheduler"], "one call a step"),
    (["train", "--steps", "0"], "steps"),
    (["train", "--target-speedup", "0.5"], "--target-speedup: "),
    (["train", "--extrapolation", "perhaps"], "--extrapolation"),
    (["compare", "--samples", "0"], "--samples"),
    (["compare", "--processes", "0"], "--processes"),
    (["compare", "--method", "magic"], "method: got 'magic', expected one of"),
    (["compare", "--speedup", "0.5"], "speedup: got 0.5"),
    (["compare", "--router", "nowhere.safetensors"], "nowhere.safetensors"),
    (["show", "nowhere.safetensors"], "nowhere.safetensors"),
    (["sample", "--scheduler", "nonsense"], "scheduler"),
    (["sample", "--vae", "nowhere"], "vae: fashion-dit makes images"),
    (["compare", "--batch", "0"], "batch"),
    (["compare", "--method", "fora", "--method", "fora"], "FORA 1.9"),
    (["sing"], "sing"),
])
def test_what_cannot_be_done_is_said_in_one_line(tmp_path, arguments, said):
    if arguments[0] != "sing":
        arguments = [*arguments, "--out", tmp_path / ("x.png" if arguments[0] in ("sample", "show") else "folder")]
    result = harmonica(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("harmonica: ") and result.stderr.count("\n") == 1
    assert said in result.stderr and "Traceback" not in result.output


@pytest.mark.parametrize("command", [["demo"], ["train", *TINY], ["compare"], ["sample"], ["show", __file__]])
def test_what_cannot_be_written_is_known_before_the_work(tmp_path, monkeypatch, command):
    monkeypatch.setattr(harmonica_dit, "load", lambda *_: pytest.fail("the work began"))
    (tmp_path / "file").touch()
    result = harmonica(*command, "--out", tmp_path / "file" / "x.png")
    assert result.exit_code == 2 and "cannot write" in result.stderr and result.stderr.count("\n") == 1


def test_a_bad_argument_of_a_training_is_known_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(harmonica_dit, "load", lambda *_: pytest.fail("it was loaded"))
    for bad, name in ((("--lr", 0), "lr"), (("--dtype", "float16"), "float16"), (("--beta", 1), "exactly one")):
        result = harmonica("train", "--out", tmp_path, *TINY, *bad)
        assert result.exit_code == 2 and name in result.stderr, result.output


def test_a_router_for_a_scheduler_of_two_calls_a_step(tmp_path):
    router = tmp_path / "router.safetensors"
    for command in (["train", *TINY, "--scheduler", "HeunDiscreteScheduler", "--out", tmp_path],  # 5 calls in 3 steps
                    ["sample", "--labels", 1, "--router", router, "--out", tmp_path / "x.png"]):
        result = harmonica(*command)
        assert result.exit_code == 0, result.output


def test_a_package_that_is_missing_is_said_in_one_line(tmp_path, monkeypatch):
    def refuse_to_load(*_, **__):
        raise ImportError("PixArtAlphaPipeline requires transformers")

    monkeypatch.setattr(harmonica_dit, "load", refuse_to_load)
    result = harmonica("sample", "--out", tmp_path / "x.png")
    assert (result.exit_code, result.stderr) == (2, "harmonica: PixArtAlphaPipeline requires transformers\n")


def test_an_output_that_is_a_folder_is_refused(tmp_path):
    (tmp_path / "x.png").mkdir()
    result = harmonica("sample", "--out", tmp_path / "x.png")
    assert result.exit_code == 2 and "folder" in result.stderr


def test_an_unknown_kind_of_output_is_refused(tmp_path):
    assert ".safetensors" in harmonica("sample", "--out", tmp_path / "x.gif").stderr


def test_a_loss_that_is_not_finite_is_said_in_one_line(tmp_path, monkeypatch):
    def diverge(*_, **__):
        raise FloatingPointError("the loss is not finite in trajectory 3")

    monkeypatch.setattr(harmonica_dit.train, "train_router", diverge)
    result = harmonica("train", "--out", tmp_path, *TINY)
    assert (result.exit_code, result.stderr) == (2, "harmonica: the loss is not finite in trajectory 3\n")


@pytest.mark.parametrize("message, said", [("run it again to go on", "run it again to go on"), ("", "starts again")])
def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, message, said):
    def interrupt(*_, **__):
        raise KeyboardInterrupt(message)

    monkeypatch.setattr(harmonica_dit.train, "train_router", interrupt)
    result = harmonica("train", "--out", tmp_path, *TINY)
    assert result.exit_code == 130 and said in result.stderr
