"""The norm that finds its run on the device, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_on_random_states_of_the_gate():
    script = Path(__file__).with_name("check_norm.py")
    result = subprocess.run([sys.executable, script, "40"], env=os.environ | {"TRITON_INTERPRET": "1"}, text=True,
                            capture_output=True)
    assert result.returncode == 0, result.stderr[-3000:]
