"""The benchmarks, which run from the repository's root: `python -m pytest bench/` collects the suites (bench_*.py),
`make bench` runs the one that sets everything beside its peers, `python -m bench.forecasts` measures quality against
speedup, `bench/gpu.sh` runs what needs a GPU.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
sys.path.append(str(ROOT / "tests"))  # the tests' reference model, support.plain_dit, is measured beside ours
