"""The norm that finds its run on the device, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_on_random_states_of_what_decides():
    tests = Path(__file__).parents[3]
    result = subprocess.run([sys.executable, "-m", "support.gated_norm_check", "12"], cwd=tests, text=True,
                            env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True)
    assert result.returncode == 0, result.stderr[-3000:]
