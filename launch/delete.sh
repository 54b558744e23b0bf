#!/usr/bin/env bash
# Deletes the TPU, and its queued request if it has one. Nothing in the bucket is touched.
#
#   launch/delete.sh [--env FILE] [--dry-run]
#
# It asks no question: a run resumes from its last checkpoint on the next TPU.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_flags "$@"
no_more_args
load_env TPU_NAME

where=("$TPU_NAME" "--project=$PROJECT" "--zone=$ZONE" --quiet)
if [[ $CAPACITY == queued* ]]; then
  # --force takes the machine along with the request.
  run gcloud compute tpus queued-resources delete "${where[@]}" --force
else
  run gcloud compute tpus tpu-vm delete "${where[@]}"
fi
