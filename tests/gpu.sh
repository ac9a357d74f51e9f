#!/bin/bash
# The tests of GPUs and their benchmark, in ten minutes at most, on a machine that has a GPU, Python 3.12 with torch,
# and perhaps no network. What it lacks besides is in gpu-pack, which `make gpu-pack` fills elsewhere.
# Run: tests/gpu.sh [tests] [benchmark]: both, or the one that is named.
# What they print, and the benchmark's figures, go to $OUT or else to gpu-out. A section that fails doesn't stop the
# next one; the last line names those that failed, and the exit code is then 1.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=${OUT:-gpu-out}
mkdir -p "$out"
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
python3 -W ignore -m tarfile -e gpu-pack/site.tar.xz "$made" || exit
export PYTHONPATH="$PWD:$made/site" PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTHONUNBUFFERED=1
wanted=" ${*:-tests benchmark} " failed=()

section() { # NAME SECONDS ARGUMENTS of python3. Interrupted when its time is over, it still tells what it has found.
    [[ $wanted == *" $1 "* ]] || return 0
    echo "== $1"
    local begun=$SECONDS
    timeout --signal=INT --kill-after=10 "$2" python3 "${@:3}" 2>&1 | tee "$out/$1.txt" || failed+=("$1")
    echo "== $1: $((SECONDS - begun)) s"
}

section tests 240 -m pytest -vv -rs -m gpu --durations=0 --timeout=120 -p pytest_timeout -p no:cacheprovider tests/test_gpu.py
section benchmark 320 tests/benchmarks/gpu.py --out "$out/gpu.json"
[[ ${#failed[@]} -eq 0 ]] || { echo "failed: ${failed[*]}" && exit 1; }
