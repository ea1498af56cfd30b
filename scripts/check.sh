#!/usr/bin/env bash
# Checks and measures edm2k on this machine's first GPU, and prints a summary last. 10 minutes at most.
#
#   ./check.sh [-o DIRECTORY] [PART]...     default: all parts; logs go to DIRECTORY, default: logs beside this script
#
#   tests      the kernels, the engine and the official numbers, side by side        150 s at most
#   bench      edm2k's speed, every kernel against the card's limits                  90 s at most
#   peers      the official PyTorch code and cuDNN on the same work                  240 s at most
#   sanitize   the tests under compute-sanitizer, the convolutions' and attention's   240 s at most
#              first: what is left of the time goes to the others
#
# Whatever is timed runs alone. peers needs Python with PyTorch, and EDM2_CHECKOUT=DIRECTORY, a checkout of
# https://github.com/NVlabs/edm2; what is missing is named and is no failure. The exit code is 0 only if every part
# that could run is ok.
set -u
here=$(cd "$(dirname "$0")" && pwd) || exit 2
logs=$here/logs
usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$here/$(basename "$0")"; }
while getopts ho: option; do
    case $option in
        h) usage && exit ;;
        o) mkdir -p "$OPTARG" && logs=$(cd "$OPTARG" && pwd) || exit 2 ;;
        *) usage >&2 && exit 2 ;;
    esac
done
shift $((OPTIND - 1))
parts=("$@")
[ $# -gt 0 ] || parts=(tests bench peers sanitize)
for name in "${parts[@]}"; do
    case $name in
        tests | bench | peers | sanitize) ;;
        *) echo "check.sh: there is no part '$name' (tests, bench, peers, sanitize)" >&2 && exit 2 ;;
    esac
done

cd "$here" || exit 2
mkdir -p "$logs"
summary="$logs/summary.txt"
: > "$summary"
deadline=0

say() { printf '%-8s %s\n' "$1" "$2" | cut -c 1-200 | tee -a "$summary"; }

# run NAME SECONDS COMMAND...: for so long at most and not beyond the part's deadline, into a log of its own.
run() {
    local name=$1 most=$2 begun=$SECONDS code verdict last
    shift 2
    local left=$((deadline - SECONDS))
    [ "$left" -ge 5 ] || { say "not run" "$name: no time left" && return; }
    [ "$left" -ge "$most" ] || most=$left
    timeout -k 3 "$most" "$@" > "$logs/$name.txt" 2>&1
    code=$?
    last=$(grep -v '^[[:space:]]*$' "$logs/$name.txt" | tail -n 1)
    if grep -q 'skipped on a GPU' "$logs/$name.txt"; then
        verdict=SKIPPED last=$(grep -m 1 -o 'skipped on a GPU.*' "$logs/$name.txt")
    elif [ "$code" -eq 0 ] && ! grep -q ' 0 passed' "$logs/$name.txt"; then
        verdict=ok
    elif grep -q 'Device not supported' "$logs/$name.txt"; then
        verdict="no tool" last="the tool does not support this device"
    elif [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
        verdict=TIMEOUT
    else
        verdict="FAIL $code"
    fi
    say "$verdict" "$name, $((SECONDS - begun)) s: $last"
}

# tested NAME SECONDS THREADS FILTER: from the program of tests.
tested() {
    local name=$1 most=$2 threads=$3
    shift 3
    run "$name" "$most" bin/kernels --test-threads="$threads" --nocapture "$@"
}

tests() {
    # Each line is one after the other, the lines side by side: none waits long for the longest, the engine.
    tested engine 145 1 engine:: &
    tested conv 90 2 conv:: &
    { tested attention 60 2 attention::; tested codec 60 2 codec::; } &
    {
        tested cuda 60 1 cuda::
        # On cards of 9.0 and newer: all launches of a graph begin while the one before them ends, or none.
        EDM2K_OVERLAP=1 tested cuda-overlap 60 1 cuda::
        EDM2K_OVERLAP=1 run verify-overlap 60 bin/edm2k verify tests/golden --device cuda
        EDM2K_OVERLAP=0 run verify-in-turn 60 bin/edm2k verify tests/golden --device cuda
    } &
    { tested pixelwise 60 2 pixelwise::; tested embedding 60 2 embedding::; } &
    {
        run verify-f16 60 bin/edm2k verify tests/golden --device cuda
        run verify-bf16 60 bin/edm2k verify tests/golden --device cuda --precision bf16
        run verify-mma 60 bin/edm2k verify tests/golden --device cuda --conv-loop mma --accum f32
        run verify-f16x2 60 bin/edm2k verify tests/golden --device cuda --conv-loop mma --accum f16x2
    } &
    wait
}

bench() {
    run bench 65 bin/edm2k bench --device cuda --kernels
    # By the loop for every card, which on Hopper is not the default; and without overlapping launches.
    run bench-mma 30 bin/edm2k bench --device cuda --conv-loop mma
    EDM2K_OVERLAP=0 run bench-in-turn 30 bin/edm2k bench --device cuda
    run picture 30 bin/edm2k bench --picture --device cuda
}

peers() {
    local why
    if ! why=$(python3 -c 'import torch; assert torch.cuda.is_available(), "PyTorch finds no GPU"' 2>&1); then
        say "no tool" "peers: $(echo "$why" | tail -n 1)"
        return
    fi
    run cudnn 75 python3 benches/peers/cudnn_convs.py --limit 60
    if [ -z "${EDM2_CHECKOUT:-}" ]; then
        say "no tool" "pytorch: EDM2_CHECKOUT does not name a checkout of https://github.com/NVlabs/edm2"
        return
    fi
    run pytorch 165 python3 benches/peers/pytorch_edm2.py --edm2 "$EDM2_CHECKOUT" --limit 60 --total 155
}

sanitize() {
    local sanitizer tool kernels
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
    if [ -z "$sanitizer" ]; then
        say "no tool" "sanitize: compute-sanitizer is not installed"
        return
    fi
    # A kernel is looked for in one module after the other: refusals of the driver are no errors here.
    local check=(--report-api-errors no --error-exitcode 9 --print-limit 5 bin/kernels --test-threads=1 --nocapture)
    for kernels in conv attention pixelwise embedding codec; do
        for tool in memcheck racecheck initcheck synccheck; do
            run "$tool-$kernels" 40 "$sanitizer" --tool "$tool" "${check[@]}" "$kernels::"
        done
    done
    run memcheck-graph 60 "$sanitizer" --tool memcheck "${check[@]}" \
        a_replayed_plan_computes_what_its_operations_do_at_once
}

nvidia-smi > "$logs/nvidia-smi.txt" 2>&1
bin/kernels --nocapture cuda::a_graph_runs_as_often > "$logs/gpu.txt" 2>&1
if why=$(grep -m 1 -o 'skipped on a GPU.*' "$logs/gpu.txt"); then
    say "FAIL" "there is no GPU to check: ${why#skipped on a GPU: }"
    exit 1
fi
for name in "${parts[@]}"; do
    case $name in
        tests) most=150 ;;
        bench) most=90 ;;
        *) most=240 ;;
    esac
    begun=$SECONDS
    deadline=$((SECONDS + most < 590 ? SECONDS + most : 590))
    "$name"
    echo "-------- $name: $((SECONDS - begun)) s" | tee -a "$summary"
done

echo
echo "==== edm2k $(cat commit 2>/dev/null), $(date -u +%FT%TZ), $SECONDS s"
nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.max.sm --format=csv,noheader 2>&1 | head -n 1
for name in bench cudnn pytorch; do
    [[ " ${parts[*]} " == *" $name "* || $name != bench && " ${parts[*]} " == *" peers "* ]] || continue
    [ -s "$logs/$name.txt" ] && echo "---- $name" && grep -v '^[[:space:]]*$' "$logs/$name.txt" | tail -n 60 | cut -c 1-160
done
echo "---- summary"
cat "$summary"
if grep -qE '^(SKIPPED|TIMEOUT|FAIL)' "$summary"; then
    echo "==== NOT all ok; the logs are in $logs"
    exit 1
fi
echo "==== all ok"
