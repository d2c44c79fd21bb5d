#!/usr/bin/env bash
# The ops' tests where memory errors, undefined behaviour and data races end in a report, on a machine with GCC and Linux:
#
#     tests/sanitize.sh address|thread|pages [pytest's arguments]
#
# address   the extension, the CUDA kernels that run on the host and the emulated AMX tiles under AddressSanitizer and
#           UndefinedBehaviorSanitizer; with -n 2 some nine minutes on two cores
# thread    the extension under ThreadSanitizer, its parallel loops on four threads that it knows of (threads_seen.cpp); as long
# pages     the extension as it is, and Triton's kernels in the interpreter, on tensors that end where memory ends, are filled
#           with NaN and leave nothing behind when they are freed (page_ends.c); 15 minutes
#
# Takes the last commit, and Python from PATH with what the `test` extra brings. Each mode first shows that it finds an error
# that is there. The exit status is 1 if a test failed or anything was reported.
set -euo pipefail
mode=${1:?address, thread or pages}
shift
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git clone --quiet "$(dirname "$0")/.." "$folder/srppo"
cd "$folder/srppo"
export PYTHONPATH=$PWD

# What measures memory or counts a process's allocations measures the sanitizer's; what preloads its own cannot be preloaded.
left_out="not memory and not workspace"
files=(tests/gae tests/ppo_loss tests/log_ratio tests/linear_logprob tests/test_layouts.py)
runner=()
case $mode in
    address)
        export CFLAGS="-fsanitize=address,undefined -fno-omit-frame-pointer -g -O1"
        # torch and Python leak by design, and both libraries hold the same type information.
        export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:log_path=$folder/report
        export UBSAN_OPTIONS=print_stacktrace=1:log_path=$folder/report
        preloaded="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
        left_out+=" and not triton and not interpreted"
        broken='import ctypes; block = ctypes.CDLL(None); block.malloc.restype = ctypes.c_void_p
ctypes.memmove(ctypes.c_void_p(block.malloc(8)), b"nine bytes", 9)'
        ;;
    thread)
        export CFLAGS="-fsanitize=thread -g -O1"
        export TSAN_OPTIONS=ignore_noninstrumented_modules=1:report_signal_unsafe=0:log_path=$folder/report
        g++ -std=c++20 $CFLAGS -fPIC -shared tests/threads_seen.cpp -o "$folder/threads_seen.so"
        preloaded="$(gcc -print-file-name=libtsan.so) $folder/threads_seen.so"
        left_out+=" and not triton and not interpreted and not sm90 and not cuda"  # coroutines, which it takes for one thread
        runner=(setarch -R)  # older ones do not find their way in addresses that are as random as they are now
        broken='import ctypes; ctypes.CDLL(None).race()'
        ;;
    pages)
        gcc -O2 -fPIC -shared tests/page_ends.c -o "$folder/page_ends.so" -ldl -lpthread
        preloaded=$folder/page_ends.so
        broken='import ctypes, torch; ctypes.string_at(torch.empty(1004).data_ptr(), 4017)'
        ;;
    *)
        echo "unknown mode '$mode': address, thread or pages" >&2
        exit 2
        ;;
esac
export CXXFLAGS=${CFLAGS:-} LDFLAGS=${CFLAGS:-}
python setup.py --quiet build_ext --inplace > "$folder/build.txt" 2>&1 || { cat "$folder/build.txt"; exit 1; }

watched() { LD_PRELOAD=$preloaded "${runner[@]}" python "$@"; }
watched -c "$broken" > /dev/null 2>&1 && status=0 || status=$?
if [ $status = 0 ] || { [ "$mode" != pages ] && ! ls "$folder"/report* > /dev/null 2>&1; }; then
    echo "$mode: an error that is there was not found (status $status): this machine's cannot be believed" >&2
    exit 1
fi
rm -f "$folder"/report*
status=0
watched -m pytest -q -p no:cacheprovider -k "$left_out" "${files[@]}" "$@" || status=1
for report in "$folder"/report*; do
    # AddressSanitizer says of every process that switches stacks that it might see what is not there.
    grep -q -E 'ERROR|WARNING: ThreadSanitizer|runtime error' "$report" 2> /dev/null && { cat "$report"; status=1; }
done
exit $status
