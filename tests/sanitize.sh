#!/usr/bin/env bash
# The kernels' tests under a sanitizer of GCC: `bash tests/sanitize.sh address|undefined|thread [pytest's arguments]`,
# see docs/reliability.md. The wheel is built anew, with the sanitizer, and unpacked in build/sanitize-KIND.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=$1 root=$PWD; shift
python=$(realpath -s "${PYTHON:-.venv/bin/python}") folder=$PWD/build/sanitize-$kind
export CXX=${CXX:-g++} PIP_CONSTRAINT=$PWD/constraints.txt PIP_BUILD_CONSTRAINT=$PWD/constraints.txt
flags="-fsanitize=$kind -fno-sanitize-recover=all -fno-omit-frame-pointer -O1"
[ "$kind" != thread ] || flags+=" -DHARMONICA_WITHOUT_OPENMP"  # it does not see how OpenMP's threads wait
rm -rf "$folder"
export CMAKE_BUILD_TYPE=Debug CXXFLAGS=$flags LDFLAGS=$flags PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1
"$python" -m pip wheel --no-deps -w "$folder" .
"$python" -m pip install --no-deps --target "$folder" "$folder"/*.whl

export PYTHONPATH=$folder:$root/tests OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
cd "$folder"  # where Python looks first
"$python" -c "import importlib.util as u; found = u.find_spec('harmonica_kernels').origin; \
    assert found.startswith('$folder'), f'the tests would import {found}'"
library() { "$CXX" -print-file-name="$1"; }  # it has to come first in a process that was built without it
threads=tests/kernels/test_extension.py::test_threads
left_out=()
case $kind in
address | thread)  # which reserve terabytes of address space, and with which nvcc does not run
    left_out+=(--deselect ${threads}_that_cannot_start_are_done_without
               --deselect tests/kernels/graphs/gated/test_on_cuda.py::test_the_smallest_graph_builds) ;;&
address) preload="$(library libasan.so) $(library libstdc++.so)"; export ASAN_OPTIONS=detect_leaks=0 ;;
undefined) preload="$(library libubsan.so) $(library libstdc++.so)"; export UBSAN_OPTIONS=print_stacktrace=1 ;;
thread) preload="$(library libtsan.so) $(library libstdc++.so)"
    export TSAN_OPTIONS="suppressions=$root/tests/tsan.txt exitcode=66"
    # these have OpenMP in them, or threads after fork(), which it does not know
    left_out+=(--deselect ${threads}_are_torchs_own --deselect tests/kernels/test_threads.py::test_after_a_fork
               --deselect tests/kernels/test_threads.py::test_beside_another_openmp) ;;
esac
[ $# -gt 0 ] || set -- tests/kernels --ignore="$root/tests/kernels/triton_kernels"  # which never calls the extension
set -- "${@/#tests/$root/tests}"
# thread needs addresses where it expects them: setarch -R
setarch -R env LD_PRELOAD="$preload" "$python" -m pytest -q -c "$root/pyproject.toml" --rootdir "$root" \
    -p no:cacheprovider -o pythonpath="$root/tests" "${left_out[@]}" "$@"
