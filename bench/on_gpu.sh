#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, in a checkout: builds, proves, measures, within ten minutes.
#
#     bench/on_gpu.sh FOLDER [triton|small|sm90|sanitizer|tiles|bench|alltiles]...
#
# Needs torch (a CUDA build, 2.11 or later), triton, pytest, hypothesis, pybind11, ninja and nvcc there, and no network; uses
# pytest-xdist where it is installed. Nothing is installed: the extension is built in place. Without stages: all but alltiles.
#
# Correctness comes first. Every stage writes its own file into FOLDER as it goes, ends at its own limit, and leaves the next
# its turn, whatever became of it; so a run that is cut off has lost the stages that it did not reach, and no other. The last
# lines are a line a stage. The exit status is 1 if a stage failed or ran into its limit.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?a folder for the results}
shift
stages=${*:-triton small sm90 sanitizer tiles bench}
for stage in $stages; do
    case $stage in
        triton | small | sm90 | sanitizer | tiles | bench | alltiles) ;;
        *) echo "unknown stage '$stage': triton, small, sm90, sanitizer, tiles, bench or alltiles" >&2 && exit 2 ;;
    esac
done
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=0
summary=()

# run STAGE SECONDS COMMAND...: into FOLDER/STAGE.txt.
run() {
    local stage=$1 limit=$2 began=$SECONDS status
    shift 2
    timeout --kill-after=10 "$limit" "$@" > "$out/$stage.txt" 2>&1
    status=$?
    tail -n 6 "$out/$stage.txt"
    summary+=("$stage: status $status$([ $status = 124 ] && echo " (ran into its $limit s)"), $((SECONDS - began)) s: $(
        grep -E 'passed|failed|error|rows in' "$out/$stage.txt" | tail -n 1
    )")
    echo "${summary[-1]}" | tee -a "$out/device.txt"
    [ $status = 0 ] || failed=1
}

# Kernels compile on the CPU while others run: eight processes share the GPU.
workers=()
python3 -c 'import xdist' 2> /dev/null && workers=(-n 8)
prove() { # STAGE SECONDS TESTS...
    run "$1" "$2" python3 -m pytest -m gpu -q --tb=short --maxfail=40 "${workers[@]}" "${@:3}"
    grep -q ' passed' "$out/$1.txt" || failed=1 # all skipped is no proof
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1 | tee "$out/device.txt"
# CUDA C++ compiles in the background; Triton's tests do not need it.
log=$(mktemp)
timeout 200 python3 setup.py build_ext --inplace > "$log" 2>&1 &
build=$!
built() { # waits for the build, once
    [ -z "$build" ] && return
    wait "$build"
    local status=$?
    build=
    [ $status = 0 ] && python3 -c 'from srppo_kernels import _extension as e; exit(not e.build_info().get("cuda"))' || failed=1
    { tail -n 30 "$log"; echo "build: status $status"; python3 -m srppo.cli env; } >> "$out/device.txt" 2>&1
    echo "build: status $status"
}

for stage in $stages; do
    [ "$stage" = triton ] || built
    case $stage in
        triton) prove triton 170 tests/linear_logprob/test_linear_logprob_gpu.py ;;
        small)
            prove small 120 tests/gae/test_gae_gpu.py tests/ppo_loss/test_losses_gpu.py tests/log_ratio/test_reward_gpu.py
            ;;
        sm90) prove sm90 60 tests/linear_logprob/test_linear_logprob_sm90.py ;;
        sanitizer)
            if command -v compute-sanitizer > /dev/null; then
                run sanitizer 60 compute-sanitizer --error-exitcode 1 python3 -m pytest -m gpu -q -p no:cacheprovider \
                    tests/linear_logprob/test_linear_logprob_gpu.py tests/linear_logprob/test_linear_logprob_sm90.py \
                    tests/ppo_loss/test_losses_gpu.py -k "(ragged_sizes and 129-257) or kept_exponentials or test_value_loss"
            fi
            ;;
        tiles) run tiles 60 python3 bench/tiles.py --quick ;;
        bench) # the limits above add up to 500 s: it gets what is left of ten minutes, as its file is written at its end
            left=$((590 - SECONDS))
            left=$((left > 160 ? 160 : left < 60 ? 60 : left))
            run bench "$left" python3 bench/run.py --device cuda --budget $((left - 40)) --no-plot --out "$out/results.csv"
            ;;
        alltiles) run alltiles 500 python3 bench/tiles.py ;;
    esac
done
built
echo "on $(head -n 1 "$out/device.txt"), $SECONDS s in all:"
printf '%s\n' "${summary[@]}"
exit $failed
