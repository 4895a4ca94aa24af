"""The parts of bench/gpu.sh: what only a GPU can show. Each is a module with `run(record)`; see `__main__`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tests"))  # the tests' reference model, plain_dit, is used here too
