#!/usr/bin/env bash
# Starts (or resumes) a training run on all workers, detached, and returns.
#
#   launch/run.sh NAME [--config configs/ade.py] [--config.a.b=v ...] [--env FILE] [--dry-run]
#   launch/run.sh NAME --stop          asks the run to checkpoint and stop
#
# The workdir is gs://BUCKET/runs/NAME. Each worker logs to ~/segdiff_runs/NAME/log and copies that
# to gs://BUCKET/logs/NAME/worker-N-TIME.log every minute, so logs outlive the machine.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_flags "$@"
load_env TPU_NAME BUCKET
stop=0
kept=()
for arg in "${ARGS[@]}"; do
  if [[ $arg == --stop ]]; then stop=1; else kept+=("$arg"); fi
done
ARGS=("${kept[@]}")
parse_run

if ((stop)); then
  on_workers all stop "$NAME"
else
  training_command .venv/bin/python
  on_workers all start "$NAME" "gs://$BUCKET/logs/$NAME" "${COMMAND[@]}"
fi
