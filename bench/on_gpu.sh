#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, in a checkout: proves and measures, in two calls of five minutes or so, or in one of ten.
#
#     bench/on_gpu.sh FOLDER tests      triton small sm90 train sanitizer, at once
#     bench/on_gpu.sh FOLDER measure    tiles bench
#     bench/on_gpu.sh FOLDER [triton|small|sm90|train|sanitizer|tiles|bench|alltiles|demo]...    without stages: tests, measure
#
# Needs torch (a CUDA build, 2.11 or later), triton, pytest, hypothesis and rich there, and no network; the trainer's stages,
# train and demo, need all that the project depends on. Uses pytest-xdist and pytest-timeout where they are installed. Nothing
# is installed. An extension in srppo_kernels/ that imports and has CUDA kernels is
# taken as it is: carry one built from this tree. Else it is built in place; pybind11, ninja and nvcc have to be there then.
#
# Every stage writes its own file into FOLDER as it goes, ends at its own limit, and leaves the next its turn, whatever became
# of it; so a run that is cut off has lost the stages that it did not reach, and no other. summary.txt has a line a stage, as
# have the last lines. The exit status is 1 if a stage failed or ran into its limit.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?a folder for the results}
shift
stages=" ${*:-tests measure} "
stages=${stages/ tests / triton small sm90 train sanitizer }
stages=${stages/ measure / tiles bench }
for stage in $stages; do
    case $stage in
        triton | small | sm90 | train | sanitizer | tiles | bench | alltiles | demo) ;;
        *)
            echo "unknown stage '$stage': tests, measure, triton, small, sm90, train, sanitizer, tiles, bench, alltiles or demo" >&2
            exit 2
            ;;
    esac
done
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=0
summary=$out/summary.txt
: > "$summary"

# run STAGE SECONDS COMMAND...: into FOLDER/STAGE.txt.
run() {
    local stage=$1 limit=$2 began=$SECONDS status
    shift 2
    timeout --kill-after=10 "$limit" "$@" > "$out/$stage.txt" 2>&1
    status=$?
    echo "$stage: status $status$([ $status = 124 ] && echo " (ran into its $limit s)"), $((SECONDS - began)) s: $(
        grep -E 'passed|failed|skipped in|error|rows in' "$out/$stage.txt" | tail -n 1
    )" | tee -a "$summary"
    return $status
}

# Kernels compile on the CPU while others run: processes share the GPU. 16 cores: 5, 7, 3 and one of them, 100 seconds,
# and the trainer's one beside.
has() { python3 -c "import $1" 2> /dev/null; }
cores=$(nproc)
patience=()
has pytest_timeout && patience=(--timeout 120)
prove() { # STAGE SHARE TESTS...: in SHARE sixteenths of the cores; all skipped is no proof
    local workers=()
    has xdist && workers=(-n $(($2 * cores / 16 > 1 ? $2 * cores / 16 : 1)))
    run "$1" 200 python3 -m pytest -m gpu -q --tb=short --maxfail=40 -p no:cacheprovider \
        "${patience[@]}" "${workers[@]}" "${@:3}" && grep -q ' passed' "$out/$1.txt"
}

nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv,noheader 2>&1 | tee "$out/device.txt"
with_cuda() { python3 -c 'from srppo_kernels import _extension as e; exit(not e.build_info().get("cuda"))'; }
build=
if ! with_cuda; then # in the background: Triton's tests do not need it
    timeout 200 python3 setup.py build_ext --inplace > "$out/build.txt" 2>&1 &
    build=$!
fi
built() { # once: waits for the build, and says what there is
    [ "$build" = done ] && return
    [ -z "$build" ] || wait "$build" || echo "build: failed, see build.txt" | tee -a "$summary"
    build=done
    with_cuda || failed=1
    python3 -m srppo.cli env >> "$out/device.txt" 2>&1
}

provers=()
proven() { # waits for the tests: nothing is timed beside them
    local process
    for process in "${provers[@]}"; do wait "$process" || failed=1; done
    provers=()
}
for stage in $stages; do
    [ "$stage" = triton ] || built
    case $stage in triton | small | sm90 | train | sanitizer) ;; *) proven ;; esac
    case $stage in
        triton) prove triton 5 tests/linear_logprob/test_linear_logprob_gpu.py & ;;
        small)
            prove small 7 tests/gae/test_gae_gpu.py tests/ppo_loss/test_losses_gpu.py tests/log_ratio/test_reward_gpu.py \
                tests/bench/test_method.py &
            ;;
        sm90) prove sm90 3 tests/linear_logprob/test_linear_logprob_sm90.py & ;;
        train) prove train 1 tests/trainer/test_training_gpu.py tests/trainer/test_four_bit.py & ;;
        sanitizer)
            if command -v compute-sanitizer > /dev/null; then
                run sanitizer 200 compute-sanitizer --error-exitcode 1 python3 -m pytest -m gpu -q -p no:cacheprovider \
                    tests/linear_logprob/test_linear_logprob_gpu.py tests/linear_logprob/test_linear_logprob_sm90.py \
                    tests/ppo_loss/test_losses_gpu.py -k "(ragged_sizes and 129-257) or kept_exponentials or test_value_loss" \
                    && grep -q ' passed' "$out/sanitizer.txt"
            fi &
            ;;
        tiles) run tiles 60 python3 bench/tiles.py --quick || failed=1 ;;
        bench) # what is left of ten minutes, four at most, as its file is written at its end
            left=$((590 - SECONDS))
            left=$((left > 240 ? 240 : left < 60 ? 60 : left))
            run bench "$left" python3 bench/run.py --device cuda --budget $((left - 40)) --no-plot --out "$out/results.csv" \
                || failed=1
            ;;
        demo) run demo 400 python3 -m srppo.cli demo --output_dir "$out/demo" || failed=1 ;;
        alltiles) run alltiles 500 python3 bench/tiles.py || failed=1 ;;
    esac
    case $stage in triton | small | sm90 | train | sanitizer) provers+=($!) ;; esac
done
proven
built
echo "on $(head -n 1 "$out/device.txt"), $SECONDS s in all:"
cat "$summary"
exit $failed
