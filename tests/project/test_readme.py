"""The README's code runs."""

import re
from pathlib import Path

import torch
from torch import nn

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_cached_forward_in_ten_lines():
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "hk.Branch" in block)

    class Block:
        attn, mlp = nn.Linear(8, 8), nn.Linear(8, 8)

    rows = lambda n: [torch.randn(2, 8) for _ in range(n)]
    names = dict(blocks=[Block(), Block()], x=torch.randn(2, 3, 8), shift=rows(5), scale=rows(5), gate=rows(4))
    exec(code, names)
    assert names["y"].shape == (2, 3, 8) and names["cache"].nbytes == 4 * 2 * 3 * 8 * 4


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"^[A-Z_]+$", README, re.M) and "_MINUTES" not in README
