#!/usr/bin/env bash
# What only a GPU can show, in one command: builds, tests and times everything, in about 20 minutes on an H100.
#
#   bench/gpu.sh [--tiny] [PART ...]        all parts, or those named, in the order below
#   bench/gpu.sh a | k | b2 | b16 | c       the same for calls that are short: a is build, attention, trajectory and gated,
#                                           in 300 s; k build, kernels and gemm, in 180 s; b2 and b16 build, attention and
#                                           a compiled part, in 400 s; c build, attention, tests, sdt, pixart and
#                                           sanitizer, in 540 s
#   bench/gpu.sh --wheels                   what is missing on this machine, and the command that fetches its wheels
#
# A part is a process of its own with its own time-out, and writes its results as it goes: one that fails or hangs
# leaves what it had, and the others theirs. After each part all results are merged into bench/results/<gpu>.json with
# plots; a part that was not asked for keeps its last run's. --tiny is a dry run on the CPU, with
# tiny sizes and a CPU's clock: it shows that the benchmarks run, measures nothing, and writes to build/gpu-tiny alone.
#
# Runs from the source tree; nothing is resolved or downloaded. Needed: Python ≥ 3.10, torch ≥ 2.11 with CUDA, triton, what
# harmonica_dit needs, pybind11, cmake, ninja, a C++ compiler, pytest, hypothesis, transformers; --wheels names what is
# missing. Of use where they are: nvcc, compute-sanitizer, xformers, torchao, pytest-xdist. The part build can be left out
# where an extension that was built for the same Python came with the tree. Environment:
#   PYTHON               the interpreter (python3)
#   HARMONICA_WHEELS     a folder of wheels that are missing there, installed into build/ first (.whl, if it exists)
#   HARMONICA_COMMIT     the commit, where the tree came without .git
#   OUT                  a folder that receives copies: <gpu>.json, plots, gpu.log
#   HARMONICA_BENCH_SECONDS   all parts together end by then (1500, or what a, k, b2, b16 and c have)
#
#   part         limit, s   taken on an H100, s; (in brackets) an estimate, where it was not run to its end
parts="
    build            200   # (60): C++ for three instruction sets, nvcc for three architectures; or again without nvcc
    attention         25   # (12): 9 with shorter samples; before the parts that use the fastest back end
    trajectory       150   # 113
    gated            140   # 86
    kernels           70   # 25
    gemm              50   # (28): a graph for each candidate of each product, and four again
    tests            220   # (150): pytest -m gpu, most of it Triton compiling
    sdt               90   # 63: at 64 rows, and at 32 where the published loop does not fit
    pixart           200   # (130): quantized weights, which need torchao, PixArt-α 1024 (50) and Σ 2K
    sanitizer         90   # (60): memcheck and racecheck side by side
    compiled2        300   # (200): max-autotune of 28 unrolled blocks; had not ended after 100
    compiled16       300   # (200)
"
# What everything else needs and what matters most stands first. No part outlasts HARMONICA_BENCH_SECONDS, counted from the
# start: the last ones get what is left, and can be run by themselves, `bench/gpu.sh build sanitizer`.

set -u
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
python="${PYTHON:-python3}"
tiny=""
if [ "${1:-}" = --tiny ]; then tiny=--tiny; shift; fi
known=$(echo "$parts" | sed 's/#.*//' | awk 'NF { print $1 }')
seconds_of_all=1500
case "${1:-}" in
    a) set -- build attention trajectory gated; seconds_of_all=300 ;;
    k) set -- build kernels gemm; seconds_of_all=180 ;;
    b2) set -- build attention compiled2; seconds_of_all=400 ;;
    b16) set -- build attention compiled16; seconds_of_all=400 ;;
    c) set -- build attention tests sdt pixart sanitizer; seconds_of_all=540 ;;
    --wheels) exec "$python" -m bench.gpu.needs ;;
esac
for part in "$@"; do
    echo "$known" | grep -qx -- "$part" || { echo "gpu.sh: no part $part; there are:" $known >&2; exit 2; }
done

work="build/gpu${tiny:+-tiny}"
mkdir -p "$work" ${OUT:+"$OUT"}
log="${OUT:-$work}/gpu.log"
: > "$log"
export CUDA_LOG_FILE=stderr  # why a graph is refused, in words
export HARMONICA_TEST_SEED="${HARMONICA_TEST_SEED:-$RANDOM}"
deadline=$((SECONDS + ${HARMONICA_BENCH_SECONDS:-$seconds_of_all} - 20))  # 20 s for the last part's end and the last merge

wheels="${HARMONICA_WHEELS:-.whl}"
if [ -z "$tiny" ] && [ -d "$wheels" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target build/gpu-site "$wheels"/*.whl 2>&1 | tee -a "$log"
fi
if [ -d build/gpu-site ]; then export PYTHONPATH="$PYTHONPATH:$PWD/build/gpu-site"; fi
if [ -z "$tiny" ]; then
    # shellcheck disable=SC2046,SC2086
    "$python" -m bench.gpu.needs $([ $# -eq 0 ] && echo $known || echo "$@") 2>&1 | tee -a "$log"
    [ "${PIPESTATUS[0]}" -eq 0 ] || exit 2
fi

failed=""
echo "$parts" | sed 's/#.*//' | awk 'NF' > "$work/parts"
while read -r part limit <&3; do
    [ $# -eq 0 ] || [[ " $* " == *" $part "* ]] || continue
    left=$((deadline - SECONDS))
    seconds=$((limit < left ? limit : left))
    if [ "$seconds" -lt 5 ]; then
        echo "== $part: no time is left for it" | tee -a "$log"
        failed="$failed $part"
        continue
    fi
    echo "== $part (at most $seconds s)" | tee -a "$log"
    before=$(wc -c < "$log")
    # SIGINT lets pytest say what failed; no pipe, which a child that outlives the part would keep open
    timeout -s INT -k 10 "$seconds" "$python" -m bench.gpu $tiny "$part" "$work" >> "$log" 2>&1
    status=$?
    tail -c +$((before + 1)) "$log"
    if [ "$status" -ne 0 ]; then
        case "$status" in 124|137) why="stopped after $seconds s" ;; *) why="exit status $status" ;; esac
        echo "== $part: $why" | tee -a "$log"
        failed="$failed $part"
    fi
    "$python" -m bench.gpu.merge $tiny "$work" > "$work/merged" 2>&1 || { cat "$work/merged"; failed="$failed merge"; }
done 3< "$work/parts"

"$python" -m bench.gpu.merge $tiny --plots "$work" 2>&1 | tee -a "$log"
if [ -n "$failed" ]; then echo "== not whole:$failed" | tee -a "$log"; exit 1; fi
