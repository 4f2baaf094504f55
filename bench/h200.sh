#!/bin/sh
# The GPU kernels and the engine on the GPU at hand: correctness first, then the figures, within nine minutes.
#
#     bench/h200.sh [FOLDER]        FOLDER: where the results go; $OUT, or the folder gpu-results, without it
#
# Needs Python, torch, numpy and triton. With pytest the kernels' tests run compiled; without it each kernel is checked
# once. Every part has a time limit of its own, so that a part that hangs costs no other its turn. $PYTHON: which Python.
# Exit code: 0 when everything ran and every result was right, 1 otherwise. A goal that is missed does not fail.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-${OUT:-gpu-results}}
python=${PYTHON:-python3}
mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$root" || exit 1
export PYTHONPATH="$root"
failed=0

part() { # NAME SECONDS COMMAND...: its output also goes to a file
    name=$1 limit=$2
    shift 2
    began=$(date +%s)
    timeout -k 5 "$limit" "$@" >"$out/$name.txt" 2>&1
    code=$?
    cat "$out/$name.txt"
    echo "== $name: exit code $code after $(($(date +%s) - began)) of $limit s"
    [ "$code" -eq 0 ] || failed=1
}

if ! "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    echo "h200.sh: needs a GPU, and a torch that finds it (PYTHON=$python)" >&2
    exit 1
fi
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv >"$out/gpu.csv" 2>/dev/null

# Correctness: 50 + 160 s. The settings of pyproject.toml are left out: they name plugins that may not be there.
part check 50 "$python" -m bench.kernels --check --json "$out/check.json"
if "$python" -c 'import pytest' 2>/dev/null; then
    # A process for each file: compiling is what takes the time, and it takes one core.
    part tests 160 sh -c 'ls tests/kernels_gpu/test_*.py | xargs -P 8 -n 1 "$@"' sh "$python" -m pytest -q -rs \
        -c /dev/null --rootdir "$root" --confcutdir "$root/tests/kernels_gpu" -p no:cacheprovider
else
    echo "== tests: no pytest here, so check was all"
fi

# Figures: 140 + 40 + 120 s. Of the hand-off this is the first run on a GPU that says whether it works at all.
part kernels 140 "$python" -m bench.kernels --quick --json "$out/kernels.json"
part ipc 40 "$python" -m bench.ipc --json "$out/ipc.json"
part engine 120 "$python" -m bench.gpu_engine --quick --json "$out/engine.json"
exit "$failed"
