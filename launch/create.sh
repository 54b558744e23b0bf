#!/usr/bin/env bash
# Requests a TPU.
#
#   launch/create.sh [--env FILE] [--dry-run]
#
# Name, type, zone, capacity and further create flags come from launch/env. The capacities on-demand
# and spot fail at once when the zone is full; queued and queued-spot wait their turn (the request
# returns immediately, supervise.sh waits for the machine).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_flags "$@"
no_more_args
load_env TPU_NAME TPU_TYPE RUNTIME_VERSION

case $CAPACITY in
  on-demand | spot) command=(gcloud compute tpus tpu-vm create "$TPU_NAME") ;;
  queued | queued-spot)
    command=(gcloud compute tpus queued-resources create "$TPU_NAME" "--node-id=$TPU_NAME")
    ;;
  *) die "capacity ${CAPACITY@Q}: choose on-demand, spot, queued or queued-spot" ;;
esac
command+=("--project=$PROJECT" "--zone=$ZONE" "--accelerator-type=$TPU_TYPE")
if [[ $CAPACITY == queued* ]]; then
  command+=("--runtime-version=$RUNTIME_VERSION")
else
  command+=("--version=$RUNTIME_VERSION")
fi
if [[ $CAPACITY == *spot ]]; then
  command+=(--spot)
fi
run "${command[@]}" --quiet "${CREATE_ARGS[@]}"
