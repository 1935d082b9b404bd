#!/usr/bin/env bash
# Runs a training command on a TPU VM (one host or a pod) and continues it after preemptions.
set -euo pipefail

usage() {
  cat <<'TEXT'
launch/tpu_pod.sh [options] NAME -- --config=FILE [--config.x=y] --workdir=gs://BUCKET/RUN

Creates the TPU VM NAME or takes the one that is there, copies and installs this checkout on all workers, starts
llada_jax.train on each, and follows the log of worker 0. A preempted TPU is deleted and created again, as often as it
takes, and the same command continues the run: hence a workdir in a bucket. A run that saved and stopped on SIGTERM is
continued too. Ctrl-C stops the following alone; call it again to go on.

  --type=TYPE       accelerator type, such as v5litepod-16, v5p-32, v6e-16 (default: v6e-16)
  --version=IMAGE   runtime version (default: that of the type)
  --zone=ZONE       (default: gcloud's own compute/zone)
  --project=ID      (default: gcloud's own)
  --spot            ask for a spot TPU
  --delete          delete the TPU when the run has ended well
  --print           show the commands, run none
  --help
TEXT
}

type=v6e-16 version='' where=() create=() delete=0 print=0 name=''
while (($#)); do
  case $1 in
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --zone=* | --project=*) where+=("$1") ;;
    --spot) create+=("$1") ;;
    --delete) delete=1 ;;
    --print) print=1 ;;
    --help) usage && exit 0 ;;
    --) shift && break ;;
    -*) echo "error: unknown option $1; see --help" >&2 && exit 2 ;;
    *) name=$1 ;;
  esac
  shift
done
if [[ -z $name || " $*" != *' --workdir=gs://'* || " $*" != *' --config='* ]]; then
  echo "error: give NAME -- --config=FILE --workdir=gs://BUCKET/RUN; see --help" >&2
  exit 2
fi
if [[ -z $version ]]; then
  case $type in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    v[234]-*) version=tpu-ubuntu2204-base ;;
    *) echo "error: no runtime version is known for --type=$type; give --version" >&2 && exit 2 ;;
  esac
fi

root=$(cd "$(dirname "$0")/.." && pwd)
archive=${TMPDIR:-/tmp}/llada_jax.tar.gz
run() {
  if ((print)); then printf '%q ' "$@" && echo; else "$@"; fi
}
tpu() { # VERB [ARGUMENT ...]
  run gcloud compute tpus tpu-vm "$1" "$name" ${where[@]+"${where[@]}"} "${@:2}"
}
state() { # prints READY, CREATING, PREEMPTED, ...; prints nothing if there is no such TPU
  ((print)) || tpu describe --format='value(state)' 2>/dev/null || true
}
pause() { # SECONDS LINE
  echo "$2" >&2
  sleep "$1"
}
install() {
  run tar -C "$root" -czf "$archive" setup.py README.md llada_jax configs &&
    run gcloud compute tpus tpu-vm scp "$archive" "$name:" ${where[@]+"${where[@]}"} --worker=all &&
    tpu ssh --worker=all --command="mkdir -p llada_jax && cd llada_jax && tar -xzf ../llada_jax.tar.gz &&
      python3 -m pip install --quiet --user uv && ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 .venv &&
      ~/.local/bin/uv pip install --quiet --python .venv -e '.[tpu,gcs]'"
}

# On each worker the run holds run.lock while it lives. If the lock is taken (status 9), we install
# and start nothing, and only follow the log.
idle='! test -e llada_jax/run.lock || flock -n -E 9 llada_jax/run.lock true'
train="rm -f status; .venv/bin/python -m llada_jax.train$(printf ' %q' "$@") >> train.log 2>&1; echo \$? > status"
start="cd llada_jax && (setsid nohup flock -n -o run.lock bash -c $(printf %q "$train") > /dev/null 2>&1 < /dev/null &)"
# shellcheck disable=SC2016 # expanded on the worker
follow='cd llada_jax && sleep 5 && (flock run.lock true & tail -n 40 -F --pid=$! train.log); exit $(cat status)'

# Not empty once the TPU has existed. From then on, a failure to create or start it means a lack of
# capacity, so we try again.
made=''
while true; do
  now=$(state)
  made+=$now
  case $now in
    READY) ;;
    CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING | STOPPING | DELETING)
      pause 20 "the TPU is $now: waiting"
      continue
      ;;
    STOPPED)
      tpu start || pause 60 'it could not be started: trying again'
      continue
      ;;
    PREEMPTED | TERMINATED)
      tpu delete --quiet || pause 20 'it could not be deleted: trying again'
      continue
      ;;
    '')
      if ! tpu create --accelerator-type="$type" --version="$version" ${create[@]+"${create[@]}"}; then
        [[ $made ]] || { echo "error: the TPU $name could not be created, see above" >&2 && exit 1; }
        pause 60 'it could not be created: trying again'
        continue
      fi
      ;;
    *) echo "error: the TPU $name is $now: delete it, or give another NAME" >&2 && exit 1 ;;
  esac
  made=yes status=0
  ((print)) || tpu ssh --worker=all --command="$idle" || status=$?
  if ((status == 0)); then
    { install && tpu ssh --worker=all --command="$start"; } || status=$?
  fi
  if ((status == 0 || status == 9)); then
    status=0
    tpu ssh --worker=0 --command="$follow" || status=$?
  fi
  if ((status == 0)); then
    ((!delete)) || tpu delete --quiet
    ((!print)) || echo '# after a preemption: delete, and all of it again'
    exit 0
  fi
  now=$(state)
  # Status 143: the run saved and stopped on SIGTERM, as before maintenance.
  # Status 255: ssh lost the connection, but the run goes on.
  if [[ $now == READY && $status != 143 && $status != 255 ]]; then
    echo "error: it ended with status $status; the log of a run is on every worker, llada_jax/train.log" >&2
    exit "$status"
  fi
  pause 20 "status $status, the TPU is ${now:-gone}: going on"
done
