"""Prompts of a pipeline's own loop: encoded once, by themselves, put together as the pipeline would, kept in a file."""

import shutil

import pytest
import torch
from diffusers import FluxPipeline

import harmonica_dit
from harmonica_dit.pipelines.conditions import Conditions, Encoder, join
from harmonica_dit.sample import sample
from harmonica_dit.sample.trajectory import image_noise
from support.pipeline_folders import save_flux

TEXTS = ("a cat", "two dogs in a park", "sky")
CALL = dict(max_sequence_length=24, guidance_scale=2.0)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return save_flux(tmp_path_factory.mktemp("models") / "small-flux")


def encoded(length: int, mask: bool, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(1, length, 3, generator=draw), torch.ones(1, length, dtype=torch.long) if mask else None,
            torch.zeros(4, 2), [torch.randn(length, 3, generator=draw)], 7)


def test_what_belongs_to_images_is_joined_and_the_rest_is_the_same_for_all():
    parts = [encoded(3, True), encoded(5, True, seed=1)]
    embeddings, mask, positions, lists, number = join(parts)
    assert embeddings.shape == (2, 5, 3) and mask.tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert torch.equal(embeddings[0, :3], parts[0][0][0]) and not embeddings[0, 3:].any()
    assert torch.equal(positions, torch.zeros(4, 2)) and number == 7
    assert [len(one) for one in lists] == [3, 5]
    assert join([encoded(3, False), encoded(5, False)]) is None  # nothing would say where the shorter one ends
    with pytest.raises(ValueError, match="got 7 for one and something else for another"):
        join([(7,), (8,)])


def test_a_text_is_encoded_once_and_for_a_batch_only_where_it_must_be():
    calls = []

    def encode(prompt, negative_prompt=None, device="cpu"):
        calls.append(prompt)
        lengths = [len(text) for text in prompt]
        rows = [torch.cat([torch.full((n, 2), float(n)), torch.zeros(max(lengths) - n, 2)]) for n in lengths]
        return torch.stack(rows), None

    encoder = Encoder(encode)
    for _ in range(2):
        found, _ = encoder(prompt=["ab", "cd"], negative_prompt=["", ""])
        assert found.shape == (2, 2, 2)
        found, _ = encoder(["cd"], ["x"])
        assert torch.equal(found, torch.full((1, 2, 2), 2.0)) and encoder.by_text
    assert calls == [["ab"], ["cd"], ["cd"]]  # another negative prompt is another encoding
    for _ in range(2):
        found, _ = encoder(["ab", "cde"])
        assert found.shape == (2, 3, 2) and not encoder.by_text
    assert calls[3:] == [["ab"], ["cde"], ["ab", "cde"]]
    encoder.release()
    assert torch.equal(encoder(["cd"], ["x"])[0], torch.full((1, 2, 2), 2.0))
    with pytest.raises(ValueError, match="prompts: were encoded for a call with other arguments"):
        encoder(["ab"], device="meta")


def test_a_file_of_encoded_prompts(tmp_path):
    encoder, path = Encoder(lambda prompt: encoded(len(prompt[0]), True)), tmp_path / "prompts.safetensors"
    expected = encoder(["ab", "cde"])
    encoder.save(path, dict(model="some"))
    other = Encoder(encoder.encode)
    other.load(path, dict(model="some"))
    assert other.released
    torch.testing.assert_close(other(["ab", "cde"]), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="encoded with model='some', expected 'another'"):
        other.load(path, dict(model="another"))
    Conditions(["a"])
    torch.save({}, tmp_path / "none")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        other.load(tmp_path / "none", {})


def test_prompts_that_are_refused():
    row = torch.zeros(1, 3, 2)
    for prompts, words in (("a cat", "got 'a cat', expected a list"), ([], "expected a list"),
                           (None, "expected a list"), (["a", " "], "number 1 is"), ([{}], "number 0 is"),
                           ([5], "number 0 is 5"),
                           (["a", dict(prompt_embeds=row)], "by different arguments"),
                           ([dict(prompt_embeds=row), dict(prompt_embeds=row[:, :2])], "of different lengths")):
        with pytest.raises(ValueError, match=f"prompts: .*{words}"):
            Conditions(prompts)
    assert Conditions(["a", dict(prompt="b")]).texts == ("a", "b")
    one, other = (Conditions([dict(prompt_embeds=row + i)]).checksum for i in range(2))
    assert one != other


def test_a_pipelines_texts_are_encoded_once_and_the_encoders_let_go(flux, tmp_path):
    """The latents are those of the pipeline's own call; from the file they come without text encoders."""
    path = tmp_path / "prompts.safetensors"
    net = harmonica_dit.load(str(flux), prompts=TEXTS, call=CALL, image_size=64, embeddings=path)
    assert (net.name, net.guidance, net.num_classes) == ("small-flux", 2.0, 3)
    assert net._loop.pipe.text_encoder is None and net._loop.pipe.text_encoder_2 is None
    with pytest.raises(ValueError, match="prompts: were encoded for a call with other arguments"):
        net._loop.pipe.encode_prompt(["another"])
    pipe = FluxPipeline.from_pretrained(flux)
    pipe.set_progress_bar_config(disable=True)
    noise = image_noise(0, 0, 2, net.sample_shape)
    options = dict(height=64, width=64, num_inference_steps=2, latents=noise) | CALL
    expected = pipe([TEXTS[2], TEXTS[0]], output_type="latent", **options).images
    assert torch.equal(sample(net, [2, 0], steps=2, latents=True), expected)
    images = pipe([TEXTS[2], TEXTS[0]], output_type="pt", **options).images
    assert torch.equal(sample(net, [2, 0], steps=2), 2 * images - 1)
    copied = tmp_path / flux.name
    shutil.copytree(flux, copied)
    shutil.rmtree(copied / "text_encoder_2")
    again = harmonica_dit.load(str(copied), prompts=TEXTS, call=CALL, image_size=64, embeddings=path)
    assert torch.equal(sample(again, [2, 0], steps=2, latents=True), expected)
    with pytest.raises(ValueError, match="encoded with prompts="):
        harmonica_dit.load(str(copied), prompts=TEXTS[:2], call=CALL, image_size=64, embeddings=path)
    from_memory = harmonica_dit.load(pipe, prompts=TEXTS, call=CALL, image_size=64)
    assert torch.equal(sample(from_memory, [2, 0], steps=2, latents=True), expected)
    assert from_memory.name == "small-flux" and pipe.text_encoder is not None


def test_a_negative_prompt_for_all(flux):
    net = harmonica_dit.load(str(flux), prompts=TEXTS, image_size=64, call=CALL | dict(
        negative_prompt="fog", true_cfg_scale=3.0))
    pipe = FluxPipeline.from_pretrained(flux)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(list(TEXTS[:2]), negative_prompt=["fog"] * 2, true_cfg_scale=3.0, height=64, width=64,
                    num_inference_steps=2, latents=image_noise(0, 0, 2, net.sample_shape), output_type="latent",
                    **CALL).images
    assert torch.equal(sample(net, [0, 1], steps=2, latents=True), expected)
