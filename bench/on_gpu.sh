#!/usr/bin/env bash
# On a machine with a CUDA GPU, in a checkout: builds, proves, measures. `bench/on_gpu.sh FOLDER [proof|tiles|bench]...`
# Needs torch (a CUDA build), triton, transformers, nvcc and pytest there, and no network. Files go to FOLDER.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?a folder for the results}
shift
parts=${*:-proof tiles bench}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$out/device.txt"
python3 -m pip install --quiet --no-build-isolation --no-deps -e . 2>&1 | tee "$out/build.txt" | tail -3
python3 -m srppo.cli env | tee "$out/env.txt"
failed=0
for part in $parts; do
    case $part in
        proof)
            python3 -m pytest -m gpu -q -x --maxfail=10 tests 2>&1 | tee "$out/pytest.txt" | tail -30 || failed=1
            if command -v compute-sanitizer > /dev/null; then
                timeout 120 compute-sanitizer --error-exitcode 1 python3 -m pytest -m gpu -q \
                    tests/linear_logprob/test_linear_logprob_gpu.py -k "ragged_sizes and 257" 2>&1 |
                    tee "$out/sanitizer.txt" | tail -5 || failed=1
            fi
            ;;
        tiles) python3 bench/tiles.py 2>&1 | tee "$out/tiles.txt" || failed=1 ;;
        bench) python3 bench/run.py --device cuda --out "$out/results.csv" 2>&1 | tee "$out/bench.txt" || failed=1 ;;
        *) echo "unknown part '$part': proof, tiles or bench" && exit 2 ;;
    esac
done
exit $failed
