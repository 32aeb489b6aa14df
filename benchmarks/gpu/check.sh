#!/usr/bin/env bash
# Builds, tests and measures everything on a machine with one GPU and no network, in under nine minutes.
#
#   benchmarks/gpu/check.sh [--dry-run] [OUTDIR]        OUTDIR: default $OUT, else bench-results/gpu
#
# WEIGHTLOAD_BENCH_DIR     where checkpoints are written and read (default /tmp/weightload-bench; 32 GB are needed)
# WEIGHTLOAD_BENCH_SECONDS all that it may take (default 520)
# WEIGHTLOAD_BENCH_STEPS   which of "build tests accelerator tests-no-gpu sanitizer limits settings ranks sharded frameworks
#                          llama moe" (default: all but tests-no-gpu, which runs elsewhere, too)
# WEIGHTLOAD_BENCH_FRESH   new processes of each loader whose first load is timed (default 0)
# WEIGHTLOAD_COMMIT        what to call the commit where there is no repository
# .kit/wheels              wheels that are missing on this machine: the other loaders, nlohmann-json, ninja, pytest
# .kit/wheels-rc           a safetensors release candidate, used only by the loaders that ask for it
# .kit/libnccl.so.2.xz     an NCCL that lets ranks share a GPU, for "ranks"
#
# --dry-run does the same without a GPU: tiny, on the CPU, without .kit, build and tests; it measures nothing.
# On the simulated CUDA (tests/simulated_cuda) every step runs, on tiny checkpoints, and no figure is printed.
# Every step has a time limit, and a step that fails does not keep the others from running.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

dry=0
if [ "${1:-}" = "--dry-run" ]; then dry=1; shift; fi
out=$(realpath -m "${1:-${OUT:-bench-results/gpu}}")
dir=${WEIGHTLOAD_BENCH_DIR:-/tmp/weightload-bench}
total=${WEIGHTLOAD_BENCH_SECONDS:-520}
steps=${WEIGHTLOAD_BENCH_STEPS:-build tests accelerator sanitizer limits settings ranks sharded frameworks llama moe}
fresh=${WEIGHTLOAD_BENCH_FRESH:-0}
python=${PYTHON:-python3}
device=cuda:0
if [ $dry = 1 ]; then device=cpu; total=160; fi
# Its figures would be those of memcpy and of threads that sleep at random.
simulated=0
if [ $dry = 0 ] && "$python" -c "import torch; raise SystemExit('Simulated' not in torch.cuda.get_device_name())" 2>/dev/null; then
  simulated=1
  total=${WEIGHTLOAD_BENCH_SECONDS:-1500}
fi
mkdir -p "$out" "$dir"
site=$dir/site
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD:$site
export PATH=$site/bin:$PATH
rm -f "$out"/limits.json "$out"/settings.json "$out"/ranks.json "$out"/llama.json "$out"/moe.json "$out"/tiny.json \
  "$out"/sharded.json "$out"/frameworks-*.json # of an earlier run
SECONDS=0
failed=0
outcomes=()

wants() { [[ " $steps " == *" $1 "* ]]; }
left() { echo $((total - SECONDS)); }
least() { echo $(($1 < $2 ? $1 : $2)); }
note() { outcomes+=("$(printf '%-14s %s' "$1" "$2")"); printf '[%3d s] %-14s %s\n' "$SECONDS" "$1" "$2"; }

# step NAME LIMIT COMMAND ...: its output goes to OUTDIR/NAME.log, its outcome into the list at the end.
step() {
  local name=$1 limit begin=$SECONDS code=0
  limit=$(least "$2" "$(left)")
  shift 2
  if [ "$limit" -lt 5 ]; then failed=1; note "$name" "FAILED: no time left"; return; fi
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  case $code in
    0) note "$name" "ok, $((SECONDS - begin)) s" ;;
    77) note "$name" "skipped: $(tail -n 1 "$out/$name.log")" ;;
    124 | 137) failed=1; note "$name" "FAILED: over its limit of $limit s (see $name.log)" ;;
    *) failed=1; note "$name" "FAILED: exit $code (see $name.log)"; tail -n 4 "$out/$name.log" | sed 's/^/    /' ;;
  esac
}

unpack() { # FOLDER TARGET
  local target=$2
  rm -rf "$target"
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$target" "$1"/*.whl
}

generate() {
  if [ $dry = 1 ]; then
    "$python" benchmarks/checkpoints/synth.py "$dir/tiny" --model small-tensors --layers 1 --shards 2
    return
  fi
  if [ $simulated = 1 ]; then
    for name in tiny ranks llama moe; do
      "$python" benchmarks/checkpoints/synth.py "$dir/$name" --model small-tensors --layers 1 --shards 2
    done
    return
  fi
  "$python" benchmarks/checkpoints/synth.py "$dir/tiny" --model small-tensors --layers 1 --shards 2
  local size=(--layers 32)
  # The checkpoints and the file of gpu/limits.py: with less room, a smaller one.
  if [ "$(df --output=avail -B1G "$dir" | tail -n 1)" -lt 33 ] && [ ! -e "$dir/llama/synth.json" ]; then
    size=(--gigabytes 4)
  fi
  if wants llama || wants settings; then
    "$python" benchmarks/checkpoints/synth.py "$dir/llama" --model llama-3-8b "${size[@]}" --shards 4
  fi
  if wants ranks || wants sharded; then
    "$python" benchmarks/checkpoints/synth.py "$dir/ranks" --model llama-3-8b --gigabytes 4 --shards 2
  fi
  if wants moe; then "$python" benchmarks/checkpoints/synth.py "$dir/moe" --model qwen3-30b-a3b-narrow --shards 16; fi
  sync -f "$dir" # else the first eviction waits for the disk
}

benchmark() { # NAME SECONDS CHECKPOINT TITLE OPTION ...
  local name=$1 limit=$2 checkpoint=$3 title=$4
  shift 4
  # Beside the counted rounds, warm and cold: the start of the processes, a load of each that is checked, and the heats.
  local budget=$((limit * 18 / 100))
  step "$name" "$limit" "$python" benchmarks/compare_loaders.py --model-path "$checkpoint" --title "$title" \
    --device "$device" --fresh "$fresh" --heats 1 --repeats 5 --budget "$budget" --limit-s 60 --json "$out/$name.json" --plot "$out/$name.png" \
    --log "$out/$name-loaders.log" "$@"
}

ranks() { # SECONDS CHECKPOINT OPTION ...: every rank on the one device
  local limit=$1 checkpoint=$2
  shift 2
  # The script itself ends a run that takes too long, with its ranks, and writes down what it has.
  step ranks "$limit" "$python" benchmarks/gpu/ranks.py --model-path "$checkpoint" --device "$device" \
    --scratch "$dir" --limit-s $((limit - 20)) --json "$out/ranks.json" "$@"
}

if [ $dry = 1 ]; then
  note gpu "dry run: device: cpu (logic only, not a measurement); no build, no tests"
elif ! "$python" -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then
  echo "torch sees no GPU here (to try the script without one: --dry-run)"
  exit 2
elif [ -d .kit/wheels ]; then
  step kit 60 bash -c "$(declare -f unpack); python=$python; unpack .kit/wheels '$site'"
else
  note kit "no .kit/wheels: only the loaders that are installed here are compared"
fi
if [ $dry = 0 ] && [ -d .kit/wheels-rc ]; then
  export WEIGHTLOAD_PEERS=$dir/peers
  candidate=$WEIGHTLOAD_PEERS/safetensors-rc
  step kit-rc 30 bash -c "$(declare -f unpack); python=$python; unpack .kit/wheels-rc '$candidate'"
  if ! "$python" -c "import safetensors" 2>/dev/null; then
    note safetensors "not installed: the release candidate stands in for it"
    export PYTHONPATH=$PYTHONPATH:$candidate
  fi
fi

generate >"$out/generate.log" 2>&1 &
generating=$!
trap 'kill $generating 2>/dev/null || true' EXIT

if [ $dry = 0 ]; then
  nvidia-smi -q >"$out/nvidia-smi.txt" 2>&1 || true
  if wants build; then
    command -v ninja >/dev/null || note ninja "not installed: the build takes one file after the other"
    step build $((simulated ? 900 : 240)) env MAX_JOBS=16 "$python" setup.py build_ext --inplace
  fi
fi

if wait "$generating"; then note generate "ok"; else failed=1; note generate "FAILED (see generate.log)"; fi
trap - EXIT

if [ $dry = 0 ] && { wants tests || wants accelerator || wants tests-no-gpu; }; then
  if ! "$python" -c "import pytest" 2>/dev/null; then
    note tests "skipped: pytest is not installed"
    steps=${steps//tests/}
    steps=${steps//accelerator/}
  fi
  if wants tests; then
    step tests $((simulated ? 600 : 160)) env WEIGHTLOAD_REQUIRE_GPU=1 "$python" -m pytest -q --maxfail=20 \
      -p no:cacheprovider tests/accelerator/test_gpu.py
  fi
  if wants accelerator; then
    # Those of the simulated accelerator, on the GPU. Each is one process's; some hold a stream, which keeps the GPU idle.
    parallel=()
    if "$python" -c "import xdist" 2>/dev/null; then parallel=(-n 6 --dist loadfile); fi
    if "$python" -c "import pytest_timeout" 2>/dev/null; then parallel+=(--timeout 40); fi
    step accelerator 150 env WEIGHTLOAD_REQUIRE_GPU=1 WEIGHTLOAD_TEST_ACCELERATOR=gpu "$python" -m pytest -q \
      --maxfail=40 --durations=5 -p no:cacheprovider "${parallel[@]}" \
      tests/accelerator/test_simulated.py tests/accelerator/test_simulated_{order,handle,ring,failures,parts}.py
  fi
  if wants tests-no-gpu; then
    # The others see no GPU, as in CI: once the simulated one is registered, torch gives it preference in that process.
    # Left out are those that install packages, and this script's own.
    parallel=()
    if "$python" -c "import xdist" 2>/dev/null; then parallel=(-n 12 --dist loadfile); fi
    others=(-m "not needs_gpu" --ignore=tests/packaging/test_packaging.py --ignore=tests/benchmarks/test_gpu_benchmarks.py tests)
    if [ $simulated = 1 ]; then others=(tests/checkpoint/test_header.py tests/api/test_iterator.py); fi # the rest is run elsewhere
    step tests-no-gpu $((simulated ? 300 : 150)) env CUDA_VISIBLE_DEVICES= WEIGHTLOAD_REQUIRE_GPU=1 \
      "$python" -m pytest -q --maxfail=20 -p no:cacheprovider "${parallel[@]}" "${others[@]}"
  fi
fi
if [ $dry = 0 ] && wants sanitizer; then
  sanitizer=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer || true)
  if [ -n "$sanitizer" ]; then
    # Without torch's caching an access beyond a tensor is one beyond its allocation, which memcheck can see.
    step sanitizer 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool memcheck --error-exitcode 9 \
      "$python" benchmarks/loaders/worker.py weightload --device "$device" "$dir"/tiny/*.safetensors
  else
    note sanitizer "skipped: compute-sanitizer is not installed"
  fi
fi

if [ $dry = 1 ]; then
  step limits 30 "$python" benchmarks/gpu/limits.py --device cpu --dir "$dir" --size-gb 0.01 --repeats 1 --threads 2 \
    --json "$out/limits.json"
  ranks 100 "$dir/tiny" --ranks 2 --repeats 1
  benchmark tiny 60 "$dir/tiny" "tiny" --repeats 1 --loaders "safetensors,weightload,instanttensor"
elif [ $simulated = 1 ]; then
  if wants limits; then
    step limits 120 "$python" benchmarks/gpu/limits.py --device "$device" --dir "$dir" --size-gb 0.01 --repeats 1 \
      --threads 2 --json "$out/limits.json"
  fi
  if wants settings; then
    step settings 200 "$python" benchmarks/gpu/settings.py --model-path "$dir/llama" --rounds 1 --json "$out/settings.json"
  fi
  if wants ranks; then ranks 300 "$dir/ranks" --ranks 2 --repeats 1; fi
  if wants llama; then benchmark llama 600 "$dir/llama" "tiny" --repeats 1 --cold --sweep; fi
  if wants moe; then benchmark moe 600 "$dir/moe" "tiny" --repeats 1 --cold; fi
else
  if wants limits; then
    step limits 45 "$python" benchmarks/gpu/limits.py --device "$device" --dir "$dir" --json "$out/limits.json"
  fi
  if wants settings; then
    step settings 60 "$python" benchmarks/gpu/settings.py --model-path "$dir/llama" --budget 40 --json "$out/settings.json"
    cat "$out/settings.log" || true # it did not run, if there was no time left
  fi
  if wants ranks; then
    share=$(left)
    if wants llama || wants moe; then share=$((share * 45 / 100)); fi
    ranks "$(least 240 "$share")" "$dir/ranks"
  fi
  if wants sharded; then
    step sharded 70 "$python" benchmarks/sharded_loads.py --model-path "$dir/ranks" --device "$device" --states warm \
      --plans fsdp2 tp2 --ways DCP get_slice --rounds 5 --json "$out/sharded.json"
    cat "$out/sharded.log" || true
  fi
  if wants frameworks; then
    for name in transformers diffusers accelerate; do
      if ! "$python" -c "import $name" 2>/dev/null; then note "$name" "skipped: not installed"; continue; fi
      step "frameworks-$name" 90 "$python" benchmarks/framework_loads.py --frameworks $name --device "$device" --gigabytes 6 \
        --states warm --memories "as it comes" --rounds 6 --ahead 12 --folder "$dir/models" --json "$out/frameworks-$name.json"
      cat "$out/frameworks-$name.log" || true
    done
  fi
  share=$(left)
  if wants moe; then share=$((share * 62 / 100)); fi
  if wants llama; then benchmark llama "$share" "$dir/llama" "Llama-3-8B" --cold --sweep; fi
  if wants moe; then benchmark moe "$(left)" "$dir/moe" "Qwen3-30B-A3B, narrow" --cold; fi
fi

printf '\n%s, %d s, results in %s\n' "$(date -u +%FT%TZ)" "$SECONDS" "$out"
printf '  %s\n' "${outcomes[@]}"
shopt -s nullglob
results=("$out"/limits.json "$out"/ranks.json "$out"/llama.json "$out"/moe.json "$out"/tiny.json)
found=()
for file in "${results[@]}"; do if [ -e "$file" ]; then found+=("$file"); fi; done
if [ $simulated = 1 ]; then
  rm -f "${found[@]}" "$out"/*.png "$out"/settings.*
  echo "No figures: the device is simulated (tests/simulated_cuda), memory of the host behind threads that are late at"
  echo "random. What ran shows that the steps work, and says nothing of speed."
elif [ ${#found[@]} -gt 0 ]; then
  "$python" benchmarks/gpu/report.py --short "${found[@]}"
fi
exit $failed
