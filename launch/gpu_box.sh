#!/usr/bin/env bash
# One machine with GPUs: one process over all of them, started again while it ends with 75 (told to end, saved) or 76 (stalled).
# docs/launching/gpu_box.md
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/gpu_box.sh [options] -- ARGUMENTS of launch.run

  --gpus=0,1,2,3   use only these
  --memory=0.92    share of a GPU's memory that JAX takes at the start
  --restarts=3     how often a run that ended by itself with 75 or 76 is started again; Ctrl-C and errors never are
  --python=PATH    instead of .venv/bin/python beside launch/, or python3
  --dry_run        prints the command instead
TEXT
}

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/show.sh"

cd "$(dirname "$0")/.."
gpus='' memory=0.92 restarts=3 dry_run=no python=python3
[[ ! -x .venv/bin/python ]] || python=.venv/bin/python
while (($#)); do
  case $1 in
    --gpus=?*) gpus=${1#*=} ;;
    --memory=?*) memory=${1#*=} ;;
    --restarts=?*) restarts=${1#*=} ;;
    --python=?*) python=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown option '$1'; arguments of launch.run go after --." ;;
  esac
  shift
done
[[ " $* " == *" --config="* ]] || fail "nothing to run: add -- --config=configs/NAME.py and its options."
[[ -z $gpus || $gpus =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "--gpus is a list of numbers, such as 0,1; got '$gpus'."
[[ $memory =~ ^0?\.[0-9]+$ ]] || fail "--memory is a share below 1, such as 0.92; got '$memory'."
[[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts is a number, got '$restarts'."

command=(env XLA_PYTHON_CLIENT_MEM_FRACTION="$memory")
[[ -z $gpus ]] || command+=(CUDA_VISIBLE_DEVICES="$gpus" ROCR_VISIBLE_DEVICES="$gpus")
command+=("$python" -m launch.run "$@")
if [[ $dry_run == yes ]]; then
  run "${command[@]}"
  exit 0
fi

told=no child=
trap 'told=yes; [[ -z $child ]] || kill -TERM "$child" 2> /dev/null || true' TERM
while true; do
  "${command[@]}" &
  child=$! code=0
  wait "$child" || code=$?
  while kill -0 "$child" 2> /dev/null; do  # the signal ended only the waiting; the run is saving
    code=0
    wait "$child" || code=$?
  done
  if [[ $told == yes || $restarts == 0 || ! $code =~ ^(75|76)$ ]]; then exit "$code"; fi
  restarts=$((restarts - 1))
  printf '%s\n' "launch: ended with $code; starting again, $restarts more times at most" >&2
done
