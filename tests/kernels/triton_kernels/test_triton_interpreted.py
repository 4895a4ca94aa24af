"""The Triton kernels without a GPU: run in Triton's interpreter, and compiled ahead of time. Each in its own process.

TRITON_INTERPRET has to be set before the kernels are decorated, and under it nothing can be compiled.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
SM = (80, 90, 100)


def test_in_the_interpreter():
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "test_triton.py"],
                            env=os.environ | {"TRITON_INTERPRET": "1"}, text=True, capture_output=True)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr


@pytest.fixture(scope="module")
def compiled_kernels():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-m", "support.compile_for_gpus"], cwd=HERE.parents[1], env=environment,
                            text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_compiles_for_every_gpu(compiled_kernels):
    calls = Counter(entry["arch"] for entry in compiled_kernels)
    assert set(calls) == set(SM) and min(calls.values()) == max(calls.values()) >= 17


def test_no_kernel_spills(compiled_kernels):
    """At D = 1152, forward and backward, on every GPU; but one of training's, and by Triton 3.6 another, by two values
    on sm_100."""
    assert all(entry["registers"] > 0 for entry in compiled_kernels)
    spilling = [entry for entry in compiled_kernels if entry["stack"] > 0]
    assert {entry["call"] for entry in spilling} <= {"blend_residual_norm_backward modulation",
                                                     "blend_residual_norm forecast, float32 x"}
    assert all(entry["stack"] <= 8 and entry["arch"] == 100 for entry in spilling), spilling


def test_the_norms_are_short_and_ask_for_all_before_they_use_any(compiled_kernels):
    """A row of 1152 in bfloat16 on an H100, by its machine code."""
    norm = {entry["call"]: entry for entry in compiled_kernels if entry["arch"] == 90 and "_norm" in entry["call"]}
    assert norm["residual_norm R=0"]["instructions"] <= 560
    assert norm["residual_norm R=1"]["instructions"] <= 800
    for call in ("residual_norm R=0", "residual_norm R=1", "residual_norm R=4"):
        assert norm[call]["early"] == norm[call]["loads"], norm[call]
    assert norm["residual_norm R=28"]["early"] >= 2 * (1 + 2 + 2 * 8), "x, scale, shift, and eight outputs and gates"
    assert all(norm[f"gated_norm history={history}"]["registers"] <= 96 for history in (1, 2))


def test_a_dependent_launch_waits_before_it_touches_memory(compiled_kernels):
    """The kernel before it may still write what it reads, or read what it writes. Other launches do not wait."""
    found = {entry["call"]: entry.get("before_wait") for entry in compiled_kernels if entry["arch"] == 90}
    assert found.pop("residual_norm R=1 dependent") == 0
    assert set(found.values()) == {None}
