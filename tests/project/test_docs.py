"""The code in docs/ runs, page by page, in the order in which it stands there."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import harmonica_dit
from harmonica_dit import Router, train_router
from support.pipeline_folders import save_pixart

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pixart(tmp_path_factory.mktemp("models") / "small-pixart", sample_size=32)


def run(page: str, names: dict) -> dict:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names


def test_my_diffusers_pipeline(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = harmonica_dit.load(str(folder), prompts=["a red cat"])
    train_router(net, steps=4, beta=1e-3, trajectories=1, batch=1, progress=False).save("router.safetensors")
    names = run("pipelines.md", {"folder": folder})
    assert names["applied"].schedule.steps == 4 and len(names["images"]) == 1
    assert type(names["pipe"]).__mro__[0].__name__ == "PixArtAlphaPipeline" and not hasattr(names["pipe"], "_harmonica")


@pytest.mark.filterwarnings("ignore:target_speedup")  # the small model's few branches cannot meet it to 2 %
def test_train_a_router(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("train.md", {"folder": folder})
    assert Router.load("my-router/router.safetensors", names["net"]).steps == 4
    assert names["pipe"]._harmonica.schedule.cur > 0


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
