"""Inception and CLIP from local files, with random weights: what they are given and what is taken from them."""

import pickle
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchmetrics.multimodal import CLIPScore
from transformers import CLIPConfig, CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from harmonica_dit.evaluate import Inception, Judge, load_clip
from harmonica_dit.evaluate.extractors import as_bytes, extractor_checksum
from support.linear_extractor import Linear
from support.pipeline_folders import clip as small_text_model


class Run:
    """Pickled, it makes a file where it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class SmallInception(nn.Module):
    """Stands in for torch-fidelity's, which needs torchvision: one convolution, the same outputs."""

    def __init__(self, name, features_list, feature_extractor_weights_path):
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = nn.Conv2d(3, 192, 1)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, images):
        assert images.dtype == torch.uint8
        seen = self.Mixed_6d.branch1x1(images.float()).flatten(2)
        return seen.mean(2), seen.amax(2)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace(FeatureExtractorInceptionV3=SmallInception))
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 192, 1)
    torch.save({f"Mixed_6d.branch1x1.{name}": value for name, value in layer.state_dict().items()},
               tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_inception_is_given_bytes_and_its_map_is_cut_to_seven_channels(weights):
    inception = Inception(weights)
    images = torch.rand(2, 1, 17, 17) * 2 - 1
    features, spatial, logits = inception.extract(images)
    seen = inception.net.Mixed_6d.branch1x1(((images + 1) * 127.5).round().expand(2, 3, 17, 17))
    torch.testing.assert_close(features, seen.mean((2, 3)))
    torch.testing.assert_close(logits, seen.amax((2, 3)))
    assert spatial.shape == (2, inception.num_spatial) and torch.equal(spatial, seen[:, :7].flatten(1))
    assert inception.num_labels is None


def test_inception_weights_are_tensors_in_a_local_file(weights, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="weights: no file at"):
        Inception(tmp_path / "missing.pth")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Run(tmp_path / "made"), protocol=2))
    with pytest.raises(ValueError, match="evil.pth does not hold Inception's tensors"):
        Inception(tmp_path / "evil.pth")
    assert not (tmp_path / "made").exists()
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth does not hold Inception's tensors"):
        Inception(tmp_path / "other.pth")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ModuleNotFoundError, match=r"harmonica-kernels\[inception\]"):
        Inception(weights)


def test_torch_fidelity_gives_what_torchmetrics_takes_for_the_distance(tmp_path):
    """Where torch-fidelity can be imported: it needs a torchvision that fits torch."""
    fidelity = pytest.importorskip("torch_fidelity", exc_type=Exception)
    from torchmetrics.image.fid import NoTrainInceptionV3

    from_graph = fidelity.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(from_graph, "load_state_dict", lambda self, _: None)
        torch.save({}, tmp_path / "none.pth")
        torch.manual_seed(0)
        net = from_graph("inception-v3-compat", ["2048"], str(tmp_path / "none.pth"))
    torch.save(net.state_dict(), tmp_path / "random.pth")
    inception, images = Inception(tmp_path / "random.pth"), torch.rand(1, 3, 64, 64) * 2 - 1
    features, spatial, logits = inception.extract(images)
    usual = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(tmp_path / "random.pth"), antialias=False)
    assert torch.equal(features, usual(as_bytes(images)))
    assert spatial.shape == (1, 2023) and logits.shape == (1, 1008)


def test_images_become_bytes():
    images = torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.5]).view(5, 1, 1, 1)
    assert as_bytes(images).shape == (5, 3, 1, 1) and as_bytes(images)[:, 2].flatten().tolist() == [0, 0, 128, 255, 255]
    with pytest.raises(ValueError, match="images: got 4 channels, expected 1 or 3"):
        as_bytes(torch.zeros(1, 4, 2, 2))


def test_a_checksum_tells_weights_and_classes_apart():
    class Other(Linear):
        pass

    assert extractor_checksum(Linear()) == extractor_checksum(Linear())
    assert len({extractor_checksum(each) for each in (Linear(), Linear(seed=1), Other())}) == 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small CLIP as transformers saves it."""
    folder, (tokenizer, text) = tmp_path_factory.mktemp("clip"), small_text_model(12)
    torch.manual_seed(0)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16,
                  patch_size=8)
    config = CLIPConfig(text_config=text.config.to_dict(), vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    sizes = dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(CLIPImageProcessorPil(**sizes), tokenizer).save_pretrained(folder)
    return folder


def test_clip_score_is_a_hundred_times_the_mean_cosine(folder):
    """Hessel et al., 2021 (arXiv 2104.08718), section 3, in torchmetrics' scale; of a model in a local folder."""
    clip, prompts = load_clip(folder), ["a dog", "the cat sat", "owl"]
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    judge = Judge(clip=clip)
    judge.update(images[:2], prompts=prompts[:2])
    judge.update(images[2:], prompts=prompts[2:])

    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    given = processor(text=prompts, images=list(as_bytes(images)), return_tensors="pt", padding=True)
    with torch.inference_mode():
        found = model(**given)
    cosines = (found.image_embeds * found.text_embeds).sum(1)
    assert judge.result()["clip_score"] == pytest.approx(max(100 * cosines.mean().item(), 0), abs=1e-3)
    assert abs(cosines).min() > 1e-3 and isinstance(judge.clip, CLIPScore)


def test_clip_needs_a_folder_with_safetensors_and_one_prompt_an_image(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="folder: no CLIP at"):
        load_clip("openai/clip-vit-base-patch32")  # a name would be downloaded
    shutil.copytree(folder, tmp_path / "clip")
    torch.save(CLIPModel.from_pretrained(folder).state_dict(), tmp_path / "clip" / "pytorch_model.bin")
    (tmp_path / "clip" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        load_clip(tmp_path / "clip")
    judge = Judge(clip=load_clip(folder))
    for prompts in (None, "one", ["one"]):
        with pytest.raises(ValueError, match="prompts"):
            judge.update(torch.zeros(2, 3, 16, 16), prompts=prompts)
    assert judge.count == 0
