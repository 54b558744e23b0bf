#!/usr/bin/env bash
# What the other launch scripts run on a TPU worker, inside ~/segdiff_jax.
#
#   on_worker.sh setup                         python3.11 environment in .venv, if it is not current
#   on_worker.sh start NAME LOGS COMMAND...    COMMAND detached; its log copied to LOGS (gs://)
#   on_worker.sh status NAME COMMAND...        segdiff-worker N running|stopped|absent|exited CODE
#   on_worker.sh stop NAME                     SIGTERM, so that it checkpoints; later SIGKILL
#   on_worker.sh log NAME LINES follow|once
#
# State is in ~/segdiff_runs/NAME: log, command, pid, exit, and a lock held while COMMAND lives
# (a lock, because a pid means nothing after a reboot).
set -euo pipefail

STOP_SECONDS=${STOP_SECONDS:-180}              # for the checkpoint that follows SIGTERM
START_SECONDS=${START_SECONDS:-10}             # for the end of an earlier run: its log upload
LOG_UPLOAD_SECONDS=${LOG_UPLOAD_SECONDS:-60}
worker=${TPU_WORKER_ID:-${HOSTNAME##*-w-}} # TPU VM hosts are called t1v-n-1a2b3c4d-w-N

die() {
  printf 'worker %s: %s\n' "$worker" "$*" >&2
  exit 1
}

install_python() {
  local apt=(sudo DEBIAN_FRONTEND=noninteractive apt-get -y -o DPkg::Lock::Timeout=600)
  # Ubuntu 22.04, which the TPU images are, has only a release candidate of 3.11.
  sudo add-apt-repository -y ppa:deadsnakes/ppa
  "${apt[@]}" update
  "${apt[@]}" install python3.11 python3.11-venv
}

setup() {
  local current
  current=$(sha256sum requirements.txt pyproject.toml && git rev-parse HEAD)
  if [[ -f .venv/setup.stamp && $(<.venv/setup.stamp) == "$current" ]]; then
    echo "worker $worker: environment is current"
    return
  fi
  rm -f .venv/setup.stamp # an interrupted set-up is repeated, whichever code comes next
  command -v python3.11 >/dev/null || install_python
  [[ -x .venv/bin/pip ]] || python3.11 -m venv .venv
  .venv/bin/pip install --quiet -r requirements.txt
  .venv/bin/pip install --quiet '.[tpu]'
  printf '%s\n' "$current" >.venv/setup.stamp
  echo "worker $worker: environment is ready"
}

start() { # LOGS COMMAND...
  mkdir -p "$dir"
  exec 9>"$dir/lock"
  flock -w "$START_SECONDS" 9 || die "$name is already running here; stop it first with launch/run.sh --stop"
  rm -f "$dir/exit"
  printf '%q ' "${@:2}" >"$dir/command"
  # The descriptor of the lock is inherited: it is free when the last of these processes is gone.
  setsid bash "$0" attend "$name" "$@" </dev/null >"$dir/attend.log" 2>&1 &
  echo "$!" >"$dir/pid"
  echo "worker $worker: started $name"
}

# Runs COMMAND and notes how it ended. "stopped" is not "exited 0": a run that got SIGTERM has
# checkpointed and left with 0, but it is not finished.
attend() { # LOGS COMMAND...
  local started code=0 stopped=0 child='' uploader
  started=$(date -u +%Y%m%dT%H%M%SZ)
  local log=$dir/$started.log upload_to=$1/worker-$worker-$started.log
  trap 'stopped=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM
  printf 'started %s: %s\n' "$started" "$(<"$dir/command")" >>"$log"
  ln -sfn "$log" "$dir/log"
  # Nobody watches: patience costs less than a run that stops for good over a bad half hour.
  SEGDIFF_NETWORK_TIMEOUT=900 SEGDIFF_PROCESS_TIMEOUT=1800 PYTHONUNBUFFERED=1 \
    "${@:2}" >>"$log" 2>&1 &
  child=$!
  ((!stopped)) || kill -TERM "$child" 2>/dev/null || true
  upload_now_and_then "$log" "$upload_to" 9>&- &
  uploader=$!
  # A trapped signal ends `wait` early, with the child still there.
  while :; do
    wait "$child" && code=0 || code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  if ((stopped)); then echo stopped; else echo "exited $code"; fi >"$dir/exit.new"
  mv "$dir/exit.new" "$dir/exit"
  kill "$uploader" 2>/dev/null || true
  wait "$uploader" || true
  upload "$log" "$upload_to"
}

upload() { # FILE URI; a log is not worth a run
  gcloud storage cp --quiet "$1" "$2" 9>&- >/dev/null 2>&1 || true
}

upload_now_and_then() { # FILE URI
  local nap=''
  trap '[[ -z $nap ]] || kill "$nap" 2>/dev/null; exit 0' TERM
  while :; do
    sleep "$LOG_UPLOAD_SECONDS" &
    nap=$!
    wait "$nap"
    upload "$@"
  done
}

status() { # COMMAND...
  local state=absent
  if [[ -f $dir/exit ]]; then
    # Another command under the same name, such as more steps, has not run yet.
    [[ $(<"$dir/command") != "$(printf '%q ' "$@")" ]] || state=$(<"$dir/exit")
  elif [[ -f $dir/lock ]]; then
    if flock -n "$dir/lock" true; then state=stopped; else state=running; fi
  fi
  echo "segdiff-worker $worker $state"
}

stop() {
  [[ -f $dir/lock ]] || return 0
  exec 9>"$dir/lock"
  if ! flock -n 9; then
    kill -TERM "$(<"$dir/pid")" 2>/dev/null || true
    if ! flock -w "$STOP_SECONDS" 9; then
      kill -KILL -- "-$(<"$dir/pid")" 2>/dev/null || true # setsid made it a process group
      flock -w 30 9 || die "$name does not stop"
    fi
  fi
  echo "worker $worker: $name is stopped"
}

log() { # LINES follow|once
  [[ -e $dir/log ]] || die "$name has no log here"
  local follow=()
  [[ $2 != follow ]] || follow=(-F)
  tail -n "$1" "${follow[@]}" "$dir/log" | sed -u "s/^/[$worker] /"
}

action=${1:-}
name=${2:-}
dir=$HOME/segdiff_runs/$name
case $action in
  setup) setup ;;
  start | attend | status | stop | log) "$action" "${@:3}" ;;
  *)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    [[ $action == --help ]] || exit 2
    ;;
esac
