"""The code in docs/ runs, page by page, in the order in which it stands there."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

import harmonica_dit
from harmonica_dit import Router, train_router
from support.generic_models import make
from support.many_pipes import PIPES
from support.pipeline_folders import save_flux, save_pixart

DOCS = Path(__file__).parents[2] / "docs"
PIXART, FLUX = "PixArt-alpha/PixArt-XL-2-512x512", "black-forest-labs/FLUX.1-dev"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with small random models where the pages' names lead to: diffusers looks for a folder first."""
    folder = tmp_path_factory.mktemp("models")
    save_pixart(folder / PIXART, sample_size=32)
    save_flux(folder / FLUX)
    return folder


@pytest.fixture
def at_work(models, tmp_path, monkeypatch):
    """In a folder of its own, from which the models' names lead to the small ones."""
    for name in (PIXART, FLUX):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(models / name)
    monkeypatch.chdir(tmp_path)


def test_files_that_pages_name_are_there():
    """A figure's file most of all: written beside the page and not committed, it is missing in a clone."""
    root = DOCS.parent
    pages = [root / "README.md", root / "bench/results/README.md", *DOCS.glob("*.md")]
    folders, kinds = "bench|tests|docs|csrc|examples|harmonica_kernels|python", "json|py|md|png|sh|cpp|cu|h"
    named = {(page.name, path) for page in pages
             for path in re.findall(rf"\b(?:{folders})/[\w./-]*\.(?:{kinds})\b", page.read_text())}
    assert len(named) > 50 and not [name for name in named if not (root / name[1]).exists()]


def blocks_of(page: str, kind: str = "python") -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", (DOCS / page).read_text(), re.S | re.M)


def run(page: str, names: dict) -> dict:
    blocks = blocks_of(page)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names


@pytest.mark.filterwarnings("ignore:schedule. made for 4 steps with CUR")  # of few branches
def test_my_diffusers_pipeline(at_work, capsys):
    """Also what the first block prints is what stands there."""
    net = harmonica_dit.load(PIXART, prompts=["a red cat"])
    train_router(net, steps=4, beta=1e-3, trajectories=1, batch=1, progress=False).save("router.safetensors")
    transformer, arguments = make("SD3Transformer2DModel")
    latents = arguments.pop("hidden_states")
    arguments.pop("timestep")
    names = run("pipelines.md", dict(
        transformer=transformer, latents=latents, prompt=arguments, scheduler=FlowMatchEulerDiscreteScheduler(),
        empty_prompt={name: torch.zeros_like(value) for name, value in arguments.items()}))
    (printed,) = blocks_of("pipelines.md", "text")
    assert capsys.readouterr().out.startswith(printed)
    assert names["image"].size == (1024, 1024) and len(names["images"]) == 1
    assert names["latents"].isfinite().all() and not torch.equal(names["latents"], latents)
    for target in (names["pipe"], names["transformer"]):
        assert "_harmonica" not in vars(target)


def test_compare(at_work, capsys):
    rows = run("compare.md", {})["methods"]
    printed = capsys.readouterr().out.splitlines()
    assert [line.rsplit(" ", 2)[0] for line in printed] == ["uncached", *(method.name for method in rows)]
    assert Path("samples").is_dir()


@pytest.mark.filterwarnings("ignore:schedule. made")
def test_scale(at_work, capsys):
    names = run("scale.md", {})
    assert capsys.readouterr().out.split()[-1] == f"{names['router'].schedule().speedup}"
    assert Path("my-router/router.safetensors").exists()


def test_the_pipelines_that_the_tests_run_are_named():
    part = (DOCS / "pipelines.md").read_text().split("## What is not known")[1]
    assert set(re.findall(r"`(\w+Pipeline)`", part)) == {type(entry.pipe()).__name__ for entry in PIPES.values()}


@pytest.mark.filterwarnings("ignore:target_speedup")  # the small model's few branches cannot meet it to 2 %
def test_train_a_router(at_work):
    names = run("train.md", {})
    assert Router.load("my-router/router.safetensors", names["net"]).steps == 4
    assert names["pipe"]._harmonica.config.loaded.cur > 0


class Cross(nn.Linear):
    def forward(self, h, text):
        return super().forward(h) * text.mean()


class Model(nn.Module):
    """What docs/own-model.md supposes: three branches a block, cross-attention without norm and gate."""

    def __init__(self, width=8, depth=2):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(
            attention=nn.Linear(width, width), cross=Cross(width, width), mlp=nn.Linear(width, width)))
            for _ in range(depth))
        for block in self.blocks:
            block.attention, block.cross, block.mlp = block["attention"], block["cross"], block["mlp"]
        self.rows, self.embed, self.head = nn.Linear(4, width), nn.Linear(2, width), nn.Linear(width, 2)

    def modulation(self, condition):
        row, depth = self.rows(condition), len(self.blocks)
        return [row, None, row] * depth + [row], [row, None, row] * depth + [row], [row, None, row] * depth


def test_my_own_model():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 2)
    names = run("own-model.md", dict(model=Model(), x=x, condition=torch.randn(2, 4), text=torch.randn(3)))
    assert names["x"].shape == x.shape and not torch.equal(names["x"], x)
    assert names["scores"].grad.abs().sum() > 0
