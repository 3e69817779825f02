#!/usr/bin/env bash
# From nothing to a training run on TPU VMs, and back. tpu_vm.sh, pod_slice.sh and multislice.sh call it with the kind of slice.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/KIND.sh VERB NAME --zone=ZONE --topology=v6e:8x8 [options] [-- ARGUMENTS of launch.run]

KIND      tpu_vm       one machine:       v6e:1x1 v6e:2x2 v6e:2x4, v5e:1x1 v5e:2x2 v5e:2x4, v5p:2x2x1, v4:2x2x1
          pod_slice    several machines:  v6e:4x4 and larger, v5e:4x4 and larger, v5p:2x2x2 and larger
          multislice   --slices=N of them, joined by the data center network
VERB      create       asks for the slice and waits until it is there
          setup        copies this project to every machine and installs it; again after every change
          run          starts `python -m launch.run ARGUMENTS` on every machine, detached
          logs         shows the output of process 0 until the run ends
          stop         tells the run to save and end (SIGTERM, exit code 75); the same `run` goes on from there
          delete       gives the slice back
          all          create, setup, run, logs
options   --project=P  of Google Cloud; otherwise that of `gcloud config`
          --spot       cheaper, and may be taken away
          --slices=N   for multislice
          --bucket=B   setup mounts this bucket at ~/bucket on every machine, for --config.workdir=../bucket/runs/NAME
          --dry_run    prints the commands instead
TEXT
}

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/show.sh"

kind=${1:-} verb=${2:-} name=${3:-}
[[ $kind =~ ^(vm|pod|multislice)$ ]] || fail "tpu.sh is called by tpu_vm.sh, pod_slice.sh and multislice.sh."
if [[ $verb == --help ]]; then
  usage
  exit 0
fi
if [[ ! $verb =~ ^(create|setup|run|logs|stop|delete|all)$ || ! $name =~ ^[a-z][-a-z0-9]*$ ]]; then
  usage >&2
  exit 2
fi
shift 3
zone='' topology='' project='' slices=1 bucket='' dry_run=no
spot=()
while (($#)); do
  case $1 in
    --zone=?*) zone=${1#*=} ;;
    --topology=?*) topology=${1#*=} ;;
    --project=?*) project=${1#*=} ;;
    --slices=?*) slices=${1#*=} ;;
    --bucket=?*) bucket=${1#*=} ;;
    --spot) spot=(--spot) ;;
    --dry_run) dry_run=yes ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown option '$1'; arguments of launch.run go after --." ;;
  esac
  shift
done
[[ $bucket =~ ^[a-z0-9._-]*$ ]] || fail "--bucket is the name of a bucket, without gs://; got '$bucket'."
[[ -n $zone ]] || fail "--zone=ZONE is missing, for example --zone=us-east5-b."
[[ $topology =~ ^(v4|v5e|v5p|v6e|tpu7x):([0-9]+(x[0-9]+)+)$ ]] || fail "--topology is a chip and a shape, such as v6e:8x8; got '$topology'."
chip=${BASH_REMATCH[1]} shape=${BASH_REMATCH[2]}
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices is a number, got '$slices'."
chips=$((${shape//x/*}))

# v4 and v5p are named after cores, two a chip. Software versions: docs.cloud.google.com/tpu/docs/runtimes
hosts=$(((chips + 3) / 4))
case $chip in
  v4) type=v4-$((2 * chips)) version=tpu-ubuntu2204-base ;;
  v5p) type=v5p-$((2 * chips)) version=v2-alpha-tpuv5 ;;
  v5e) type=v5litepod-$chips version=v2-alpha-tpuv5-lite ;;
  v6e) type=v6e-$chips version=v2-alpha-tpuv6e ;;
  tpu7x) fail "tpu7x is rented through GKE only: use launch/gke.sh." ;;
esac
if [[ $chip =~ ^v(5|6)e$ ]] && ((chips <= 8)); then hosts=1; fi  # eight of these fit one machine

case $kind in
  vm) ((hosts == 1)) || fail "$topology is $hosts machines; use launch/pod_slice.sh." ;;
  pod) ((hosts > 1)) || fail "$topology is one machine; use launch/tpu_vm.sh." ;;
  multislice) ((slices > 1)) || fail "multislice needs --slices=2 or more; one slice is launch/pod_slice.sh." ;;
esac
[[ $kind == multislice ]] || ((slices == 1)) || fail "--slices=$slices is for launch/multislice.sh."
if [[ $verb =~ ^(run|all)$ && ! " $* " == *" --config="* ]]; then
  fail "nothing to run: add -- --config=configs/NAME.py and its options."
fi

where=(--zone="$zone")
[[ -z $project ]] || where+=(--project="$project")
nodes=("$name")
if [[ $kind == multislice ]]; then
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
  set -- "$@" "--config.mesh.slices=$slices"
fi

# Runs one shell command on every machine of every slice, the slices at the same time.
everywhere() {
  local node pids=() pid
  for node in "${nodes[@]}"; do
    if [[ $dry_run == yes ]]; then
      run gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all --command="$1"
    else
      gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all --command="$1" &
      pids+=($!)
    fi
  done
  for pid in ${pids[@]+"${pids[@]}"}; do wait "$pid"; done
}

create() {
  if [[ $kind == vm ]]; then
    run gcloud compute tpus tpu-vm create "$name" "${where[@]}" --accelerator-type="$type" --version="$version" ${spot[@]+"${spot[@]}"}
    return
  fi
  local parts=(--node-id="$name")
  [[ $kind != multislice ]] || parts=(--node-count="$slices" --node-prefix="$name")
  run gcloud compute tpus queued-resources create "$name" "${where[@]}" "${parts[@]}" \
    --accelerator-type="$type" --runtime-version="$version" ${spot[@]+"${spot[@]}"}
  local state=(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)') found=
  if [[ $dry_run == yes ]]; then
    run "${state[@]}"
    return
  fi
  until [[ $found == ACTIVE ]]; do
    found=$("${state[@]}")
    printf '%s\n' "$name: $found" >&2
    [[ $found != FAILED && $found != SUSPENDED ]] || fail "$name is $found; look at it with: ${state[*]%--format*}"
    [[ $found == ACTIVE ]] || sleep 30
  done
}

setup() {
  local archive=${TMPDIR:-/tmp}/gemma4_jax.tar.gz node command='bash gemma4_jax/launch/on_tpu_vm.sh install'
  run tar -C "$(cd "$(dirname "$0")/.." && pwd)" --exclude=./.git --exclude='./.venv*' --exclude=./runs --exclude=__pycache__ -czf "$archive" .
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm scp "$archive" "$node:gemma4_jax.tar.gz" "${where[@]}" --worker=all
  done
  everywhere "mkdir -p gemma4_jax && tar -xzf gemma4_jax.tar.gz -C gemma4_jax && $command${bucket:+ $bucket}"
}

logs() {
  run gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${where[@]}" --worker=0 --command='bash gemma4_jax/launch/on_tpu_vm.sh logs'
}

case $verb in
  create) create ;;
  setup) setup ;;
  run) everywhere "bash gemma4_jax/launch/on_tpu_vm.sh start $(words "$@")" ;;
  logs) logs ;;
  stop) everywhere 'bash gemma4_jax/launch/on_tpu_vm.sh stop' ;;
  delete)
    if [[ $kind == vm ]]; then
      run gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
    else
      run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
    fi
    ;;
  all)
    create
    setup
    everywhere "bash gemma4_jax/launch/on_tpu_vm.sh start $(words "$@")"
    logs
    ;;
esac
