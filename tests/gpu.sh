#!/bin/bash
# The tests of GPUs and their benchmark, in eight minutes at most, on a machine that has a GPU, Python 3.12 with torch,
# and perhaps no network. What it lacks beside is in gpu-pack, which `make gpu-pack` fills elsewhere.
# What they print, and the benchmark's figures, go to $OUT or else to gpu-out.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=${OUT:-gpu-out}
mkdir -p "$out"
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
tar --xz -xf gpu-pack/site.tar.xz -C "$made" || exit
export PYTHONPATH="$PWD:$made/site" PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTHONUNBUFFERED=1
failed=0
limited() { timeout --kill-after=10 "$1" python3 "${@:3}" 2>&1 | tee "$out/$2" || failed=1; }
limited 235 tests.txt -m pytest -p pytest_timeout -p no:cacheprovider -m gpu -rs --durations=0 tests/test_gpu.py
limited 220 benchmark.txt tests/benchmarks/gpu.py --out "$out/gpu.json"
exit "$failed"
