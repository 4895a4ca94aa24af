"""bench/gpu/traffic.py: what an op moves, and the tables of docs/gpu.md beside the file that was measured."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench import ROOT
from bench.gpu import models, traffic
from harmonica_kernels import ops

LARGE = 200  # so many rows of 64 values are not computed


@pytest.mark.parametrize("rows", [4, LARGE])
@pytest.mark.parametrize("call, passes", [
    (lambda x, y: x + y, 3), (lambda x, y: x.add_(y), 3), (lambda x, y: x.copy_(y), 2), (lambda x, y: x.zero_(), 1),
    (lambda x, y: x.t(), 0), (lambda x, y: x + y[:, :1].expand(-1, 64), 2 + 1 / 64),
    (lambda x, y: ops.residual_norm(x[None], [ops.Term(y[None], None, None)], None, None), 3),
    (lambda x, y: ops.residual_norm(z := x[None], [ops.Term(y[None], None, None)], None, None, x_out=z), 4)])
def test_what_an_op_moves(monkeypatch, rows, call, passes):
    """Alike where it is computed and where it is not."""
    monkeypatch.setattr(ops, "FUSED", ("cpu",))
    x, y = torch.ones(2, rows, 64)
    with torch.inference_mode(), traffic.Bytes([]) as counted:
        call(x, y)
    assert counted.moved["activations"] == passes * 4 * rows * 64 and not counted.moved["weights"]
    if rows == LARGE:
        assert torch.equal(x, torch.ones_like(x)), "nothing large is computed"


def test_weights_are_told_from_the_rest():
    linear, x = nn.Linear(64, 128), torch.ones(LARGE, 64)
    with torch.inference_mode(), traffic.Bytes(linear.parameters()) as counted:
        F.linear(x, linear.weight, linear.bias)
    assert counted.moved == dict(weights=4 * 128 * 65, activations=4 * LARGE * (64 + 128))


def test_a_step_of_a_small_model():
    """Its blocks' weights at every step; what depends on the step alone once a trajectory; less with a schedule."""
    net = models.model(True, torch.device("cpu"), "sdpa")
    found = traffic.count(net, models.TINY, 1, 4)
    body = sum(2 * p.numel() for name, p in net.named_parameters() if re.search(r"\.(attn|mlp)\.", name))
    modulation = sum(2 * p.numel() for name, p in net.named_parameters() if "adaLN" in name)
    assert body + modulation / 4 < found["ours"]["weights"] < found["plain, in a graph"]["weights"] - 0.7 * modulation
    assert found["plain, in a graph"]["activations"] > found["ours"]["activations"] > found["LTC"]["activations"]
    x = found["gated"]["activations"] - found["37.5 % CUR"]["activations"]
    assert x == 2 * 4 * 24 * 2, "2 rows of 4 tokens in bfloat16"


def test_the_tables_of_the_page():
    """Times and ratios are the file's; a computed step's bytes what its shapes add up to, but for a few per cent."""
    parts = json.loads(traffic.FILE.read_text())["parts"]
    page = (ROOT / "docs/gpu.md").read_text()
    assert "python -m bench.gpu.traffic" in page
    for rows in (2, 16):
        [lines] = re.findall(rf"^\| {rows} rows: a step \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.M)
        cells = {name: [float(cell) for cell in rest] for name, *rest in (
            line.strip("| ").split(" | ") for line in lines.splitlines())}
        found = {way: dict(weights=1e6 * cells[name][0], activations=1e6 * cells[name][1])
                 for way, name in traffic.WAYS.items()}
        again = [[float(cell) for cell in line.strip("| ").split(" | ")[1:]]
                 for line in traffic.table(parts, rows, found, 20)[2:]]
        for one, other in zip(cells.values(), again, strict=True):
            assert one == pytest.approx(other, abs=1.01) and one[-1] == pytest.approx(other[-1], abs=0.011)
        D, value = 1152, 2 * 256 * rows * 1152
        weights, rest = cells["captured, all computed"][:2]
        assert 1e6 * weights == pytest.approx(28 * 2 * 12 * D * D, rel=0.04)
        passes = 2 * 4 + (1 + 3) + (3 + 1) + (1 + 1) + (1 + 4) + (4 + 1)  # norms, qkv, attention, proj, fc1, fc2
        assert 1e6 * rest == pytest.approx(28 * passes * value, rel=0.04)
