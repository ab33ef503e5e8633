#!/usr/bin/env bash
# Ten minutes on one H200, in the order of what they are worth: do the kernels compute what they
# should, how fast are they, and how fast do full models train?
#
#     benchmarks/first_contact.sh [--smoke] [--wheels FOLDER] [--out FOLDER]
#
# --wheels   packages to install without a network, see benchmarks/first_contact_wheels.txt; they
#            and what compilers keep go to a folder of the local disk, not to the Python in use
# --out      where log.txt, summary.txt and pictures go (build/first_contact)
# --smoke    rehearse every stage in miniature, on any machine; its figures mean nothing
#
# Each stage ends at its limit, and none stops the next. Exit status: 0 if all stages had it, else 1.
# From the environment: PYTHON, the interpreter (python3); FIRST_CONTACT_ONLY, names of stages to run
# instead of those of the ten minutes; FIRST_CONTACT_LIMIT, seconds for each stage instead of its own.
# shellcheck disable=SC2329  # a stage's functions are exported, and called by its own shell
set -uo pipefail

table="
setup        15 wheels, versions, hardware
parity       70 kernels, attention and cross entropy against their definitions; caches warmed
ops          45 M2RNN and ParaRNN, forward and backward, against floors and the sequential loop
transformer  35 training step of the 1B transformer
m2rnn        40 training step of the 1B M2RNN hybrid
gdn          40 training step of the 1B Gated DeltaNet hybrid
tiles        60 M2RNN's backward pass and ParaRNN in other tiles
other_ops    60 delta rule, linear attention, attention, classical cells, at 1B
fla          40 flash-linear-attention's kernels against our definitions
published    30 M2RNN against the traffic of the published kernel
counters     30 hardware counters of M2RNN's and ParaGRU's forward kernels
small        60 training steps of the 410M transformer and M2RNN hybrid
profile      40 a picture of one training step of the 1B transformer
"
# Not within the ten minutes: run when named.
further="
one_m2rnn    90 training step of the 1B hybrid with one M2RNN layer, and without
long         90 training steps of the 1B transformer and Gated DeltaNet hybrid at 16k tokens
"

refuse() {
  echo "error: $1" >&2
  exit 2
}

smoke='' wheels='' out=build/first_contact command="$0 $*"
while (($#)); do
  case $1 in
    --smoke) smoke=--smoke ;;
    --wheels | --out)
      (($# > 1)) || refuse "$1 names no folder"
      [[ $1 == --out ]] && out=$2 || wheels=$2
      shift
      ;;
    *) refuse "'$1' is unknown, expected --smoke, --wheels FOLDER or --out FOLDER" ;;
  esac
  shift
done
if [[ -n $wheels ]]; then
  [[ -d $wheels ]] || refuse "--wheels is '$wheels', expected a folder"
  wheels=$(realpath "$wheels")
fi
mkdir -p "$out" || refuse "--out is '$out', expected a folder that can be written to"
out=$(realpath "$out")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

# Of this user alone: packages and compiled kernels that are found here are run.
local_disk=${TMPDIR:-/tmp}/first-contact-$(id -u)
[[ -e $local_disk ]] || (umask 077 && mkdir -p "$local_disk")
[[ -d $local_disk && ! -L $local_disk && -O $local_disk ]] ||
  refuse "$local_disk is another user's, expected a folder of one's own"
outputs=$(mktemp -d "$local_disk/outputs.XXXXXX") || exit 2
trap 'rm -rf "$outputs"' EXIT
python=${PYTHON:-python3}
export smoke wheels out python local_disk outputs
export PYTHONPATH="$local_disk/packages:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=$local_disk/triton TORCHINDUCTOR_CACHE_DIR=$local_disk/inductor
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True} HF_HUB_OFFLINE=1
if [[ -n $smoke ]]; then
  # As in the tests: without a GPU, kernels are interpreted.
  export TRITON_INTERPRET=1 FLA_DISABLE_BACKEND_DISPATCH=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
fi

# What the stages share. Where an argument has two forms, the second is the rehearsal's.
either() { if [[ -z $smoke ]]; then echo "$1"; else echo "$2"; fi; }

tests() { # processes, a selection for rehearsals, files
  local workers selection=()
  workers=$(either "$1" 2)
  [[ -z $smoke ]] || selection=(-k "$2")
  "$python" -m pytest -p benchmarks.few_configurations -p no:cacheprovider -q --tb=short \
    -n "$workers" --durations 5 "${selection[@]}" "${@:3}"
}

ops() {
  "$python" -m benchmarks.few_configurations benchmarks.ops_gpu ${smoke:+"$smoke"} "$@"
}

train() { # seconds, arguments; the process group is named, so that NCCL needs no store of its own
  timeout --foreground "$1" env RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 \
    MASTER_PORT=$((20000 + RANDOM % 10000)) "$python" -m benchmarks.few_configurations \
    benchmarks.train_gpu ${smoke:+"$smoke"} "${@:2}"
}

gdn_tokens() { # at least: of a micro-batch, fewer than usual where the fast kernels cannot train
  local tokens
  tokens=$(cat "$outputs/gdn-tokens" 2>/dev/null || echo 8192)
  echo $((tokens > $1 ? tokens : $1))
}

gdn() { # seconds, steps, tokens, models, other arguments
  local tokens=(--tokens "$3") models
  [[ -z $smoke ]] || tokens=()
  read -ra models <<<"$4"
  train "$1" --steps "$2" --sizes 1b --only "${models[@]}" "${tokens[@]}" "${@:5}"
}

stage_setup() {
  if [[ -n $wheels ]]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade \
      --find-links "$wheels" --target "$local_disk/packages" \
      --requirement benchmarks/first_contact_wheels.txt || return
  fi
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv
  fi
  "$python" -m benchmarks.first_contact versions "$outputs"
}

stage_parity() { # limit
  local status warming=()
  if [[ -z $smoke ]]; then
    # Fills the caches of compiled kernels; its times are not those of a quiet card.
    train $(($1 - 5)) --steps 1 --sizes 1b --only transformer m2rnn-hybrid > >(as_warming) 2>&1 &
    warming+=($!)
    gdn $(($1 - 5)) 1 "$(gdn_tokens 4096)" gdn-hybrid-3to1 > >(as_warming) 2>&1 &
    warming+=($!)
  fi
  tests 8 'bf16 or bfloat16' tests/pretrain/ops/test_{kernels,kernel_variants,para_rnn_kernels,newton}.py \
    tests/pretrain/ops/test_{attention,linear_cross_entropy,float8}.py
  status=$?
  ((${#warming[@]} == 0)) || wait "${warming[@]}"
  return "$status"
}

stage_ops() {
  ops --parts ops loop --only m2rnn "$(either para 'para_gru, steps')" --sizes 410M \
    --lengths 4096 --longest-loop 12
}

stage_transformer() { train "$1" --steps 5 --sizes 1b --only transformer; }

stage_m2rnn() { train "$1" --steps 5 --sizes 1b --only m2rnn-hybrid; }

stage_gdn() {
  local tokens beside=''
  tokens=$(gdn_tokens 4096)
  # Speeds are compared at as many tokens; the transformer's at 32,768 is known.
  ((tokens == 32768)) || beside=transformer
  gdn "$1" 3 "$tokens" "$beside gdn-hybrid-3to1"
}

stage_tiles() { ops --parts tiles --only m2rnn "$(either para 'para_gru, shooting')"; }

stage_other_ops() {
  ops --parts ops --only delta linear attention "$(either rnn 'gru D=64')" --sizes 1B --lengths 4096
}

stage_fla() { tests 8 'does_not_take or rows_need' tests/pretrain/ops/test_fla{,_dispatch}.py; }

stage_published() { ops --parts published --only m2rnn; }

stage_counters() {
  local program=("$python" -m benchmarks.profiled_kernels ${smoke:+"$smoke"})
  if ! command -v ncu >/dev/null; then
    echo "ncu is not installed: no counters are read"
    [[ -z $smoke ]] || "${program[@]}"
    return
  fi
  ncu --clock-control none --kernel-name regex:forward_kernel --section SpeedOfLight \
    --section LaunchStats --section Occupancy --section SchedulerStats --section WarpStateStats \
    --section InstructionStats "${program[@]}"
}

stage_small() { train "$1" --steps 5 --sizes 410m --only transformer m2rnn-hybrid; }

stage_profile() { train "$1" --steps 1 --sizes 1b --only transformer --profile "$out"; }

stage_one_m2rnn() {
  gdn "$1" 5 "$(gdn_tokens 4096)" "gdn-hybrid-7to1 gdn-hybrid-one-m2rnn"
}

stage_long() {
  gdn "$1" 5 "$(gdn_tokens 16384)" "transformer gdn-hybrid-3to1" --lengths 16384
}

as_warming() { sed --unbuffered 's/^/warming: /'; }

mapfile -t functions < <(compgen -A function)
export -f "${functions[@]}" # a stage is called in a shell of its own, which can be ended

# Which stages run, and how long each may take.
declare -A limits whats
order=()
known=()
while read -r name limit what; do
  [[ -n $name ]] || continue
  known+=("$name")
  [[ -z $smoke ]] || limit=600
  limits[$name]=${FIRST_CONTACT_LIMIT:-$limit} whats[$name]=$what
  if [[ -z ${FIRST_CONTACT_ONLY:-} ]]; then
    [[ $table != *$'\n'"$name "* ]] || order+=("$name")
  elif [[ $name == setup || " $FIRST_CONTACT_ONLY " == *" $name "* ]]; then
    order+=("$name") # the others need what setup installs
  fi
done <<<"$table$further"
for name in ${FIRST_CONTACT_ONLY:-}; do
  [[ -n ${limits[$name]:-} ]] ||
    refuse "FIRST_CONTACT_ONLY names '$name', expected some of ${known[*]}"
done
budget=0
for name in "${order[@]}"; do budget=$((budget + limits[$name])); done

say() { echo "$*" | tee -a "$out/log.txt"; }

interrupt() {
  [[ -z ${running:-} ]] || kill "$running" 2>/dev/null
  say "interrupted"
  exit 130
}
trap interrupt INT TERM

: >"$out/log.txt"
say "$ $command"
say "$(date --utc '+%Y-%m-%d %H:%M:%S') UTC, $(uname -n), ${#order[@]} stages, at most $budget s"
summary=$(printf '%-12s %7s %9s %6s' stage 'limit s' 'seconds' 'status')
failed=0
for name in "${order[@]}"; do
  limit=${limits[$name]} output=$outputs/$name.txt
  say "" && say "== $name (at most $limit s): ${whats[$name]}"
  : >"$output"
  begin=${EPOCHREALTIME/[.,]/}
  # Followed rather than piped: processes that outlive a stage would keep a pipe open.
  timeout --kill-after=5 "$limit" bash -c "stage_$name $limit" >"$output" 2>&1 </dev/null &
  running=$!
  tail --lines=+1 --follow --sleep-interval=0.2 --pid="$running" "$output" |
    tee -a "$out/log.txt" &
  wait "$running"
  status=$?
  took=$(((${EPOCHREALTIME/[.,]/} - begin) / 1000))
  running=''
  wait
  ((status == 0)) || failed=1
  note=''
  ((status == 124 || status == 137)) && note=' over its limit'
  printf -v row '%-12s %7d %7d.%d %6d%s' "$name" "$limit" $((took / 1000)) $((took % 1000 / 100)) \
    "$status" "$note"
  summary+=$'\n'$row
done

{
  echo "$summary"
  echo
  [[ -z $smoke ]] || echo "a rehearsal: what was measured means nothing"
  "$python" -m benchmarks.first_contact targets "$outputs"
} >"$out/summary.txt"
say "" && say "== summary"
tee -a "$out/log.txt" <"$out/summary.txt"
exit $failed
