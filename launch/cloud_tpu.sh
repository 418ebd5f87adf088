#!/bin/bash
# Trains on a slice of Cloud TPUs, and goes on after errors that pass. On the machine with gcloud:
#
#   export TPU=sam ZONE=us-west4-a
#   launch/cloud_tpu.sh create v5litepod-64 v2-alpha-tpuv5-lite  # type and runtime of the slice
#   launch/cloud_tpu.sh install https://HOST/sam_jax.git         # this repository
#   launch/cloud_tpu.sh train --config 'configs/sam_vit_b.py:gs://BUCKET/sa1b/*.tar' \
#     --workdir /shared/runs/vit_b
#
# What follows "train" is train.py's. WORKDIR must be on a file system that all hosts share. A spot
# slice that was taken away is created again; then install and train as before, and the run goes on.
# GCLOUD is another program in gcloud's place, as "echo gcloud", which shows what would be done.
set -euo pipefail

# A run that comes to nothing again and again is not started for ever.
readonly most_restarts=${MOST_RESTARTS:-100}
readonly folder=sam_jax

gcloud_tpu() {
  # shellcheck disable=SC2086 # it may have arguments
  ${GCLOUD:-gcloud} compute tpus "$@"
}

# All hosts of the slice run the same command.
on_all_hosts() {
  gcloud_tpu tpu-vm ssh "${TPU:?name of the slice}" --zone="${ZONE:?zone of the slice}" \
    --worker=all --command="$1"
}

# Train.py on one host, again after the codes after which the same command may be started again
# (docs/runs.md): 75 of train.py, 134 of JAX's service when it lost a host, 137 and 143 of a process
# that was killed.
train_here() {
  local code start
  for ((start = 0; start <= most_restarts; start++)); do
    code=0
    "${PYTHON:-.venv/bin/python}" train.py --distributed "$@" || code=$?
    echo "train.py ended with $code"
    if [[ ! $code =~ ^(75|134|137|143)$ ]]; then
      return "$code"
    fi
    sleep "${WAIT_SECONDS:-30}" # the others end within a minute, and are started again as well
  done
  return "$code"
}

case "${1:-}" in
create)
  gcloud_tpu queued-resources create "${TPU:?name of the slice}" --node-id="$TPU" \
    --zone="${ZONE:?zone of the slice}" --accelerator-type="${2:?type of the slice}" \
    --runtime-version="${3:?its runtime}" --spot
  ;;
install)
  address=$(printf %q "${2:?address of the repository}")
  clone="{ [ -d $folder ] || git clone $address $folder; }"
  on_all_hosts "$clone && cd $folder && python3 -m venv .venv && .venv/bin/pip install -e '.[tpu,gs]'"
  ;;
train)
  shift
  # Quoted for the other shell, as patterns of tars are train.py's. The run outlives the connection,
  # which shows its log: Ctrl-C ends that alone.
  arguments=$(printf '%q ' "$@")
  run="MOST_RESTARTS=$most_restarts nohup launch/cloud_tpu.sh here $arguments"
  on_all_hosts "cd $folder && $run >>train.log 2>&1 </dev/null & sleep 1; tail -F $folder/train.log"
  ;;
here)
  shift
  train_here "$@"
  ;;
*)
  echo "usage: $0 create|install|train|here ..., see the first lines of this file" >&2
  exit 2
  ;;
esac
