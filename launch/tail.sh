#!/usr/bin/env bash
# Shows the log of a run, each line with its worker's number, and follows it until Ctrl-C.
#
#   launch/tail.sh NAME [--worker N|all] [--lines 50] [--no-follow] [--env FILE] [--dry-run]
#
# For a machine that is gone: gcloud storage cat 'gs://BUCKET/logs/NAME/worker-0-*'
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_flags "$@"
load_env TPU_NAME
NAME='' worker=0 lines=50 follow=follow
set -- "${ARGS[@]}"
while (($#)); do
  case $1 in
    --worker) worker=${2:-} && shift ;;
    --lines) lines=${2:-} && shift ;;
    --no-follow) follow=once ;;
    -*) die "unknown flag ${1@Q}; see --help" ;;
    *) NAME=$1 ;;
  esac
  shift || die "a flag at the end needs a value; see --help"
done
check_name
[[ $worker =~ ^([0-9]+|all)$ ]] || die "--worker ${worker@Q}: give a number or all"
[[ $lines =~ ^[0-9]+$ ]] || die "--lines ${lines@Q}: give a number"
on_workers "$worker" log "$NAME" "$lines" "$follow"
