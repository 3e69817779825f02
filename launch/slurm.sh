#!/usr/bin/env bash
# Submits launch/slurm.sbatch with the sizes of your cluster. docs/launching/slurm.md
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/slurm.sh [options] -- ARGUMENTS of launch.run

  --nodes=2          machines
  --gpus=8           GPUs of each; one process runs on each
  --cpus=12          CPU cores of each process
  --time=24:00:00    of one turn; the run saves before, goes back into the queue and goes on
  --name=gemma4      of the job and its log
  --partition=P, --account=A, --qos=Q, --constraint=C   as sbatch has them
  --dry_run          prints what would be submitted, and what each turn would run
TEXT
}

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/show.sh"

nodes=2 gpus=8 cpus=12 time=24:00:00 name=gemma4 dry_run=no
more=()
while (($#)); do
  case $1 in
    --nodes=?*) nodes=${1#*=} ;;
    --gpus=?*) gpus=${1#*=} ;;
    --cpus=?*) cpus=${1#*=} ;;
    --time=?*) time=${1#*=} ;;
    --name=?*) name=${1#*=} ;;
    --partition=?* | --account=?* | --qos=?* | --constraint=?*) more+=("$1") ;;
    --dry_run) dry_run=yes ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown option '$1'; arguments of launch.run go after --." ;;
  esac
  shift
done
[[ " $* " == *" --config="* ]] || fail "nothing to run: add -- --config=configs/NAME.py and its options."
for size in "$nodes" "$gpus" "$cpus"; do
  [[ $size =~ ^[1-9][0-9]*$ ]] || fail "--nodes, --gpus and --cpus are numbers, got '$size'."
done

cd "$(dirname "$0")/.."
command=(sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" --cpus-per-task="$cpus"
  --time="$time" ${more[@]+"${more[@]}"} launch/slurm.sbatch "$@")
if [[ $dry_run == yes ]]; then
  run "${command[@]}"
  GEMMA4_DRY_RUN=yes bash launch/slurm.sbatch "$@"
  exit 0
fi
"${command[@]}"
