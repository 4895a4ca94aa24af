"""bench/roofline.py: what is counted where, and the page that it writes."""

import json
import sys

import pytest
import torch

from bench import roofline
from harmonica_kernels import ops


@pytest.mark.parametrize("op, kind", [
    ("aten::addmm", "products"), ("aten::mm", "products"), ("aten::_scaled_dot_product_attention", "attention"),
    ("harmonica::residual_norm", "fused norms"), ("harmonica::bias_gelu", "GELU"), ("aten::gelu", "GELU"),
    ("aten::copy_", "copies"), ("aten::commit_copy_", "the rest"), ("aten::as_strided", "the rest")])
def test_kinds(op, kind):
    assert roofline.kind_of(op) == kind


def test_a_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(roofline.MODELS, "small", ("fashion-dit", 2, None))
    monkeypatch.setattr(roofline, "ROTATE", 1)
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["roofline", "--only", "small", "--rounds", "1", "--out", str(out)])
    roofline.main()
    found = json.loads(out.read_text())
    (row,) = found["rows"]
    assert sum(row["shares"].values()) == pytest.approx(1) and all(share > 0 for share in row["shares"].values())
    assert row["shares"]["products"] > row["shares"]["GELU"] and found["copy_gb_s"] > 0 and row["norms_gb_s"] > 0
    assert f"| small | {row['ms']:.1f} |" in capsys.readouterr().out


def test_before_there_was_a_kernel():
    forward = roofline.Forward("fashion-dit", 2, None, torch.float32)
    with torch.inference_mode():
        expected, op = forward.run(), ops.bias_gelu
        with roofline.pytorchs_gelu():
            found = forward.run()
            assert forward.seconds_by_kind()["GELU"] > 0
    assert ops.bias_gelu is op and not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
