"""What `enable_cache` takes and what it refuses: routers, schedules and files, other models, other steps."""

import dataclasses
import warnings

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

import harmonica_dit
from harmonica_dit import HarmoniCaConfig, Router, Schedule
from support.enable_checks import check_refusal, random_router, run_with_hooks, schedule_on, steps_of
from support.pipes import LINEAR, make_pipe, random_schedule, run, small_pixart
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
        config = HarmoniCaConfig(given, threshold)
        applied = config.enable(sigma)
        assert isinstance(applied.schedule, Schedule)
        images[name] = run(sigma)
        config.disable(sigma)
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
    assert harmonica_dit.enable_cache(dit, tmp_path / "router").adapter.architecture == made_for["architecture"]
    for change in (dict(resolution=(8,)), dict(resolution=(8, 0)), dict(architecture={"K": [4]}), dict(architecture=4)):
        with pytest.raises((TypeError, ValueError), match=next(iter(change))):
            random_router(dit, **change)
        with pytest.raises((TypeError, ValueError), match=next(iter(change))):
            dataclasses.replace(schedule, **change)
    with pytest.raises(ValueError, match="guidance"):
        dataclasses.replace(schedule, guidance="much")


@pytest.mark.parametrize("kind", ["dit", "sigma"])
def test_another_number_of_steps(kind):
    """Refused with the numbers, before anything runs; on request each step takes the nearest row."""
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
    for steps in (1, 3, 9, 20):
        timesteps = steps_of(pipe.scheduler, steps)
        nearest = [min(range(6), key=lambda s, t=t: (abs(made[s] - t), s)) for t in timesteps]
        by_hand = Schedule(torch.stack([schedule.compute[s] if i else torch.ones_like(schedule.compute[0])
                                        for i, s in enumerate(nearest)]),
                           schedule.branches, schedule.flops, torch.stack([schedule.extrapolation[s] for s in nearest]))
        expected = run_with_hooks(pipe, by_hand, steps=steps)
        with schedule_on(pipe, schedule, on_mismatch="resample"):
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
    assert len(ours) == 2 and "guidance_scale: this call's is 7, the router was trained with 3" in ours
    assert any("latents are (16, 12), the router was trained with (8, 12)" in text for text in ours)
    harmonica_dit.disable_cache(sigma)
    harmonica_dit.enable_cache(sigma, dataclasses.replace(schedule, timesteps=others, guidance=1.0))
    ours = warnings_of(lambda: [run(sigma, guidance=guidance) for guidance in (0.5, 1.0)])  # neither uses guidance
    assert len(ours) == 1 and ours[0].startswith("timesteps: this call's are")


def warnings_of(call):
    """What a call says of the router."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if "the router" in str(warning.message)]


def test_routers_for_other_models(dit, sigma, tmp_path):
    schedule = random_schedule(dit.transformer)
    arch = {"class": "DiTTransformer2DModel", "K": 4, "D": 24}
    check_refusal(sigma, ValueError, "for 4 branches of .*PixArtTransformer2DModel.* has 6", schedule)
    for change, message in ((arch | {"class": "PixArtTransformer2DModel"}, "Pix.*is .*DiTTransformer2DModel"),
                            (arch | {"D": 1152}, "1152.* is .*24"), (arch | {"K": 56}, "56.* is .*'K': 4")):
        check_refusal(dit, ValueError, f"router: for the architecture .*{message}",
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
    check_refusal(dit, TypeError, "router: got Tensor", torch.zeros(6, 4))
    check_refusal(dit, ValueError, "threshold: a schedule has been decided", schedule, threshold=0.2)
    check_refusal(dit, ValueError, "threshold: got 2", random_router(dit), threshold=2)
    check_refusal(dit, ValueError, "on_mismatch: got 'nearest'", schedule, on_mismatch="nearest")
    check_refusal(dit, ValueError, "on_mismatch: .*what timesteps", schedule, on_mismatch="resample")
    dit.transformer.transformer_blocks[0].register_forward_hook(lambda *_: None)
    check_refusal(dit, ValueError, "transformer_blocks.0: has hooks", schedule)
    sigma.transformer = None
    refused_none = random_schedule(small_pixart())
    with pytest.raises(TypeError, match="transformer: got NoneType"):
        harmonica_dit.enable_cache(sigma, refused_none)


def test_a_pipeline_that_is_not_supported(dit):
    for pipe in (StableDiffusionPipeline.__new__(StableDiffusionPipeline), dit.transformer, None):
        with pytest.raises(TypeError, match=rf"pipe: got {type(pipe).__name__}, expected one of DiTPipeline"):
            harmonica_dit.enable_cache(pipe, "fashion-dit-2.0x")
