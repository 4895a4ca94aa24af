"""`enable_cache` on DiTPipeline, PixArtAlphaPipeline and PixArtSigmaPipeline gives what a slow cache of hooks gives."""

import copy
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import harmonica_dit
from harmonica_dit.flops import Flops
from harmonica_dit.methods.trunk import whole_steps
from harmonica_dit.pipelines.adapters import adapt
from harmonica_dit.sample import ReferenceDDIM
from support.enable_checks import last_output, run_with_hooks, schedule_on
from support.pipes import HookedCache, make_pipe, random_schedule, run
from support.tolerance import assert_close


@pytest.mark.parametrize("kind", ["dit", "alpha", "alpha-1024", "sigma"])
def test_equals_the_hooked_pipeline(kind):
    """Reuse and forecasts, over the whole trajectory; the second call starts afresh."""
    pipe = make_pipe(kind)
    schedule = random_schedule(pipe.transformer)
    plain, expected = run(pipe), run_with_hooks(pipe, schedule)
    harmonica_dit.enable_cache(pipe, schedule)
    first, second = run(pipe), run(pipe)
    assert_close(first, expected)
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
    harmonica_dit.enable_cache(rounded, schedule)
    ours = last_output(rounded)
    error = (latents["rounded"] - latents["exact"]).norm()
    assert 0 < error and (ours - latents["exact"]).norm() <= 2 * error


def test_only_computed_branches_are_called(pipe):
    schedule = random_schedule(pipe.transformer, share=0.4)
    harmonica_dit.enable_cache(pipe, schedule)
    called = []
    for k, name in enumerate(schedule.branches):
        pipe.transformer.get_submodule(name).register_forward_hook(lambda *_, k=k: called.append(k))
    run(pipe)
    assert called == [k for row in schedule.rows for k, compute in enumerate(row) if compute]


def test_the_speedup_as_run_is_the_schedules(pipe):
    """What the forecasts cost is counted too; made to weigh here."""
    names = adapt(pipe.transformer).branch_names
    schedule = whole_steps(6, Flops((1.0,) * len(names), 1.0), 2, every=2, names=names)
    harmonica_dit.enable_cache(pipe, schedule)
    run(pipe)
    found = harmonica_dit.summary(pipe)
    assert found.streams[0].plain_flops / found.streams[0].flops == found.speedup == pytest.approx(schedule.speedup)
    assert found.speedup < 6 * (len(names) + 1) / (3 * len(names) + 6) - 0.01


def test_the_text_is_projected_once_a_trajectory(sigma, monkeypatch):
    """Its keys and values too. (Counted by weights: a layer with a hook would be asked at each step.)"""
    schedule = random_schedule(sigma.transformer, 40, forecast=False)
    expected = run_with_hooks(sigma, schedule, steps=40)
    harmonica_dit.enable_cache(sigma, schedule)
    called, linear = [], torch.nn.functional.linear
    names = ("caption_projection.linear_1", "transformer_blocks.0.attn2.to_k", "transformer_blocks.1.attn2.to_v")
    weights = [sigma.transformer.get_submodule(name).weight for name in names]
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, *bias: (
        called.extend(i for i, weight in enumerate(weights) if w is weight) or linear(x, w, *bias)))
    assert_close(run(sigma, steps=40), expected)
    assert sorted(called) == [0, 1, 2]


def test_the_reference_scheduler(dit):
    """Routers trained with harmonica's "ddim" are for its timesteps."""
    dit.scheduler = ReferenceDDIM()
    schedule = random_schedule(dit.transformer, timesteps=(999.0, 799.0, 599.0, 400.0, 200.0, 0.0))
    expected = run_with_hooks(dit, schedule)
    with schedule_on(dit, schedule), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_close(run(dit), expected)


def test_nothing_is_read_back_while_the_transformer_runs(pipe):
    """On a GPU, reading a tensor's value waits for all that has been launched."""
    reads, inside = [], []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if inside and func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                reads.append(func)
            return func(*args, **kwargs or {})

    harmonica_dit.enable_cache(pipe, random_schedule(pipe.transformer))
    run(pipe)  # makes the schedule's own tables
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
    expected = run_with_hooks(pipe, schedule, **call)
    harmonica_dit.enable_cache(pipe, schedule)
    run(pipe)  # a call of another shape leaves nothing behind
    assert_close(run(pipe, **call), expected)


@pytest.mark.parametrize("call", [dict(height=24, width=16), dict(num_images_per_prompt=3, images=1)], ids=str)
def test_image_sizes_and_images_per_prompt(sigma, call):
    schedule = random_schedule(sigma.transformer)
    expected = run_with_hooks(sigma, schedule, **call)
    harmonica_dit.enable_cache(sigma, schedule)
    run(sigma)
    assert_close(run(sigma, **call), expected)


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
    harmonica_dit.enable_cache(pipe, schedule)
    assert_close(call(), expected)
