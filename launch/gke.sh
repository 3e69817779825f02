#!/usr/bin/env bash
# A run on GKE as a JobSet (launch/gke_jobset.yaml), or through xpk. docs/launching/gke.md
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/gke.sh VERB NAME [options] [-- ARGUMENTS of launch.run]

VERB      image           builds launch/Dockerfile and pushes it as --image
          manifest        prints the JobSet
          run             applies the JobSet to the cluster of kubectl's current context
          xpk             hands the same job to xpk, which makes a JobSet of its own; needs --cluster
          logs            shows the output of process 0
          stop            deletes the JobSet: the pods save, and the same `run` goes on from there
options   --image=IMAGE         in a registry that the cluster reads
          --topology=v6e:8x8    of one slice; also v4, v5e, v5p, tpu7x
          --slices=1            node pools of that topology
          --bucket=BUCKET       mounted at /bucket, for --config.workdir=/bucket/runs/NAME
          --service_account=default   of Kubernetes, with access to the bucket
          --namespace=default
          --restarts=20         how often the job starts again after a failure or a preemption
          --spot                only on spot nodes
          --cluster=C, --zone=Z, --project=P   for xpk
          --dry_run             prints the commands instead, and the manifest
TEXT
}

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/show.sh"

verb=${1:-} name=${2:-}
if [[ $verb == --help ]]; then
  usage
  exit 0
fi
if [[ ! $verb =~ ^(image|manifest|run|xpk|logs|stop)$ || ! $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]]; then
  usage >&2
  exit 2
fi
shift 2
image='' topology='' slices=1 bucket='' service_account=default namespace=default restarts=20 spot='' dry_run=no
cluster='' where=()
while (($#)); do
  case $1 in
    --image=?*) image=${1#*=} ;;
    --topology=?*) topology=${1#*=} ;;
    --slices=?*) slices=${1#*=} ;;
    --bucket=?*) bucket=${1#*=} ;;
    --service_account=?*) service_account=${1#*=} ;;
    --namespace=?*) namespace=${1#*=} ;;
    --restarts=?*) restarts=${1#*=} ;;
    --spot) spot='cloud.google.com/gke-spot: "true"' ;;
    --cluster=?*) cluster=${1#*=} ;;
    --zone=?* | --project=?*) where+=("$1") ;;
    --dry_run) dry_run=yes ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown option '$1'; arguments of launch.run go after --." ;;
  esac
  shift
done
[[ $slices =~ ^[1-9][0-9]*$ && $restarts =~ ^[0-9]+$ ]] || fail "--slices and --restarts are numbers, got '$slices' and '$restarts'."

# The accelerator's names and the chips of one machine: cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
slice() {
  [[ $topology =~ ^(v4|v5e|v5p|v6e|tpu7x):([0-9]+(x[0-9]+)+)$ ]] || fail "--topology is a chip and a shape, such as v6e:8x8; got '$topology'."
  local chip=${BASH_REMATCH[1]}
  shape=${BASH_REMATCH[2]}
  local chips=$((${shape//x/*}))
  case $chip in
    v4) accelerator=tpu-v4-podslice type=v4-$((2 * chips)) ;;
    v5e) accelerator=tpu-v5-lite-podslice type=v5litepod-$chips ;;
    v5p) accelerator=tpu-v5p-slice type=v5p-$((2 * chips)) ;;
    v6e) accelerator=tpu-v6e-slice type=v6e-$chips ;;
    tpu7x) accelerator=tpu7x type=tpu7x-$((2 * chips)) ;;
  esac
  per_host=$((chips < 4 ? chips : 4))
  if [[ $chip =~ ^v(5|6)e$ ]] && ((chips == 8)); then per_host=8; fi
  hosts=$((chips / per_host))
}

# A YAML string, which is a JSON string.
text() {
  local value=${1//\\/\\\\}
  printf '"%s"' "${value//\"/\\\"}"
}

# shellcheck disable=SC2016 # names in ${} are the template's
manifest() {
  local word arguments='' line
  for word in "${arguments_of_run[@]}"; do arguments+="${arguments:+, }$(text "$word")"; done
  while IFS= read -r line; do
    line=${line//'${NAME}'/$name}
    line=${line//'${NAMESPACE}'/$namespace}
    line=${line//'${RESTARTS}'/$restarts}
    line=${line//'${SLICES}'/$slices}
    line=${line//'${HOSTS}'/$hosts}
    line=${line//'${SERVICE_ACCOUNT}'/$service_account}
    line=${line//'${ACCELERATOR}'/$accelerator}
    line=${line//'${TOPOLOGY}'/$shape}
    line=${line//'${IMAGE}'/$image}
    line=${line//'${CHIPS}'/$per_host}
    line=${line//'${BUCKET}'/$bucket}
    line=${line//'${SPOT}'/$spot}
    line=${line//'${ARGUMENTS}'/"[$arguments]"}
    [[ $line =~ ^[[:space:]]*$ || $line == '#'* ]] || printf '%s\n' "$line"
  done < "$(dirname "$0")/gke_jobset.yaml"
}

case $verb in
  image | manifest | run | xpk) [[ -n $image ]] || fail "--image=IMAGE is missing, for example --image=us-docker.pkg.dev/PROJECT/REPO/gemma4:1." ;;
esac
case $verb in
  manifest | run | xpk)
    slice
    [[ " $* " == *" --config="* ]] || fail "nothing to run: add -- --config=configs/NAME.py and its options."
    ((slices == 1)) || set -- "$@" "--config.mesh.slices=$slices"
    arguments_of_run=("$@")
    ;;
esac
case $verb in
  manifest | run) [[ -n $bucket ]] || fail "--bucket=BUCKET is missing; checkpoints of several machines need a place they share." ;;
  xpk) [[ -n $cluster ]] || fail "--cluster=CLUSTER is missing." ;;
esac

case $verb in
  image)
    run docker build -f "$(dirname "$0")/Dockerfile" -t "$image" "$(dirname "$0")/.."
    run docker push "$image"
    ;;
  manifest) manifest ;;
  run)
    if [[ $dry_run == yes ]]; then
      run kubectl apply -f -
      manifest
    else
      manifest | kubectl apply -f -
    fi
    ;;
  xpk)
    run xpk workload create --cluster="$cluster" ${where[@]+"${where[@]}"} --workload="$name" --tpu-type="$type" \
      --num-slices="$slices" --docker-image="$image" --command="python -m launch.run $(words "${arguments_of_run[@]}")"
    ;;
  logs)
    run kubectl logs --namespace="$namespace" --follow \
      --selector="jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    ;;
  stop) run kubectl delete jobset "$name" --namespace="$namespace" ;;
esac
