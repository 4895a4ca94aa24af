#!/bin/bash
# The tables of docs/comparison.md: bench/comparison.sh TABLE|all [SAMPLES [OPTIONS OF harmonica compare …]]
#
# Each is one `harmonica compare` into build/comparison-TABLE; all share their samples, in build/comparison-samples, so
# what two tables have in common is sampled once, and a run that was stopped goes on. Started twice, two processes share
# the work. Afterwards `python -m bench.comparison_page build/comparison-TABLE …` writes the page.
set -euo pipefail
cd "$(dirname "$0")/.."
table=${1:?TABLE: 1.4, 2.0, 2.8, 3.8, t10, t50, dpm, ablations, tau-beta or all} samples=${2:-5000}
shift $(($# < 2 ? $# : 2))
seeds=bench/data/seeds rest=("$@")

compare() { # NAME METHODS FILES OPTIONS …; a file without a folder is of the bundled ones or of $seeds
    local out=build/comparison-$1 arguments=() name
    for name in $2; do arguments+=(--method "$name"); done
    for name in $3; do
        [ -e "$seeds/$name.safetensors" ] && name=$seeds/$name.safetensors
        arguments+=(--schedule "$name")
    done
    shift 3
    mkdir -p "$out" build/comparison-samples
    [ -e "$out/samples" ] || ln -s ../comparison-samples "$out/samples"
    harmonica compare --out "$out" --seed 1 --samples "$samples" --batch 100 --accurate "${arguments[@]}" "$@" "${rest[@]}"
}

every="fora taylorseer-1 taylorseer-2 taylorseer-3 trunk adams smoothcache delta-dit first-block step-search fewer-steps
    fewer-steps-evenly dpm-solver++ unipc"
run() {
    case $1 in
    1.4) compare 1.4 "fora taylorseer-1 taylorseer-2 smoothcache delta-dit fewer-steps fewer-steps-evenly dpm-solver++" \
        "fashion-dit-1.6x learning-to-cache-1.4x router-1.4x router-repeat-1.4x" --speedup 1.4 ;;
    2.0) compare 2.0 "$every" "fashion-dit-2.0x fashion-dit-2.0x-forecast fashion-dit-forecast-2.0x $(echo {iepo,sdt}-2.0-seed{0,1,2})
        sdt-repeat-2.0-seed0" --speedup 1.9 ;;
    2.8) compare 2.8 "$every" "fashion-dit-forecast-2.8x fashion-dit-forecast-2.8x-uncached fashion-dit-forecast-7-steps
        $(echo fashion-dit-forecast-2.8x{,-uncached}-seed{1,2} {iepo,sdt,iepo-repeat}-2.8-seed{0,1,2})" --speedup 2.7 ;;
    3.8) compare 3.8 "$every" "fashion-dit-forecast-3.8x fashion-dit-forecast-3.8x-uncached fashion-dit-forecast-3.8x-late
        $(echo fashion-dit-forecast-3.8x{,-uncached}-seed{1,2} iepo-3.8-seed0)" --speedup 3.7 ;;
    t10) compare t10 "$every" \
        "paper-t10 recommended-t10 forecast-t10 learning-to-cache-t10" --steps 10 --speedup 1.9 --speedup 1.25 ;;
    t50) compare t50 "fora taylorseer-1 taylorseer-2 trunk adams smoothcache delta-dit first-block fewer-steps
        fewer-steps-evenly dpm-solver++" \
        "recommended-t50 forecast-t50 learning-to-cache-t50" --steps 50 --speedup 1.9 ;;
    dpm) compare dpm "fora taylorseer-1 taylorseer-2 trunk smoothcache delta-dit fewer-steps fewer-steps-evenly dpm-solver++" \
        "recommended-dpm router-dpm-2.8 $(echo fashion-dit-dpm-forecast-2.8x{,-last})" \
        --scheduler DPMSolverMultistepScheduler --speedup 1.9 --speedup 2.7 ;;
    ablations) compare ablations taylorseer-1 "$(echo {iepo,sdt}-2.0-seed{0,1,2} lambda-{reference,gain,hard,raw} c-{100,2400})" \
        --speedup 1.9 ;;
    tau-beta) compare tau-beta fora "fashion-dit-2.0x iepo-2.0-seed0 $(echo sdt-repeat-2.0-seed{0,1,2} iepo-repeat-2.0-seed{1,2})
        $(echo tau-0.{1,9} beta-{3,6}e-5)" --speedup 1.9 ;;
    all) for one in 1.4 2.0 2.8 3.8 t10 t50 dpm ablations tau-beta; do run $one; done ;;
    *) echo "bench/comparison.sh: there is no table $1" >&2; exit 2 ;;
    esac
}
run "$table"
