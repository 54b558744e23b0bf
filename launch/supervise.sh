#!/usr/bin/env bash
# Keeps a run going until it has finished: creates the TPU, sets it up, starts the run, looks every
# minute, restarts it after a crash, recreates the TPU after a preemption.
#
#   launch/supervise.sh NAME [--config configs/ade.py] [--config.a.b=v ...] [--delete]
#                            [--env FILE] [--dry-run]
#
#   --delete   delete the TPU when the run has finished or has failed for good
#
# Start it again at any time, from any machine: it takes up what it finds. Exit code 0: finished;
# 1: gave up (the log's end is shown); 2: bad input, here or in the run's config.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_flags "$@"
load_env TPU_NAME TPU_TYPE RUNTIME_VERSION BUCKET REPO REF
delete=0
kept=()
for arg in "${ARGS[@]}"; do
  if [[ $arg == --delete ]]; then delete=1; else kept+=("$arg"); fi
done
ARGS=("${kept[@]}")
parse_run
training_command .venv/bin/python
same=(--env "$ENV_FILE")
((!DRY_RUN)) || same+=(--dry-run)
failures=0        # crashes and failed starts in a row
create_failures=0 # refused create requests in a row
healthy=0         # looks in a row that saw every worker running
silent=0          # looks in a row that missed a worker

say() {
  printf '%s %s\n' "$(date -u +%H:%M:%S)" "$*" >&2
}

finish() { # EXIT_CODE
  ((!delete)) || bash "$LAUNCH_DIR/delete.sh" "${same[@]}" ||
    say "could not delete $TPU_NAME: it still costs money"
  ((delete)) || say "$TPU_NAME is still there and costs money: launch/delete.sh"
  exit "$1"
}

status_command() {
  # A new machine has no checkout yet: that is not an unreachable worker.
  ssh_command all "cd segdiff_jax 2>/dev/null && [ -f launch/on_worker.sh ] || \
{ echo segdiff-worker new absent; exit 0; }; bash launch/on_worker.sh $(quote status "$NAME" \
    "${COMMAND[@]}")"
}

DESCRIBE=(gcloud compute tpus tpu-vm describe "$TPU_NAME" "--project=$PROJECT" "--zone=$ZONE"
  '--format=value(state,networkEndpoints.len())')
DESCRIBE_REQUEST=(gcloud compute tpus queued-resources describe "$TPU_NAME" "--project=$PROJECT"
  "--zone=$ZONE" '--format=value(state.state)')

# Prints "STATE WORKERS". ABSENT only when the service says so: a network fault must not make
# anybody delete a TPU.
tpu_state() {
  local answer
  if answer=$("${DESCRIBE[@]}" 2>&1); then
    grep -E '^[A-Z_]+([[:space:]]+[0-9]+)?$' <<<"$answer" | tail -n 1 || echo UNKNOWN 0
  elif ! grep -qiE 'NOT_FOUND|not found' <<<"$answer"; then
    printf '%s\n' "$answer" >&2
    echo UNKNOWN 0
  elif [[ $CAPACITY != queued* ]]; then
    echo ABSENT 0
  elif answer=$("${DESCRIBE_REQUEST[@]}" 2>&1); then
    case $(tail -n 1 <<<"$answer") in
      SUSPENDED | FAILED) tail -n 1 <<<"$answer" ;;
      *) echo "QUEUED:$(tail -n 1 <<<"$answer") 0" ;;
    esac
  elif grep -qiE 'NOT_FOUND|not found' <<<"$answer"; then
    echo ABSENT 0
  else
    printf '%s\n' "$answer" >&2
    echo UNKNOWN 0
  fi
}

recreate() { # STATE
  if [[ $1 != ABSENT ]] && ! bash "$LAUNCH_DIR/delete.sh" "${same[@]}"; then
    say "delete failed; trying again"
    return
  fi
  if bash "$LAUNCH_DIR/create.sh" "${same[@]}"; then
    failures=0 create_failures=0
  elif ((++create_failures >= MAX_CREATE_FAILURES)); then
    say "giving up: $create_failures create requests were refused"
    exit 1
  fi
}

# Stop what is left of the run everywhere, then start it everywhere: the workers only run together.
restart() {
  healthy=0
  on_workers all stop "$NAME" || true # on a new machine there is nothing to stop
  if ! bash "$LAUNCH_DIR/setup.sh" "${same[@]}" ||
    ! bash "$LAUNCH_DIR/run.sh" "$NAME" --config "$CONFIG" \
      "${OVERRIDES[@]}" "${same[@]}"; then
    count_failure "set-up or start failed"
  fi
}

count_failure() { # REASON
  say "$1 ($((++failures)) of $MAX_FAILURES)"
  ((failures < MAX_FAILURES)) || give_up 1
}

give_up() { # EXIT_CODE
  say "giving up; the end of the log:"
  bash "$LAUNCH_DIR/tail.sh" "$NAME" --worker all --lines 20 --no-follow "${same[@]}" || true
  finish "$1"
}

# count REGEX: workers in $report whose status matches.
count() {
  grep -cE "^segdiff-worker [^ ]+ ($1)\$" <<<"$report" || true
}

look_at_workers() { # WORKERS
  local report
  status_command
  report=$("${SSH[@]}" 2>&1) || true # a worker that did not answer is missing in the report
  if (($(count '.*') < $1)); then
    printf '%s\n' "$report" >&2
    say "not every worker answers"
    ((++silent < MAX_SILENT)) || give_up 1 # new machines take a few minutes to let ssh in
    return
  fi
  silent=0
  if (($(count 'exited 2'))); then
    say "the run rejects its input"
    give_up 2
  elif (($(count 'exited 75'))); then
    count_failure "the run waited for the network or another process in vain"
    restart
  elif (($(count 'exited [1-9][0-9]*'))); then
    count_failure "the run crashed"
    restart
  elif (($(count 'absent|stopped'))); then
    say "starting $NAME"
    restart
  elif (($(count 'exited 0') == $1)); then
    say "$NAME has finished: gs://$BUCKET/runs/$NAME"
    finish 0
  elif ((++healthy >= 60)); then
    failures=0
  fi
}

show_plan() {
  echo "# every $POLL_SECONDS s:"
  run "${DESCRIBE[@]}"
  [[ $CAPACITY != queued* ]] || run "${DESCRIBE_REQUEST[@]}"
  echo "# when there is no TPU (delete only after a preemption):"
  recreate PREEMPTED
  echo "# when the workers are up, every $POLL_SECONDS s:"
  status_command
  run "${SSH[@]}"
  echo "# when the run is not going:"
  restart
  if ((delete)); then
    echo "# when it has finished:"
    bash "$LAUNCH_DIR/delete.sh" "${same[@]}"
  fi
}

POLL_SECONDS=${POLL_SECONDS:-60} MAX_FAILURES=${MAX_FAILURES:-3} MAX_SILENT=${MAX_SILENT:-15}
MAX_CREATE_FAILURES=${MAX_CREATE_FAILURES:-60}
if ((DRY_RUN)); then
  show_plan
  exit 0
fi
last=''
while :; do
  read -r state workers <<<"$(tpu_state)"
  [[ $state == "$last" ]] || say "$TPU_NAME is $state"
  last=$state
  case $state in
    READY) look_at_workers "${workers:-1}" ;;
    PREEMPTED | TERMINATED | STOPPED | SUSPENDED | FAILED | ABSENT) recreate "$state" ;;
    *) ;; # being created, repaired or restarted, waiting in the queue, or not known
  esac
  sleep "$POLL_SECONDS"
done
