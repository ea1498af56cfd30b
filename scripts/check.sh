#!/usr/bin/env bash
# Checks and measures edm2k on this machine's first GPU, and prints a summary last. At most 10 minutes.
#
#   ./check.sh [DIRECTORY]     where the logs go; default: logs beside this script
#
# The exit code is 0 only if every part that could run is ok.
set -u
cd "$(dirname "$0")" || exit 2
logs=${1:-logs}
mkdir -p "$logs"
deadline=590
summary="$logs/summary.txt"
failed=0
: > "$summary"

# part NAME SECONDS COMMAND...: runs it for so long at most, into a log of its own.
part() {
    local name=$1 most=$2 begun=$SECONDS code verdict last
    shift 2
    local left=$((deadline - SECONDS))
    if [ "$left" -lt 5 ]; then
        echo "not run  $name: no time left" >> "$summary"
        return
    fi
    [ "$left" -ge "$most" ] || most=$left
    timeout -k 3 "$most" "$@" > "$logs/$name.txt" 2>&1
    code=$?
    last=$(grep -v '^[[:space:]]*$' "$logs/$name.txt" | tail -n 1)
    if grep -q 'skipped on a GPU' "$logs/$name.txt"; then
        verdict=SKIPPED last=$(grep -m 1 -o 'skipped on a GPU.*' "$logs/$name.txt") failed=1
    elif [ "$code" -eq 0 ] && ! grep -q ' 0 passed' "$logs/$name.txt"; then
        verdict=ok
    elif grep -q 'Device not supported' "$logs/$name.txt"; then
        verdict="no tool" last="the tool does not support this device"
    elif [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
        verdict=TIMEOUT failed=1
    else
        verdict="FAIL $code" failed=1
    fi
    printf '%-8s %s, %d s: %s\n' "$verdict" "$name" $((SECONDS - begun)) "$last" | cut -c 1-200 | tee -a "$summary"
}

test="--test-threads=1 --nocapture"
nvidia-smi > "$logs/nvidia-smi.txt" 2>&1
# shellcheck disable=SC2086  # words
{
    part cuda 60 bin/gpu $test cuda::
    for kernels in pixelwise embedding attention conv codec; do
        part "$kernels" 60 bin/gpu $test "${kernels}_kernels::"
    done
    part verify-f16 60 bin/edm2k verify tests/golden --device cuda
    part verify-bf16 60 bin/edm2k verify tests/golden --device cuda --precision bf16
    part engine 150 bin/gpu $test engine::
    part bench 120 bin/edm2k bench --device cuda --kernels

    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
    if [ -n "$sanitizer" ]; then
        # A kernel is looked for in one module after the other: refusals of the driver are no errors here.
        check="--report-api-errors no --error-exitcode 9 --print-limit 5"
        for tool in memcheck racecheck initcheck synccheck; do
            for kernels in pixelwise embedding attention conv codec; do
                part "$tool-$kernels" 40 "$sanitizer" --tool "$tool" $check bin/gpu $test "${kernels}_kernels::"
            done
        done
        part memcheck-graph 60 "$sanitizer" --tool memcheck $check \
            bin/gpu $test a_replayed_plan_computes_what_its_operations_do_at_once
    else
        echo "no tool  compute-sanitizer is not installed" >> "$summary"
    fi
}

echo
echo "==== edm2k $(cat commit 2>/dev/null), $(date -u +%FT%TZ), $SECONDS s"
nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.max.sm --format=csv,noheader 2>&1 | head -n 1
cat "$summary"
echo "---- bench"
tail -n 60 "$logs/bench.txt" 2>/dev/null | cut -c 1-160
[ "$failed" -eq 0 ] && echo "==== all ok" || echo "==== NOT all ok; the logs are in $logs"
exit "$failed"
