#!/bin/bash
# The kernels on this machine's GPU: tests, then the whole benchmark.
#
#   experiments/benchmarks/gpu.sh                # under 8 minutes
#   OUT=dir TUNE=1 experiments/benchmarks/gpu.sh --budget_s=300
#   PLATFORM=cpu SMOKE=1 experiments/benchmarks/gpu.sh --budget_s=60
#
# Needs Python with JAX for CUDA and NumPy, no more; says what else is missing
# and goes on without. Each section is a process with a time limit; one that
# dies is started again, behind what killed it. Results are
# OUT/gpu_NAME.json and .png. Fails if a check did.
#
# OUT       folder of the results
# NAME      of the results; the GPU's
# PYTHON    interpreter
# SECTIONS  which to run, in order
# TUNE=1    first looks for block sizes, for a fifth of the time, and keeps them
# KEEP=1    goes on with results that are there
# PLATFORM  cuda, or cpu: XLA's implementations in place of the kernels
# SMOKE=1   tiny shapes

set -u
cd "$(dirname "$0")/../.." || exit 2
budget_s=455
for argument in "$@"; do
  case $argument in
    --budget_s=*) budget_s=${argument#*=} ;;
    *) echo "unknown argument $argument" >&2; exit 2 ;;
  esac
done
python=${PYTHON:-python3}
platform=${PLATFORM:-cuda}
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1)
name=${NAME:-$(echo "${gpu:-$platform}" | tr 'A-Z ' 'a-z_')}
out=${OUT:-experiments/benchmarks/results}
# Seconds of each section, to scale; what one leaves, the others get.
declare -A weight=(
  [tune]=100 [checks]=65 [peaks]=25 [attention]=110 [paged]=50 [grouped]=40
  [quantized]=35 [loss]=40 [norm]=20 [engine]=80 [pytest]=15 [sanitizer]=35
)
sections=${SECTIONS:-"checks peaks attention paged engine grouped quantized \
loss norm pytest sanitizer"}
[ "${TUNE:-0}" = 1 ] && sections="tune $sections"

# PyTorch measures in the same processes.
export XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=2
export PYTHONUNBUFFERED=1
if ! "$python" -c 'import jaxtyping' 2>/dev/null; then
  echo 'jaxtyping is missing, which the ops import: a stand-in checks nothing'
  export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD/experiments/benchmarks/stand_ins
fi

# Of a graph's kernels several may run at once: none, where one is timed.
in_order='--xla_gpu_enable_command_buffer='
# Tiny products of the tests are not worth a search for the fastest kernel.
untuned='--xla_gpu_autotune_level=0'
if ! JAX_PLATFORMS=cpu XLA_FLAGS="$in_order $untuned" timeout 60 "$python" -c \
  'import jax; jax.devices()' >/dev/null 2>&1; then
  echo "this JAX does not know $in_order and $untuned: without them"
  in_order='' untuned=''
fi
given_flags=${XLA_FLAGS:-}

run=("$python" -m experiments.benchmarks.gpu)
options=(--out="$out" --name="$name")
mkdir -p "$out"
if [ "${KEEP:-0}" != 1 ]; then rm -f "$out/gpu_$name.json"; fi
if ! timeout 120 "${run[@]}" machine "${options[@]}" --platform="$platform"
then
  echo "JAX finds no $platform device" >&2
  exit 2
fi

for section in $sections; do
  # What is left, by weight.
  left=$((budget_s - SECONDS)) sum=0 seen=0
  for other in $sections; do
    [ "$other" = "$section" ] && seen=1
    [ $seen = 1 ] && sum=$((sum + weight[$other]))
  done
  share=$((left * weight[$section] / sum))
  began=$SECONDS status=done
  case $section in
    checks) flags=$untuned ;;
    engine) flags='' ;;
    *) flags=$in_order ;;
  esac
  for attempt in 1 2 3 4 5 6; do
    seconds=$((share - (SECONDS - began)))
    if [ $seconds -lt 5 ]; then
      [ $attempt = 1 ] && status='no time'
      break
    fi
    if [ "$section" = tune ]; then
      # The platform; all that gpu.py is told by its own argument.
      command=(env JAX_PLATFORMS="${platform/cuda/cuda,cpu}" "$python" -m)
      command+=(experiments.benchmarks.tune_gpu "${options[@]}")
    else
      command=("${run[@]}" "$section" "${options[@]}" --platform="$platform")
      [ "${SMOKE:-0}" = 1 ] && command+=(--smoke)
    fi
    # A blank alone would be taken for the name of a file.
    XLA_FLAGS="$given_flags${given_flags:+ }$flags" timeout -k 5 $((seconds + 5)) \
      "${command[@]}" --budget_s="$seconds"
    rc=$?
    if [ $rc = 0 ]; then
      status=done
      break
    elif [ $((SECONDS - began)) -ge $share ]; then
      status='ran out of time'
      break
    fi
    status="failed with status $rc"
  done
  "${run[@]}" note "${options[@]}" --of="$section" --status="$status" \
    --seconds=$((SECONDS - began))
done

echo
"${run[@]}" report "${options[@]}"
rc=$?
echo "$out/gpu_$name.json, $SECONDS s"
exit $rc
