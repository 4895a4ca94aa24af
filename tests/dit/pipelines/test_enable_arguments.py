"""What `enable_cache` takes and what it refuses: routers, schedules and files, other models, other steps."""

import dataclasses
import warnings

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

import harmonica_dit
from harmonica_dit import HarmoniCaConfig, Router, Schedule
from support.enable_checks import check_refusal, random_router, run_with_hooks, schedule_on, steps_of
from support.many_pipes import PIPES
from support.pipes import LINEAR, make_pipe, random_schedule, run
from support.tolerance import assert_close


def test_router_schedule_file_and_config_are_the_same(sigma, tmp_path):
    router = random_router(sigma, threshold=0.3)
    router.save(tmp_path / "router.safetensors")
    router.schedule(0.6).save(tmp_path / "schedule.safetensors")
    images = {}
    for name, given, threshold in (
            ("router", router, None), ("path", tmp_path / "router.safetensors", None), ("0.6", router, 0.6),
            ("text", str(tmp_path / "router.safetensors"), 0.6), ("schedule", router.schedule(0.6), None),
            ("schedule path", tmp_path / "schedule.safetensors", None)):
        config = HarmoniCaConfig(schedule=given, threshold=threshold)
        assert isinstance(config.loaded, Schedule)
        with schedule_on(sigma, config):
            images[name] = run(sigma)
    assert torch.equal(images["path"], images["router"])
    for name in ("text", "schedule", "schedule path"):
        assert torch.equal(images[name], images["0.6"])
    assert not torch.equal(images["0.6"], images["router"])
    assert_close(images["router"], run_with_hooks(sigma, router.schedule()))


def test_the_fingerprint_goes_through_files(dit, tmp_path):
    made_for = dict(resolution=(8, 8), architecture={"class": "DiTTransformer2DModel", "K": 4, "D": 24})
    router = random_router(dit, **made_for)
    router.save(tmp_path / "router")
    loaded = Router.load(tmp_path / "router")
    schedule = loaded.schedule()
    schedule.save(tmp_path / "schedule")
    for found in (loaded, schedule, Schedule.load(tmp_path / "schedule")):
        assert {name: getattr(found, name) for name in made_for} == made_for and found.guidance == 3.0
    harmonica_dit.enable_cache(dit, tmp_path / "router")
    for change in (dict(resolution=(8,)), dict(resolution=(8, 0)), dict(architecture={"K": [4]}), dict(architecture=4)):
        with pytest.raises((TypeError, ValueError), match=next(iter(change))):
            random_router(dit, **change)
        with pytest.raises((TypeError, ValueError), match=next(iter(change))):
            dataclasses.replace(schedule, **change)
    with pytest.raises(ValueError, match="guidance"):
        dataclasses.replace(schedule, guidance="much")


@pytest.mark.parametrize("kind", ["dit", "sigma"])
def test_another_number_of_steps(kind):
    """Refused with the numbers, before anything runs; on request the schedule is resampled."""
    pipe = make_pipe(kind)
    made = steps_of(pipe.scheduler, 6)
    schedule = random_schedule(pipe.transformer, timesteps=made)
    with schedule_on(pipe, schedule):
        calls = []
        pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
        with pytest.raises(ValueError, match=rf"num_inference_steps: .*9 steps.*T = 6 .*{int(made[0])}.*resample"):
            run(pipe, steps=9)
        assert not calls
        run(pipe)
        assert len(calls) == 6
    for steps in (3, 9, 20):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "schedule: made for 6 steps with CUR")
            expected = run_with_hooks(pipe, schedule.resampled(steps_of(pipe.scheduler, steps)), steps=steps)
            with schedule_on(pipe, HarmoniCaConfig(schedule=schedule, on_mismatch="resample")):
                assert_close(run(pipe, steps=steps), expected)
    with schedule_on(pipe, random_schedule(pipe.transformer)):
        with pytest.raises(ValueError, match="T = 6; use 6 steps"):
            run(pipe, steps=9)


def test_timesteps_given_to_the_call(sigma):
    """PixArt pipelines take a list of them."""
    listed = [900, 700, 500, 100]
    sigma.scheduler = DPMSolverMultistepScheduler(**LINEAR)
    schedule = random_schedule(sigma.transformer, 4, timesteps=(900, 700, 500, 100))
    expected = run_with_hooks(sigma, schedule, timesteps=listed)
    with schedule_on(sigma, schedule), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_close(run(sigma, timesteps=listed), expected)
        with pytest.raises(ValueError, match="5 steps"):
            run(sigma, timesteps=[900, 800, 700, 500, 100])


def test_warns_once_of_what_the_router_was_not_trained_for(sigma):
    made = steps_of(sigma.scheduler, 6)
    others = tuple(t - 1 for t in made)
    schedule = random_schedule(sigma.transformer, timesteps=made, guidance=3.0, resolution=(8, 12))
    harmonica_dit.enable_cache(sigma, schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(sigma)
    ours = warnings_of(lambda: [run(sigma, guidance=7.0, height=32) for _ in range(2)])
    assert len(ours) == 2 and "guidance_scale: this call's is 7, the schedule is for 3" in ours
    assert any("latents are (16, 12), the schedule is for (8, 12)" in text for text in ours)
    harmonica_dit.disable_cache(sigma)
    harmonica_dit.enable_cache(sigma, dataclasses.replace(schedule, timesteps=others, guidance=1.0))
    ours = warnings_of(lambda: [run(sigma, guidance=guidance) for guidance in (0.5, 1.0)])  # neither uses guidance
    assert len(ours) == 1 and ours[0].startswith("timesteps: this call's are")


def warnings_of(call):
    """What a call says of the schedule."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if "the schedule" in str(warning.message)]


def test_routers_for_other_models(dit, sigma, tmp_path):
    schedule = random_schedule(dit.transformer)
    arch = {"class": "DiTTransformer2DModel", "K": 4, "D": 24}
    check_refusal(sigma, ValueError, "for 4 branches of .*PixArtTransformer2DModel.* has 6", schedule)
    for change, message in ((arch | {"class": "PixArtTransformer2DModel"}, "Pix.*is .*DiTTransformer2DModel"),
                            (arch | {"D": 1152}, "1152.* is .*24"), (arch | {"K": 56}, "56.* is .*'K': 4")):
        check_refusal(dit, ValueError, f"schedule: for the architecture .*{message}",
                      dataclasses.replace(schedule, architecture=change))
    names = ("blocks.0.attn", *schedule.branches[1:])
    check_refusal(dit, ValueError,
                  "branch 0 is 'blocks.0.attn', the model 'DiTTransformer2DModel' has 'transformer_blocks",
                  dataclasses.replace(schedule, branches=names, architecture=arch))
    no_fingerprint = "fashion-dit-2.0x"
    check_refusal(dit, ValueError, f"{no_fingerprint}: for 16 branches", no_fingerprint)
    named = dataclasses.replace(schedule, architecture=arch, model="facebook/DiT-XL-2-256")
    with pytest.warns(UserWarning, match="made for the model 'facebook/DiT-XL-2-256'"):
        harmonica_dit.enable_cache(dit, named)
    run(dit)
    harmonica_dit.disable_cache(dit)
    dit.register_to_config(_name_or_path="facebook/DiT-XL-2-256")  # as from_pretrained does
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        harmonica_dit.enable_cache(dit, named)


def test_other_bad_input(dit, sigma, tmp_path):
    schedule = random_schedule(dit.transformer)
    check_refusal(dit, FileNotFoundError, "no file at .*nothing.safetensors", tmp_path / "nothing.safetensors")
    (tmp_path / "text").write_text("no router")
    check_refusal(dit, ValueError, "text is not a whole safetensors file", tmp_path / "text")
    check_refusal(dit, TypeError, "config: got Tensor, expected a speedup, ", torch.zeros(6, 4))
    check_refusal(dit, ValueError, "threshold: got 2", HarmoniCaConfig(schedule=random_router(dit), threshold=2))
    check_refusal(dit, ValueError, "on_mismatch: .*what timesteps",
                  HarmoniCaConfig(schedule=schedule, on_mismatch="resample"))
    check_refusal(dit, ValueError, "timesteps: is for a transformer without its pipeline", schedule, timesteps=[1, 0])
    schedule.save(tmp_path / "schedule")
    check_refusal(dit, ValueError, "threshold: is a router's, .*schedule is a schedule",
                  HarmoniCaConfig(schedule=tmp_path / "schedule", threshold=0.2))
    sigma.transformer = None
    with pytest.raises(TypeError, match="target: got PixArtSigmaPipeline, expected .* with a transformer"):
        harmonica_dit.enable_cache(sigma, 2.0)


@pytest.mark.parametrize("arguments, said", [
    (dict(), "speedup, schedule: give exactly one"), (dict(speedup=2, schedule="x"), "speedup, schedule: give exactly"),
    (dict(speedup=0.5), "speedup: got 0.5, expected a number from 1 on"), (dict(speedup="2x"), "speedup: got '2x'"),
    (dict(speedup=2, on_mismatch="nearest"), "on_mismatch: got 'nearest'"),
    (dict(speedup=2, threshold=0.1), "threshold: is a router's, got it with a speedup")])
def test_bad_configurations(arguments, said):
    with pytest.raises(ValueError, match=said):
        HarmoniCaConfig(**arguments)


def test_a_threshold_for_a_schedule(dit):
    with pytest.raises(ValueError, match="threshold: .* a schedule, which has been decided already"):
        HarmoniCaConfig(schedule=random_schedule(dit.transformer), threshold=0.2)


def test_a_pipeline_that_is_not_supported(dit):
    for pipe in (StableDiffusionPipeline.__new__(StableDiffusionPipeline), None, 3):
        with pytest.raises(TypeError, match=f"target: got {type(pipe).__name__}, expected a diffusers pipeline"):
            harmonica_dit.enable_cache(pipe, 2.0)
    with pytest.raises(ValueError, match="timesteps: a transformer needs them"):
        harmonica_dit.enable_cache(dit.transformer, 2.0)


def test_a_router_of_another_model_on_the_generic_path_is_refused_by_name(dit):
    pipe, router = PIPES["flux"].pipe(), random_router(dit, model="DiT")
    with pytest.raises(ValueError, match="schedule: for branches of 'DiT' such as 'transformer_blocks.0.attn1', which "
                                         "FluxTransformer2DModel does not have"):
        harmonica_dit.enable_cache(pipe, router)
