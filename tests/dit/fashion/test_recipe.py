"""The bundled model's training recipe, on a few images of noise."""

import gzip
import json
import struct

import pytest
import torch

from harmonica_dit.fashion.recipe import train
from harmonica_dit.files import load_tensors
from harmonica_dit.models.dit import DiT

SMALL = dict(steps=6, batch=4, save_every=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty images in the data set's format."""
    folder, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    for kind, sizes in (("images-idx3", (20, 28, 28)), ("labels-idx1", (20,))):
        values = torch.randint(10, sizes, dtype=torch.uint8, generator=generator)
        header = b"\0\0\x08" + bytes([len(sizes)]) + struct.pack(f">{len(sizes)}i", *sizes)
        (folder / f"train-{kind}-ubyte.gz").write_bytes(gzip.compress(header + values.numpy().tobytes()))
    return folder


def new():
    return DiT(input_size=28, patch_size=7, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=10,
               learn_sigma=False)


def test_an_interrupted_recipe_ends_with_the_same_bits_and_keeps_what_is_there(folder, tmp_path):
    train(new(), folder, tmp_path / "whole.safetensors", **SMALL)
    out = tmp_path / "net.safetensors"
    out.write_text("of before")
    net, calls = new(), iter(range(3))

    def interrupt(*_):
        if next(calls, None) is None:
            raise KeyboardInterrupt

    net.register_forward_pre_hook(interrupt)
    with pytest.raises(SystemExit, match="stopped after 3 of 6 steps.* from step 2"):
        train(net, folder, out, **SMALL)
    assert out.read_text() == "of before"
    with pytest.raises(SystemExit, match="of a training of 6 steps, this one has 8"):
        train(new(), folder, out, **SMALL | dict(steps=8))
    train(new(), folder, out, **SMALL)
    found, expected = (load_tensors(path)[0] for path in (out, tmp_path / "whole.safetensors"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert json.loads(out.with_suffix(".json").read_text())["steps"] == 6
    assert not out.with_suffix(".checkpoint").exists()
