#!/usr/bin/env bash
# Runs a training command on a GKE cluster with XPK (https://github.com/AI-Hypercomputer/xpk).
set -euo pipefail

usage() {
  cat <<'TEXT'
launch/xpk.sh [options] --cluster=CLUSTER -- --config=FILE [--config.x=y] --workdir=gs://BUCKET/RUN

Submits llada_jax.train as one workload on every host of the slices, waits until it runs, and follows its log to the
end or the next restart. GKE queues it, starts it again after a preemption or a failed node (the same command continues
the run), and tells the hosts of each other. Ctrl-C stops the following alone.

  --cluster=NAME       cluster made by `xpk cluster create`
  --workload=NAME      (default: llada-jax-DATE)
  --type=TYPE          TPU of each slice, such as v5litepod-16, v5p-32, v6e-16 (default: v6e-16)
  --slices=N           (default: 1); mesh.data goes over the network between them
  --image=IMAGE        image with llada_jax installed; default: python:3.12, this checkout copied and installed in it
  --restarts=N         after which a run that keeps failing is given up (default: 50)
  --zone=ZONE          (default: gcloud's own)
  --project=ID         (default: gcloud's own)
  --print              show the commands, run none
  --help
TEXT
}

cluster='' workload="llada-jax-$(date +%m%d-%H%M%S)" type=v6e-16 slices=1 image='' restarts=50 where=() print=0
while (($#)); do
  case $1 in
    --cluster=*) cluster=${1#*=} ;;
    --workload=*) workload=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --zone=* | --project=*) where+=("$1") ;;
    --print) print=1 ;;
    --help) usage && exit 0 ;;
    --) shift && break ;;
    *) echo "error: unknown option $1; see --help" >&2 && exit 2 ;;
  esac
  shift
done
if [[ -z $cluster || " $*" != *' --workdir=gs://'* || " $*" != *' --config='* ]]; then
  echo "error: give --cluster=NAME -- --config=FILE --workdir=gs://BUCKET/RUN; see --help" >&2
  exit 2
fi

root=$(cd "$(dirname "$0")/.." && pwd)
run() {
  if ((print)); then printf '%q ' "$@" && echo; else "$@"; fi
}

train="exec python -m llada_jax.train$(printf ' %q' "$@")"
if [[ $image ]]; then
  source=(--docker-image="$image")
else
  source=(--base-docker-image=python:3.12 --script-dir="$root")
  train="pip install --quiet -e '.[tpu,gcs]' && $train"
fi
# A run that saved and stopped on SIGTERM ends with status 143. XPK restarts at this status.
run xpk workload create --cluster="$cluster" --workload="$workload" --tpu-type="$type" --num-slices="$slices" \
  --max-restarts="$restarts" --termination-grace-period-seconds=120 "${source[@]}" ${where[@]+"${where[@]}"} \
  --command="$train"
# Selects the first host of each slice. `kubectl wait` does not work here: pods that do not exist
# yet and pods that have already ended never satisfy it.
pods="jobset.sigs.k8s.io/jobset-name=$workload,batch.kubernetes.io/job-completion-index=0"
phases() { run kubectl get pods -l "$pods" -o 'jsonpath={.items[*].status.phase}'; }
if ((print)); then phases && echo '# again until none is Pending'; fi
until ((print)) || { phase=$(phases) && [[ $phase && $phase != *Pending* ]]; }; do
  echo "$workload: ${phase:-queued, no pod yet}" >&2
  sleep 20
done
run kubectl logs --follow --prefix --tail=-1 --max-log-requests="$slices" -l "$pods"
((print)) || echo "the log ended: $workload is done or starts again, see kubectl get jobset $workload" >&2
