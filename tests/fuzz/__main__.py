"""Campaigns of hostile input: `make fuzz`, see docs/reliability.md.

    PYTHONPATH=tests python -m fuzz router csv --executions 100000 --seed 1

Each target runs in a process of its own. The figures are put into bench/results/fuzz.json, one entry a target; the
first input of every fault is kept in build/fuzz/TARGET/faults.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
RESULTS, BUILD = ROOT / "bench" / "results" / "fuzz.json", ROOT / "build" / "fuzz"
FILES = ("router", "schedule", "forecast", "prompts", "encoded", "samples", "training", "reference", "weights",
         "published", "costs", "texts", "csv")
ARGUMENTS = ("forward", "ops", "command")


def run_here(name: str, executions: int, seed: int, out: Path) -> None:
    """In the process of one target."""
    if name in FILES:
        import atheris

        with atheris.instrument_imports(include=["harmonica_dit"]):
            from .files import CORPUS, TARGETS
        from .campaign import fuzz_files

        target = TARGETS[name]
        fuzz_files(target, target.change, target.file, CORPUS / name, BUILD / name, out, executions, seed)
    else:
        from .arguments import TARGETS
        from .campaign import fuzz_arguments

        fuzz_arguments(*TARGETS[name], BUILD / name, out, executions, seed)


def run(name: str, executions: int, seed: int) -> dict:
    """Runs one target in a new process, and gives its figures."""
    with tempfile.TemporaryDirectory() as folder:
        out, begun = Path(folder) / "result.json", time.monotonic()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "python"), str(ROOT / "tests")]), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([sys.executable, "-m", "fuzz", name, "--executions", str(executions), "--seed", str(seed),
                               "--out", out], cwd=ROOT, env=environment)
        if not out.exists():
            what = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
            found = dict(executions=0, past_first_check=0, accepted=0, errors={}, memory_mb=0, memory_grown_mb=0,
                         faults=[f"crash or hang: {what}"])
        else:
            found = json.loads(out.read_text())
        return found | dict(seed=seed, seconds=round(time.monotonic() - begun))


def read() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def commit() -> str:
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, text=True, capture_output=True).stdout.strip()
    changed = git("status", "--porcelain", "--", "harmonica_kernels", "python", "csrc", "tests/fuzz")
    return git("rev-parse", "--short", "HEAD") + (" and changes" if changed else "")


def table(results: dict) -> str:
    """The figures as the table of docs/reliability.md."""
    columns = ("target", "executions", "past the first check", "accepted", "kinds of refusal", "faults",
               "memory, its growth")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in (*FILES, *ARGUMENTS):
        if name in results:
            one = results[name]
            lines.append(f"| {name} | {one['executions']:,} | {one['past_first_check']:.0%} | {one['accepted']:.0%} | "
                         f"{len(one['errors'])} | {len(one['faults'])} | {one['memory_mb']} MB, "
                         f"{one['memory_grown_mb']} MB |")
    lines.append(f"| all | {sum(one['executions'] for one in results.values()):,} | | | | "
                 f"{sum(len(one['faults']) for one in results.values())} | |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help=f"{', '.join((*FILES, *ARGUMENTS))}; all of them by default")
    parser.add_argument("--executions", type=int, default=70_000, help="of each target (70,000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print the figures that are there")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.out:
        run_here(given.targets[0], given.executions, given.seed, given.out)
        return 0
    BUILD.mkdir(parents=True, exist_ok=True)
    for name in () if given.table else given.targets or (*FILES, *ARGUMENTS):
        found = run(name, given.executions, given.seed)
        versions = {package: version(package) for package in ("torch", "safetensors", "hypothesis", "atheris")}
        found |= dict(commit=commit(), date=str(date.today()), python=platform.python_version(), **versions)
        with FileLock(BUILD / "lock"):  # other campaigns may be running
            RESULTS.write_text(json.dumps(read() | {name: found}, indent=1) + "\n")
        print(f"{name}: {found['executions']:,} executions, {len(found['faults'])} faults", flush=True)
    print(table(read()))
    return int(any(one["faults"] for one in read().values()))


if __name__ == "__main__":
    sys.exit(main())
