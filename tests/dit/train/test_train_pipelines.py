"""Routers for diffusers pipelines, from a folder in the real format to a pipeline that runs them."""

import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, PixArtAlphaPipeline
from typer.testing import CliRunner

import harmonica_dit
import harmonica_kernels as hk
from harmonica_dit.cli import app
from harmonica_dit.files import load_tensors, save_tensors
from harmonica_dit.flops import count_flops
from harmonica_dit.methods import fora
from harmonica_dit.pipelines import prompts
from harmonica_dit.router import Router
from harmonica_dit.sample import Trajectory, denoise, image_noise, sample
from harmonica_dit.train import train_learning_to_cache, train_router
from harmonica_dit.train.frozen_model import checkpoint_bodies, freeze
from support.cpu_recorder import CpuRecorder
from support.pipeline_folders import save_pixart
from support.tolerance import assert_close

TEXTS = ("a cat", "the quick brown fox", "dogs")
SMALL = dict(steps=4, trajectories=2, batch=2, lr=0.1, progress=False)


@pytest.fixture
def net(pixart):
    return harmonica_dit.load(str(pixart), prompts=TEXTS)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("size", [8, 128])
def test_a_text_models_trajectory_is_the_pipelines_own(pixart, tmp_path, guidance, size):
    """The same latents from the same noise; at 1024 pixels, micro-conditions and all.

    With random weights the latents grow to about 1000, where float32's neighbours are 1e-4 apart, and guidance
    multiplies the rounding of two predictions. So the tolerance is in units of the largest latent: rounding is 2e-6 of
    it, guidance that is off by a hundred thousandth 5e-6 to 1e-5, another prompt 8 % or more.
    """
    folder = pixart if size == 8 else save_pixart(tmp_path / "large", sample_size=128, patch_size=16,
                                                       attention_head_dim=12, cross_attention_dim=24)
    pipe = PixArtAlphaPipeline.from_pretrained(folder)
    net = harmonica_dit.load(str(folder), prompts=TEXTS)
    assert net.guidance == 4.5 and net.sample_shape == (4, size, size)
    noise = image_noise(0, 0, 3, net.sample_shape)
    expected = pipe(list(TEXTS), num_inference_steps=3, latents=noise, guidance_scale=guidance, output_type="latent",
                    use_resolution_binning=False, height=8 * size, width=8 * size).images
    found = denoise(Trajectory(net, torch.arange(3), steps=3, guidance=guidance), noise)
    assert_close(found, expected, tolerance=1e-5)
    other = denoise(Trajectory(net, torch.tensor([1, 0, 2]), steps=3, guidance=guidance), noise)
    assert ((other - expected)[:2].abs().amax((1, 2, 3)) > 1e-2 * expected.abs().max()).all()  # prompts matter


def test_a_class_models_trajectory_is_the_pipelines_own(dit):
    pipe, net = DiTPipeline.from_pretrained(dit), harmonica_dit.load(str(dit))
    assert (net.guidance, net.num_classes, net.name) == (4.0, 1000, "small-dit")
    expected = pipe([3, 700], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np")
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = denoise(Trajectory(net, torch.tensor([3, 700]), steps=3), noise)
        images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    assert images.std() > 1e-3
    np.testing.assert_allclose((images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), expected.images, atol=1e-4)


def test_prompts_are_encoded_once(pixart, tmp_path):
    """As the pipeline encodes them; afterwards the text encoder is not needed, nor loaded."""
    pipe, path = PixArtAlphaPipeline.from_pretrained(pixart), tmp_path / "prompts.safetensors"
    net = harmonica_dit.load(str(pixart), prompts=TEXTS, embeddings=path)
    embeds, mask, none, none_mask = pipe.encode_prompt(list(TEXTS))
    assert torch.equal(net.prompts.mask, torch.cat([mask, none_mask[:1]]))
    torch.testing.assert_close(net.prompts.embeddings, torch.cat([embeds, none[:1]]).detach())
    assert not any("T5" in type(module).__name__ for module in net.modules())
    copied = tmp_path / pixart.name
    shutil.copytree(pixart, copied)
    shutil.rmtree(copied / "text_encoder")
    again = harmonica_dit.load(str(copied), prompts=list(TEXTS), embeddings=path)
    assert torch.equal(again.prompts.embeddings, net.prompts.embeddings)
    for change, words in ((dict(prompts=TEXTS[:2]), "3 other prompts than the 2 given"),
                          (dict(dtype="bfloat16"), "encoded with dtype torch.float32")):
        with pytest.raises(ValueError, match=words):
            harmonica_dit.load(str(copied), **dict(prompts=TEXTS, embeddings=path) | change)
    copied.rename(tmp_path / "another")
    with pytest.raises(ValueError, match="encoded with model small-pixart, expected another"):
        harmonica_dit.load(str(tmp_path / "another"), prompts=TEXTS, embeddings=path)


def test_an_interrupted_encoding_leaves_no_file(pixart, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "BATCH", 1)
    real, path = PixArtAlphaPipeline.encode_prompt, tmp_path / "prompts.safetensors"
    count = iter(range(2))

    def interrupt(*arguments, **options):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(PixArtAlphaPipeline, "encode_prompt", interrupt)
    with pytest.raises(KeyboardInterrupt):
        harmonica_dit.load(str(pixart), prompts=TEXTS, embeddings=path)
    assert not list(tmp_path.iterdir())


def test_train_save_apply_sample(pixart, tmp_path):
    """The whole way by the command, on from an interruption, into a pipeline."""
    (tmp_path / "prompts.txt").write_text("\n".join(["a cat", "", " the quick brown fox ", "dogs"]) + "\n", "utf-8")
    out = tmp_path / "out"
    command = ["train", "--model", str(pixart), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(out),
               "--steps", "4", "--trajectories", "2", "--batch", "2", "--lr", "0.1", "--target-speedup", "1.5"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    router = Router.load(out / "router.safetensors")
    pipe = PixArtAlphaPipeline.from_pretrained(pixart)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.set_timesteps(4)
    assert router.timesteps == tuple(pipe.scheduler.timesteps.tolist())
    assert (router.model, router.scheduler, router.guidance) == ("small-pixart", "DPMSolverMultistepScheduler", 4.5)
    assert router.resolution == (8, 8) and router.architecture["class"] == "PixArtTransformer2DModel"
    assert prompts.Prompts.load(out / "prompts.safetensors").texts == TEXTS

    noise = image_noise(0, 0, 1, (4, 8, 8))
    options = dict(num_inference_steps=4, latents=noise, output_type="latent", use_resolution_binning=False)
    uncached = pipe("a cat", **options).images
    harmonica_dit.enable_cache(pipe, out / "router.safetensors")
    cached = pipe("a cat", **options).images
    net = harmonica_dit.load(str(pixart), prompts=TEXTS)
    ours = denoise(Trajectory(net, torch.tensor([0]), steps=4), noise, router.schedule())
    torch.testing.assert_close(cached, ours, rtol=1e-4, atol=1e-4)
    assert (cached - uncached).abs().max() > 1e-3

    (tmp_path / "prompts.txt").write_text("another\n", "utf-8")
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and "holds 3 other prompts than the 1 given" in result.output


def test_routers_of_class_models(dit):
    net = harmonica_dit.load(str(dit))
    router = train_router(net, target_cur=0.4375, **SMALL)  # 7 of 16 entries
    assert router.scheduler == "DDIMScheduler" and router.guidance == 4.0
    pipe = DiTPipeline.from_pretrained(dit)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.set_timesteps(4)
    assert router.timesteps == tuple(pipe.scheduler.timesteps.tolist())
    harmonica_dit.enable_cache(pipe, router)
    assert np.isfinite(pipe([1], num_inference_steps=4, output_type="np").images).all()


def test_other_prompts_are_another_training(pixart, net, tmp_path):
    train_router(net, beta=1e-3, out=tmp_path, **SMALL)
    other = harmonica_dit.load(str(pixart), prompts=("a cat", "the quick brown fox", "birds"))
    with pytest.raises(ValueError, match="of a training with prompts="):
        train_router(other, beta=1e-3, out=tmp_path, **SMALL)


def test_flops_are_the_bodies(net):
    """Of 16 tokens of width 16 and 120 tokens of text: what the layers' sizes say."""
    flops, N, L, D = count_flops(net), 16, 120, 16
    attention, cross, feed_forward = flops.branches[:3]
    assert attention == 2 * (4 * N * D * D + 2 * N * N * D)
    assert cross == 2 * (2 * N * D * D + 2 * L * D * D + 2 * N * L * D)
    assert feed_forward == 2 * 8 * N * D * D
    assert flops.branches[3:] == flops.branches[:3] and flops.fixed > 0
    assert net.branches[0].body_out is not None  # the model is itself again


def error_and_gradient(net, **options):
    """One soft step after a full one: the error's gradient with respect to the scores."""
    import harmonica_kernels as hk

    noise = image_noise(0, 0, 2, net.sample_shape)
    trajectory, cache = Trajectory(net, torch.tensor([0, 2]), steps=4, **options), hk.FeatureCache()
    with torch.no_grad():
        x = trajectory.advance(trajectory.predict(noise, 0, cache=cache), 0, noise)
        target = trajectory.predict(x, 1)
    r = torch.linspace(0.05, 0.95, len(net.branches), requires_grad=True)
    output = trajectory.predict(x, 1, row=r, cache=cache, threshold=0.5)
    error = (output - target).square().mean()
    error.backward()
    cache.commit()
    return error.detach(), r.grad, [cache.latest(k).clone() for k in range(len(net.branches))]


def count_kept_bytes(net, **options):
    """Bytes that autograd keeps for the backward of one soft step, beside the weights."""
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        error_and_gradient(net, **options)
    return sum(size for size, _ in storages.values())


@pytest.mark.parametrize("options", [dict(), dict(autocast="bfloat16")])
def test_checkpointing_keeps_less_and_changes_nothing(net, options):
    with freeze(net):
        plain, plain_bytes = error_and_gradient(net, **options), count_kept_bytes(net, **options)
        with checkpoint_bodies(net):
            again, bytes_ = error_and_gradient(net, **options), count_kept_bytes(net, **options)
    for a, b in zip((plain[0], plain[1], *plain[2]), (again[0], again[1], *again[2]), strict=True):
        assert torch.equal(a, b)
    assert plain[1].abs().min() > 0
    assert bytes_ < 0.6 * plain_bytes, (bytes_, plain_bytes)


def test_a_checkpointed_training_ends_with_the_same_bits(net):
    routers = [train_router(net, beta=1e-3, extrapolation="learned", checkpointing=checkpointing, **SMALL)
               for checkpointing in (False, True)]
    for a, b in zip(*(router.state_dict().values() for router in routers), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [dict(autocast="bfloat16"), dict(dtype="bfloat16")])
def test_bfloat16(pixart, options):
    """Gradients are those of float32 to bfloat16's precision; latents and scores stay float32."""
    dtype = options.pop("dtype", "float32")
    exact = harmonica_dit.load(str(pixart), prompts=TEXTS)
    net = harmonica_dit.load(str(pixart), prompts=TEXTS, dtype=dtype)
    with freeze(exact), freeze(net):
        (_, expected, _), (_, found, outputs) = error_and_gradient(exact), error_and_gradient(net, **options)
    assert found.dtype == torch.float32 and outputs[0].dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.95
    router = train_router(net, beta=1e-3, **SMALL | options)
    assert router.scores().isfinite().all()


def test_float16_is_for_sampling_only(pixart):
    net = harmonica_dit.load(str(pixart), prompts=TEXTS, dtype="float16")
    with pytest.raises(ValueError, match="net: its weights are float16"):
        train_router(net, beta=1e-3, **SMALL)


def test_the_size_of_images(pixart):
    net = harmonica_dit.load(str(pixart), prompts=TEXTS, image_size=96)
    assert net.sample_shape == (4, 12, 12)
    assert train_router(net, beta=1e-3, **SMALL).resolution == (12, 12)
    for size in (95, 8, 0, 96.0):
        with pytest.raises(ValueError, match="image_size: got"):
            harmonica_dit.load(str(pixart), prompts=TEXTS, image_size=size)


def test_a_checkpoint_of_other_images_is_refused(dit, tmp_path):
    train_router(harmonica_dit.load(str(dit)), beta=1e-3, out=tmp_path, **SMALL)
    for change, said in ((dict(image_size=96), "sample_shape="), (dict(dtype="bfloat16"), "dtype=")):
        with pytest.raises(ValueError, match=f"of a training with {said}"):
            train_router(harmonica_dit.load(str(dit), **change), beta=1e-3, out=tmp_path, **SMALL)


def test_bad_input(pixart, dit, tmp_path):
    text, classes = str(pixart), str(dit)
    for arguments, words in (
            ((text,), "prompts: small-pixart is conditioned on text"),
            ((text, "weights.pt"), "checkpoint: .* a pipeline"),
            ((classes, None, TEXTS), "prompts: small-dit is conditioned on classes"),
            (("fashion-dit", None, TEXTS), "prompts: fashion-dit is conditioned on classes"),
            ((text, None, "a cat"), "prompts: got 'a cat', expected a list"), ((text, None, ()), "prompts: got"),
            ((text, None, ["a", " "]), "prompts: got"), ((text, None, [5]), "prompts: got")):
        name, checkpoint, texts = (*arguments, None, None)[:3]
        with pytest.raises(ValueError, match=words):
            harmonica_dit.load(name, checkpoint, prompts=texts)
    with pytest.raises(ValueError, match="dtype: got 'int8'"):
        harmonica_dit.load("fashion-dit", dtype="int8")
    diffusers.DDPMPipeline(diffusers.UNet2DModel(sample_size=8, block_out_channels=(4, 4), norm_num_groups=2,
                                                 down_block_types=("DownBlock2D",) * 2,
                                                 up_block_types=("UpBlock2D",) * 2, layers_per_block=1,
                                                 attention_head_dim=2),
                           diffusers.DDPMScheduler()).save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="DDPMPipeline's call takes no latents, so its steps cannot"):
        harmonica_dit.load(str(tmp_path / "unet"))


def test_bad_prompt_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="prompts: no file"):
        prompts.read_texts(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    for name, words in (("empty", "holds none"), ("latin", "not UTF-8")):
        with pytest.raises(ValueError, match=words):
            prompts.read_texts(tmp_path / f"{name}.txt")


def test_bad_files_of_embeddings(net, tmp_path):
    path = tmp_path / "prompts.safetensors"
    net.prompts.save(path)
    tensors, metadata = load_tensors(path)
    for changed, words in ((({}, metadata), "not a whole file"),
                           ((tensors, metadata | dict(kind="router")), "not a file"),
                           ((tensors, metadata | dict(texts=["a"])), "expected 2 embeddings"),
                           ((tensors | dict(mask=tensors["mask"][:, 1:]), metadata), "expected 4 embeddings")):
        save_tensors(path, *changed)
        with pytest.raises(ValueError, match=words):
            prompts.Prompts.load(path)


@pytest.fixture
def looked_up(monkeypatch):
    """For each look at the prompts whether a graph is being recorded, whose replay would not look again."""
    CpuRecorder.install(monkeypatch)
    conditions, seen = prompts.Prompts.conditions, []
    monkeypatch.setattr(prompts.Prompts, "conditions", lambda *args: seen.append(CpuRecorder.recording)
                        or conditions(*args))
    return seen


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("size", [8, 128])
def test_a_text_models_trajectory_is_recorded(pixart, tmp_path, monkeypatch, looked_up, size, fused):
    """And replayed for other prompts; at 1024 pixels with micro-conditions. fused: guided in one call, as on a GPU."""
    folder = pixart if size == 8 else save_pixart(tmp_path / "large", sample_size=128, patch_size=16,
                                                       attention_head_dim=12, cross_attention_dim=24)
    net = harmonica_dit.load(str(folder), prompts=TEXTS)
    monkeypatch.setattr(hk.ops, "FUSED", ("cpu",) if fused else ())
    schedule, executor = fora(net, 4, 2), hk.compile(denoise)
    images = []
    for labels in ([0, 1], [1, 2], [2, 0], [0, 0]):
        options = dict(schedule=schedule, latents=True, scheduler="ddim" if fused else None)
        found = sample(net, labels, executor=executor, **options)
        assert torch.equal(found, sample(net, labels, **options))
        images.append(found)
    assert executor.graphs == 1 and looked_up and not any(looked_up)
    assert not torch.equal(images[0], images[3])


def test_a_text_models_training_is_recorded(net, looked_up):
    """As it is without graphs."""
    eager = train_router(net, beta=1e-3, importance_rows="hard", executor="eager", **SMALL)
    assert not CpuRecorder.log
    recorded = train_router(net, beta=1e-3, importance_rows="hard", **SMALL)
    assert CpuRecorder.log and torch.equal(recorded.scores(), eager.scores()) and not any(looked_up)


def test_learning_to_cache_of_a_text_model_is_recorded(net, looked_up):
    images = torch.randn(6, *net.sample_shape, generator=torch.Generator().manual_seed(0))
    router = train_learning_to_cache(net, images, [0, 1, 2, 0, 1, 2], steps=4, iterations=6, batch=2, beta=1e-3,
                                     progress=False)
    assert CpuRecorder.log and router.scores().isfinite().all() and looked_up and not any(looked_up)
