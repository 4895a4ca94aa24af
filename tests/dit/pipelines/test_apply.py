"""`apply` on DiTPipeline, PixArtAlphaPipeline and PixArtSigmaPipeline: what two lines promise, and what is refused."""

import copy
import dataclasses
import gc
import inspect
import threading
import warnings
import weakref
from contextlib import contextmanager

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusionPipeline,
)
from torch.utils._python_dispatch import TorchDispatchMode

import harmonica_dit
from harmonica_dit import HarmoniCaConfig, Router, Schedule
from harmonica_dit.flops import Flops
from harmonica_dit.sample import ReferenceDDIM
from harmonica_kernels import FeatureCache
from support.pipes import LINEAR, HookedCache, make_pipe, names_of, random_schedule, run, small_dit, small_pixart


@pytest.fixture(params=["dit", "alpha-1024", "sigma"])
def pipe(request):
    return make_pipe(request.param)


@pytest.fixture
def dit():
    return make_pipe("dit")


@pytest.fixture
def sigma():
    return make_pipe("sigma")


def close(got, expected, tolerance=1e-5):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def hooked(pipe, schedule, **call):
    with HookedCache(pipe.transformer, schedule):
        return run(pipe, **call)


def steps_of(scheduler, steps):
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    return tuple(scheduler.timesteps.tolist())


def random_router(pipe, steps=6, **settings):
    names = names_of(pipe.transformer)
    logits = torch.randn(steps, len(names), generator=torch.Generator().manual_seed(1)) * 2
    settings = dict(timesteps=steps_of(pipe.scheduler, steps), guidance=3.0) | settings
    return Router(logits, names, Flops((1.0,) * len(names), 1.0), **settings)


@contextmanager
def applied_to(pipe, *args, **kwargs):
    harmonica_dit.apply(pipe, *args, **kwargs)
    yield
    harmonica_dit.remove(pipe)


# What a call gives


@pytest.mark.parametrize("kind", ["dit", "alpha", "alpha-1024", "sigma"])
def test_equals_the_hooked_pipeline(kind):
    """Reuse and forecasts, over the whole trajectory; the second call starts afresh."""
    pipe = make_pipe(kind)
    schedule = random_schedule(pipe.transformer)
    plain, expected = run(pipe), hooked(pipe, schedule)
    harmonica_dit.apply(pipe, schedule)
    first, second = run(pipe), run(pipe)
    close(first, expected)
    assert torch.equal(first, second)
    assert (plain - expected).abs().max() > 1e-3 * plain.abs().max()  # the schedule makes a difference


@pytest.mark.parametrize("kind", ["dit", "sigma"])
def test_bfloat16_is_as_near_the_truth_as_diffusers(kind):
    exact = make_pipe(kind)
    rounded = make_pipe(kind, torch.bfloat16, copy.deepcopy(exact.transformer))
    rounded.vae = copy.deepcopy(exact.vae).to(torch.bfloat16)
    exact.transformer.load_state_dict(rounded.transformer.state_dict())
    schedule = random_schedule(exact.transformer)
    latents = {}
    for name, pipe in (("exact", exact), ("rounded", rounded)):
        with HookedCache(pipe.transformer, schedule):
            latents[name] = last_output(pipe)
    harmonica_dit.apply(rounded, schedule)
    ours = last_output(rounded)
    error = (latents["rounded"] - latents["exact"]).norm()
    assert 0 < error and (ours - latents["exact"]).norm() <= 2 * error


def last_output(pipe):
    """The transformer's output at the last step: unlike a decoded image it is not clamped."""
    kept = []
    handle = pipe.transformer.register_forward_hook(
        lambda module, args, output: kept.append(output[0] if isinstance(output, tuple) else output.sample))
    run(pipe)
    handle.remove()
    return kept[-1].float()


def test_only_computed_branches_are_called(pipe):
    schedule = random_schedule(pipe.transformer, share=0.4)
    harmonica_dit.apply(pipe, schedule)
    called = []
    for k, name in enumerate(schedule.branches):
        pipe.transformer.get_submodule(name).register_forward_hook(lambda *_, k=k: called.append(k))
    run(pipe)
    assert called == [k for row in schedule.rows for k, compute in enumerate(row) if compute]


def test_the_text_is_projected_once_a_trajectory(sigma):
    """Its keys and values too."""
    schedule = random_schedule(sigma.transformer, 40, forecast=False)
    expected = hooked(sigma, schedule, steps=40)
    harmonica_dit.apply(sigma, schedule)
    called = []
    names = ("caption_projection", "transformer_blocks.0.attn2.to_k", "transformer_blocks.1.attn2.to_v")
    for i, name in enumerate(names):
        sigma.transformer.get_submodule(name).register_forward_hook(lambda *_, i=i: called.append(i))
    close(run(sigma, steps=40), expected)
    assert sorted(called) == [0, 1, 2]


def test_the_reference_scheduler(dit):
    """Routers trained with harmonica's "ddim" are for its timesteps."""
    dit.scheduler = ReferenceDDIM()
    schedule = random_schedule(dit.transformer, timesteps=(999.0, 799.0, 599.0, 400.0, 200.0, 0.0))
    expected = hooked(dit, schedule)
    with applied_to(dit, schedule), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        close(run(dit), expected)


def test_nothing_is_read_back_while_the_transformer_runs(pipe):
    """On a GPU, reading a tensor's value waits for all that has been launched."""
    reads, inside = [], []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if inside and func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                reads.append(func)
            return func(*args, **kwargs or {})

    harmonica_dit.apply(pipe, random_schedule(pipe.transformer))
    pipe.transformer.register_forward_pre_hook(lambda *_: inside.append(1))
    pipe.transformer.register_forward_hook(lambda *_: inside.clear())
    with Reads():
        run(pipe)
        assert not reads
        inside.append(1)
        torch.ones(1).item()  # and it would be noticed
    assert len(reads) == 1


@pytest.mark.parametrize("call", [dict(images=1), dict(images=3), dict(guidance=1.0), dict(seed=5)], ids=str)
def test_batches_and_guidance(pipe, call):
    schedule = random_schedule(pipe.transformer)
    expected = hooked(pipe, schedule, **call)
    harmonica_dit.apply(pipe, schedule)
    run(pipe)  # a call of another shape leaves nothing behind
    close(run(pipe, **call), expected)


@pytest.mark.parametrize("call", [dict(height=24, width=16), dict(num_images_per_prompt=3, images=1)], ids=str)
def test_image_sizes_and_images_per_prompt(sigma, call):
    schedule = random_schedule(sigma.transformer)
    expected = hooked(sigma, schedule, **call)
    harmonica_dit.apply(sigma, schedule)
    run(sigma)
    close(run(sigma, **call), expected)


def test_a_prompt_through_t5():
    """The ordinary call with words, tokenizer and text encoder."""
    transformers = pytest.importorskip("transformers")
    letters = "abcdefghijklmnopqrstuvwxyz"
    parts = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    parts += [(start + letter, -1.0) for start in ("▁", "") for letter in letters]
    tokenizer = transformers.T5Tokenizer(vocab=parts, extra_ids=0)
    config = transformers.T5Config(vocab_size=len(tokenizer), d_model=20, d_kv=5, d_ff=16, num_layers=1, num_heads=4)
    pipe = make_pipe("alpha")
    pipe.register_modules(tokenizer=tokenizer, text_encoder=transformers.T5EncoderModel(config).eval())

    def call():
        return pipe(["a red cat", "two birds on the lake"], num_inference_steps=4, clean_caption=False, height=16,
                    width=16, use_resolution_binning=False, output_type="latent",
                    generator=torch.Generator().manual_seed(0)).images

    schedule = random_schedule(pipe.transformer, 4)
    with HookedCache(pipe.transformer, schedule):
        expected = call()
    harmonica_dit.apply(pipe, schedule)
    close(call(), expected)


# Removing


def state(pipe):
    """What `remove` has to give back: class and attributes of pipeline, transformer and all its modules."""
    modules = [(module, type(module), dict(vars(module))) for module in pipe.transformer.modules()]
    return type(pipe), {name: id(value) for name, value in vars(pipe).items()}, modules


def test_remove_restores_the_pipeline_to_the_bit(pipe):
    plain, before = run(pipe), state(pipe)
    weights = copy.deepcopy(pipe.transformer.state_dict())
    applied = harmonica_dit.apply(pipe, random_schedule(pipe.transformer))
    assert not torch.equal(run(pipe), plain)
    applied.remove()
    assert state(pipe) == before
    assert all(torch.equal(value, weights[name]) for name, value in pipe.transformer.state_dict().items())
    assert torch.equal(run(pipe), plain)
    with pytest.raises(ValueError, match="no schedule is applied"):
        harmonica_dit.remove(pipe)
    harmonica_dit.apply(pipe, random_schedule(pipe.transformer))  # and it can be applied again
    harmonica_dit.remove(pipe)
    assert state(pipe) == before


def test_the_pipeline_stays_what_it_is(pipe, tmp_path):
    cls, transformer, call = type(pipe), pipe.transformer, inspect.signature(pipe.__call__)
    harmonica_dit.apply(pipe, random_schedule(transformer))
    assert isinstance(pipe, cls) and type(pipe).__name__ == cls.__name__
    assert inspect.signature(pipe.__call__) == call
    assert pipe.transformer is transformer and pipe.components["transformer"] is transformer
    if cls is DiTPipeline:  # whose components can all be saved
        pipe.save_pretrained(tmp_path)
        loaded = DiTPipeline.from_pretrained(tmp_path)
        assert type(loaded) is cls
        assert torch.equal(loaded.transformer.proj_out_2.weight, transformer.proj_out_2.weight)


def test_a_copy_of_the_pipeline_stands_alone(sigma):
    schedule = random_schedule(sigma.transformer)
    harmonica_dit.apply(sigma, schedule)
    expected = run(sigma)
    other = copy.deepcopy(sigma)
    for p in sigma.transformer.parameters():
        p.data.zero_()
    assert torch.equal(run(other), expected)
    harmonica_dit.remove(other)
    with pytest.raises(ValueError, match="applied already"):
        harmonica_dit.apply(sigma, schedule)


# What is left behind, and who else is there


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_call_that_raised_leaves_nothing_behind(pipe, at):
    schedule = random_schedule(pipe.transformer)
    ff = schedule.branches.index("transformer_blocks.0.ff")
    schedule.compute[:, ff] = True
    harmonica_dit.apply(pipe, schedule)
    expected = run(pipe)
    count = iter(range(100))

    def stop(*_):
        if next(count) == at:
            raise Stop

    handle = pipe.transformer.transformer_blocks[0].ff.net[0].register_forward_hook(stop)
    with pytest.raises(Stop):
        run(pipe)
    handle.remove()
    assert not pipe._harmonica._trajectories
    assert torch.equal(run(pipe), expected)


def test_the_cache_is_freed_with_the_call(dit, monkeypatch):
    """At once, not when the garbage collector comes."""
    made, new = [], FeatureCache.__init__
    monkeypatch.setattr(FeatureCache, "__init__", lambda self, *a: made.append(weakref.ref(self)) or new(self, *a))
    harmonica_dit.apply(dit, random_schedule(dit.transformer))
    gc.collect()
    gc.disable()
    try:
        run(dit)
        assert len(made) == 1 and made[0]() is None
    finally:
        gc.enable()


def test_outside_a_call_the_transformer_computes_everything(dit):
    x = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.tensor([1, 1000])
    with torch.no_grad():
        expected = dit.transformer(*x).sample
        harmonica_dit.apply(dit, random_schedule(dit.transformer))
        run(dit)
        assert torch.equal(dit.transformer(*x).sample, expected)


def test_the_transformer_must_not_be_used_inside_a_call(sigma):
    """It would be taken for a step."""
    harmonica_dit.apply(sigma, random_schedule(sigma.transformer))
    text = torch.randn(4, 9, 20)

    def callback(step, timestep, latents):
        if step == 2:
            sigma.transformer(torch.cat([latents] * 2), encoder_hidden_states=text, timestep=timestep.expand(4))

    with pytest.raises(RuntimeError, match="call 7 of the transformer; the scheduler lists 6"):
        run(sigma, callback=callback)
    run(sigma)


def test_pipelines_that_share_a_transformer():
    """Each with a schedule of its own, and one without."""
    transformer = small_pixart()
    pipes = [make_pipe("sigma", transformer=transformer) for _ in range(2)]
    pipes.append(PixArtAlphaPipeline.from_pipe(pipes[0]))
    pipes[2].set_progress_bar_config(disable=True)
    plain = run(pipes[2])
    schedules = [random_schedule(transformer, seed=seed) for seed in range(2)]
    expected = [hooked(pipe, schedule) for pipe, schedule in zip(pipes, schedules)]
    for pipe, schedule in zip(pipes, schedules):
        harmonica_dit.apply(pipe, schedule)
    for _ in range(2):
        for pipe, image in zip(pipes, expected):
            close(run(pipe), image)
        assert torch.equal(run(pipes[2]), plain)
    late = PixArtSigmaPipeline.from_pipe(pipes[0])
    late.set_progress_bar_config(disable=True)
    assert late.transformer is transformer and torch.equal(run(late), plain)
    harmonica_dit.remove(pipes[0])
    assert torch.equal(run(pipes[0]), plain)
    close(run(pipes[1]), expected[1])


def test_a_call_inside_a_call(sigma):
    """From a callback: of another pipeline with the same transformer, and of this one with a scheduler of its own."""
    other = make_pipe("sigma", transformer=sigma.transformer)
    schedules = [random_schedule(sigma.transformer, seed=seed) for seed in range(2)]
    harmonica_dit.apply(sigma, schedules[0])
    harmonica_dit.apply(other, schedules[1])
    expected, inner = run(sigma), run(other)
    found = []

    def callback(step, timestep, latents):
        if step == 2:
            found.append(run(other))

    assert torch.equal(run(sigma, callback=callback), expected)
    assert torch.equal(found[0], inner)
    harmonica_dit.remove(sigma)
    sigma.scheduler = DDIMScheduler(**LINEAR)  # which keeps no history
    harmonica_dit.apply(sigma, schedules[0])
    expected, inner = run(sigma), run(sigma, seed=3)
    found.clear()

    def callback_of_its_own(step, timestep, latents):
        if step == 2:
            found.append(run(sigma, seed=3))

    assert torch.equal(run(sigma, callback=callback_of_its_own), expected)
    assert torch.equal(found[0], inner)


def test_threads():
    """Pipelines with one transformer, and one pipeline with a scheduler that keeps no history, at the same time."""
    transformer = small_dit()
    pipes = [make_pipe("dit", transformer=transformer) for _ in range(3)]
    for seed, pipe in enumerate(pipes[:2]):
        harmonica_dit.apply(pipe, random_schedule(transformer, 8, seed=seed))
    jobs = [(pipe, seed, images) for pipe in pipes for seed in range(2) for images in (1, 2)]
    expected = [run(pipe, 8, seed, images) for pipe, seed, images in jobs]
    found, start = [None] * len(jobs), threading.Barrier(len(jobs))

    def work(i):
        pipe, seed, images = jobs[i]
        start.wait()
        found[i] = run(pipe, 8, seed, images)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, image in zip(found, expected):
        assert torch.equal(got, image)
    assert not any(pipe._harmonica._trajectories for pipe in pipes[:2])


# What `apply` takes


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
    close(images["router"], hooked(sigma, router.schedule()))


def test_the_fingerprint_goes_through_files(dit, tmp_path):
    made_for = dict(resolution=(8, 8), architecture={"class": "DiTTransformer2DModel", "K": 4, "D": 24})
    router = random_router(dit, **made_for)
    router.save(tmp_path / "router")
    loaded = Router.load(tmp_path / "router")
    schedule = loaded.schedule()
    schedule.save(tmp_path / "schedule")
    for found in (loaded, schedule, Schedule.load(tmp_path / "schedule")):
        assert {name: getattr(found, name) for name in made_for} == made_for and found.guidance == 3.0
    assert harmonica_dit.apply(dit, tmp_path / "router").adapter.architecture == made_for["architecture"]
    for change in (dict(resolution=(8,)), dict(resolution=(8, 0)), dict(architecture={"K": [4]}), dict(architecture=4)):
        with pytest.raises((TypeError, ValueError), match=next(iter(change))):
            random_router(dit, **change)
        with pytest.raises((TypeError, ValueError), match=next(iter(change))):
            dataclasses.replace(schedule, **change)
    with pytest.raises(ValueError, match="guidance"):
        dataclasses.replace(schedule, guidance="much")


# Other step counts


@pytest.mark.parametrize("kind", ["dit", "sigma"])
def test_another_number_of_steps(kind):
    """Refused with the numbers, before anything runs; on request each step takes the nearest row."""
    pipe = make_pipe(kind)
    made = steps_of(pipe.scheduler, 6)
    schedule = random_schedule(pipe.transformer, timesteps=made)
    with applied_to(pipe, schedule):
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
        expected = hooked(pipe, by_hand, steps=steps)
        with applied_to(pipe, schedule, on_mismatch="resample"):
            close(run(pipe, steps=steps), expected)
    with applied_to(pipe, random_schedule(pipe.transformer)):
        with pytest.raises(ValueError, match="T = 6; use 6 steps"):
            run(pipe, steps=9)


def test_timesteps_given_to_the_call(sigma):
    """PixArt pipelines take a list of them."""
    listed = [900, 700, 500, 100]
    sigma.scheduler = DPMSolverMultistepScheduler(**LINEAR)
    schedule = random_schedule(sigma.transformer, 4, timesteps=(900, 700, 500, 100))
    expected = hooked(sigma, schedule, timesteps=listed)
    with applied_to(sigma, schedule), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        close(run(sigma, timesteps=listed), expected)
        with pytest.raises(ValueError, match="5 steps"):
            run(sigma, timesteps=[900, 800, 700, 500, 100])


def test_warns_once_of_what_the_router_was_not_trained_for(sigma):
    made = steps_of(sigma.scheduler, 6)
    others = tuple(t - 1 for t in made)
    schedule = random_schedule(sigma.transformer, timesteps=made, guidance=3.0, resolution=(8, 12))
    harmonica_dit.apply(sigma, schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(sigma)
    with pytest.warns(UserWarning) as caught:
        for _ in range(2):
            run(sigma, guidance=7.0, height=32)
    ours = [str(w.message) for w in caught if "the router" in str(w.message)]
    assert len(ours) == 2 and "guidance_scale: this call's is 7, the router was trained with 3" in ours
    assert any("latents are (16, 12), the router was trained with (8, 12)" in text for text in ours)
    harmonica_dit.remove(sigma)
    harmonica_dit.apply(sigma, dataclasses.replace(schedule, timesteps=others, guidance=1.0))
    with pytest.warns(UserWarning, match="timesteps: this call's are") as caught:
        run(sigma, guidance=0.5)  # neither uses guidance
        run(sigma, guidance=1.0)
    assert len([w for w in caught if "the router" in str(w.message)]) == 1


# Bad input: an error of its own, and nothing half-applied


def refused(pipe, error, message, *args, **kwargs):
    before = state(pipe) if "transformer" in vars(pipe) else None
    with pytest.raises(error, match=message):
        harmonica_dit.apply(pipe, *args, **kwargs)
    if before is not None:
        assert state(pipe) == before


def test_routers_for_other_models(dit, sigma, tmp_path):
    schedule = random_schedule(dit.transformer)
    arch = {"class": "DiTTransformer2DModel", "K": 4, "D": 24}
    refused(sigma, ValueError, "for 4 branches of .*PixArtTransformer2DModel.* has 6", schedule)
    for change, message in ((arch | {"class": "PixArtTransformer2DModel"}, "Pix.*is .*DiTTransformer2DModel"),
                            (arch | {"D": 1152}, "1152.* is .*24"), (arch | {"K": 56}, "56.* is .*'K': 4")):
        refused(dit, ValueError, f"router: for the architecture .*{message}",
                dataclasses.replace(schedule, architecture=change))
    names = ("blocks.0.attn", *schedule.branches[1:])
    refused(dit, ValueError, "branch 0 is 'blocks.0.attn', the model 'DiTTransformer2DModel' has 'transformer_blocks",
            dataclasses.replace(schedule, branches=names, architecture=arch))
    refused(dit, ValueError, "fashion-dit-2.0x: for 16 branches", "fashion-dit-2.0x")  # a file without a fingerprint
    named = dataclasses.replace(schedule, architecture=arch, model="facebook/DiT-XL-2-256")
    with pytest.warns(UserWarning, match="made for the model 'facebook/DiT-XL-2-256'"):
        harmonica_dit.apply(dit, named)
    run(dit)
    harmonica_dit.remove(dit)
    dit.register_to_config(_name_or_path="facebook/DiT-XL-2-256")  # as from_pretrained does
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        harmonica_dit.apply(dit, named)


def test_other_bad_input(dit, sigma, tmp_path):
    schedule = random_schedule(dit.transformer)
    refused(dit, FileNotFoundError, "no file at .*nothing.safetensors", tmp_path / "nothing.safetensors")
    (tmp_path / "text").write_text("no router")
    refused(dit, ValueError, "text is not a whole safetensors file", tmp_path / "text")
    refused(dit, TypeError, "router: got Tensor", torch.zeros(6, 4))
    refused(dit, ValueError, "threshold: a schedule has been decided", schedule, threshold=0.2)
    refused(dit, ValueError, "threshold: got 2", random_router(dit), threshold=2)
    refused(dit, ValueError, "on_mismatch: got 'nearest'", schedule, on_mismatch="nearest")
    refused(dit, ValueError, "on_mismatch: .*what timesteps", schedule, on_mismatch="resample")
    dit.transformer.transformer_blocks[0].register_forward_hook(lambda *_: None)
    refused(dit, ValueError, "transformer_blocks.0: has hooks", schedule)
    sigma.transformer = None
    refused_none = random_schedule(small_pixart())
    with pytest.raises(TypeError, match="transformer: got NoneType"):
        harmonica_dit.apply(sigma, refused_none)


def test_a_pipeline_that_is_not_supported(dit):
    for pipe in (StableDiffusionPipeline.__new__(StableDiffusionPipeline), dit.transformer, None):
        with pytest.raises(TypeError, match=rf"pipe: got {type(pipe).__name__}, expected one of DiTPipeline"):
            harmonica_dit.apply(pipe, "fashion-dit-2.0x")


def test_a_subclass_is_supported():
    class Mine(DiTPipeline):
        pass

    made = make_pipe("dit")
    pipe = Mine(**made.components)
    pipe.set_progress_bar_config(disable=True)
    schedule = random_schedule(pipe.transformer)
    expected = hooked(pipe, schedule)
    harmonica_dit.apply(pipe, schedule)
    close(run(pipe), expected)
    harmonica_dit.remove(pipe)
    assert type(pipe) is Mine


def test_a_second_apply(dit):
    schedule = random_schedule(dit.transformer)
    harmonica_dit.apply(dit, schedule)
    expected = run(dit)
    refused(dit, ValueError, "applied already .*remove", random_schedule(dit.transformer, seed=1))
    assert torch.equal(run(dit), expected)


def test_parts_changed_after_apply(dit):
    harmonica_dit.apply(dit, random_schedule(dit.transformer))
    expected, scheduler, transformer = run(dit), dit.scheduler, dit.transformer
    dit.scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config)
    with pytest.raises(ValueError, match="was a DDIMScheduler when .* is a DPMSolverMultistepScheduler now.*remove"):
        run(dit)
    dit.scheduler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="DDIMScheduler .* is one of another configuration now"):
        run(dit)
    dit.scheduler = DDIMScheduler.from_config(scheduler.config)
    assert torch.equal(run(dit), expected)
    dit.transformer = small_dit()
    with pytest.raises(ValueError, match="pipe.transformer: is another module"):
        run(dit)
    dit.transformer = transformer
    transformer.transformer_blocks[1].compile(backend="eager")
    with pytest.raises(ValueError, match="transformer_blocks.1: has been compiled"):
        run(dit)
    transformer.transformer_blocks[1]._compiled_call_impl = None
    transformer.compile(backend="eager")
    with pytest.raises(ValueError, match="transformer: has been compiled"):
        run(dit)
    transformer._compiled_call_impl = None
    assert torch.equal(run(dit), expected)


# Hooks, offloading, quantization


def test_module_hooks_on_the_transformer_run(dit):
    harmonica_dit.apply(dit, random_schedule(dit.transformer))
    seen = []
    dit.transformer.register_forward_pre_hook(lambda module, args: seen.append("before"))
    dit.transformer.register_forward_hook(lambda module, args, output: seen.append("after"))
    run(dit)
    assert seen == ["before", "after"] * 6


@pytest.mark.parametrize("first", ["offload", "apply"])
def test_model_offload_is_honoured(dit, first):
    """accelerate's hook, as enable_model_cpu_offload sets it: around every step, on the transformer itself."""
    schedule = random_schedule(dit.transformer)
    expected = hooked(dit, schedule)
    plain = run(dit)
    if first == "apply":
        harmonica_dit.apply(dit, schedule)
    _, hook = cpu_offload_with_hook(dit.transformer, "cpu")
    if first == "offload":
        harmonica_dit.apply(dit, schedule)
    moved, pre_forward = [], hook.hook.pre_forward
    hook.hook.pre_forward = lambda module, *a, **k: moved.append(module) or pre_forward(module, *a, **k)
    close(run(dit), expected)
    assert len(moved) == 6 and all(module is dit.transformer for module in moved)
    harmonica_dit.remove(dit)
    assert torch.equal(run(dit), plain)


def test_the_hooks_of_offloading_are_set_anew_on_the_transformer_itself(dit, monkeypatch):
    """diffusers does so at the end of a call, with whatever `pipe.transformer` is then."""
    seen = []
    monkeypatch.setattr(DiTPipeline, "maybe_free_model_hooks", lambda self: seen.append(self.transformer))
    harmonica_dit.apply(dit, random_schedule(dit.transformer))
    run(dit)
    assert len(seen) == 1 and seen[0] is vars(dit)["transformer"]


def test_offloading_of_single_modules(dit, sigma):
    """accelerate's sequential offload: DiT's weights lie in layers that are called; PixArt's blocks own some."""
    schedule = random_schedule(dit.transformer)
    expected = hooked(dit, schedule)
    for pipe in (dit, sigma):
        cpu_offload(pipe.transformer, "cpu")
    assert dit.transformer.proj_out_2.weight.is_meta
    harmonica_dit.apply(dit, schedule)
    close(run(dit), expected)
    refused(sigma, ValueError, "transformer_blocks.0: has a replaced forward .*enable_model_cpu_offload",
            random_schedule(sigma.transformer))


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_diffusers_group_offload_is_refused(sigma, level):
    sigma.transformer.enable_group_offload(torch.device("cpu"), offload_type=level, num_blocks_per_group=1)
    refused(sigma, ValueError, "transformer_blocks.*: has a replaced forward|its forward has been replaced",
            random_schedule(sigma.transformer))


def test_layerwise_casting_is_honoured(sigma):
    """diffusers' hooks on single layers: stored in 8 bits, computed in 32."""
    schedule = random_schedule(sigma.transformer)
    exact = hooked(sigma, schedule)
    sigma.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert sigma.transformer.transformer_blocks[0].ff.net[-1].weight.dtype == torch.float8_e4m3fn
    expected = hooked(sigma, schedule)
    assert not torch.equal(expected, exact)
    harmonica_dit.apply(sigma, schedule)
    close(run(sigma), expected)


@pytest.mark.parametrize("kind", ["dit", "sigma"])
@pytest.mark.parametrize("first", ["quantize", "apply"])
def test_quantized_by_torchao(kind, first):
    """Int8 weights, and int8 activations too: as diffusers with the same linears, only with branches reused."""
    torchao = pytest.importorskip("torchao.quantization")
    for config in (torchao.Int8WeightOnlyConfig(), torchao.Int8DynamicActivationInt8WeightConfig()):
        transformer = (small_dit if kind == "dit" else small_pixart)(attention_head_dim=16, **(
            {} if kind == "dit" else dict(cross_attention_dim=32)))
        pipe = make_pipe(kind, transformer=transformer)
        schedule = random_schedule(transformer)
        with HookedCache(transformer, schedule):
            exact = last_output(pipe)
        if first == "apply":
            harmonica_dit.apply(pipe, schedule)
        torchao.quantize_(transformer, config)
        if first == "quantize":
            harmonica_dit.apply(pipe, schedule)
        ours = last_output(pipe)
        harmonica_dit.remove(pipe)
        with HookedCache(transformer, schedule):
            theirs = last_output(pipe)
        error = (theirs - exact).norm()
        assert 0 < error < 0.5 * exact.norm()
        if isinstance(config, torchao.Int8WeightOnlyConfig):
            close(ours, theirs)
        else:  # rounding the activations multiplies every difference in their last bits
            assert (ours - exact).norm() <= 1.5 * error


def test_another_replaced_forward_is_refused(dit):
    dit.transformer.forward = dit.transformer.forward
    refused(dit, ValueError, "pipe.transformer: its forward has been replaced", random_schedule(dit.transformer))
