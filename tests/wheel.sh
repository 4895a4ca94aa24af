#!/usr/bin/env bash
# Builds the wheel, installs it with the extra `dit` in a clean virtual environment on a PATH without a compiler, and
# runs there, in an empty folder, what the README types: its commands, and its Python but for the trainings.
#     bash tests/wheel.sh [PYTHON]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${1:-python3}"
work="$(mktemp -d)"
trap "$(command -v rm) -rf '$work'" EXIT
export PIP_CONSTRAINT="$root/constraints.txt" PIP_BUILD_CONSTRAINT="$root/constraints.txt"

git -C "$root" archive HEAD | tar -x -C "$work" --one-top-level=source
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work/dist" "$work/source" -v >"$work/build.log" 2>&1 \
    || { tail -20 "$work/build.log"; exit 1; }
if grep -q 'absent from the `packages`' "$work/build.log"; then
    echo 'the build warns of folders that are absent from `packages`' && exit 1
fi
"$python" -m venv "$work/venv"
mkdir "$work/bin" "$work/home"
for tool in bash cat env ls uname; do ln -s "$(command -v $tool)" "$work/bin/"; done
export PATH="$work/venv/bin:$work/bin"
if command -v cc c++ gcc g++ clang; then echo 'a compiler is on the PATH' && exit 1; fi
pip install --quiet "$(echo "$work"/dist/*.whl)[dit]"
cd "$work/home"

set -x
harmonica --version
harmonica --help
python -m harmonica_kernels
harmonica sample --labels dress,bag --steps 4 --out images.png
harmonica schedule --method fora --every 2 --forecast 1 --out fora.safetensors
harmonica show fora.safetensors
harmonica compare --schedule fora.safetensors --method adams --speedup 2.7 --samples 10 --out compared
python - "$root/README.md" <<'PYTHON'
import re, sys, warnings
import harmonica_dit
warnings.simplefilter("error", UserWarning)
(block, *_) = [b for b in re.findall(r"```python\n(.*?)```", open(sys.argv[1]).read(), re.S) if "fashion-dit" in b]
code = re.sub(r"harmonica_dit\.train_forecaster\(.*?\)", 'harmonica_dit.Schedule.load("fashion-dit-forecast-2.8x")', block)
exec(code, names := {})
assert names["images"].shape == (3, 1, 28, 28)
PYTHON
