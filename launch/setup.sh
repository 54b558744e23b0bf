#!/usr/bin/env bash
# Brings the code and its environment onto every worker. Safe to repeat: what is there stays.
#
#   launch/setup.sh [--env FILE] [--dry-run]
#
# Not while a run is going: it changes the code below it. `launch/supervise.sh` calls it itself.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_flags "$@"
no_more_args
load_env TPU_NAME REPO REF

# git init and fetch take a branch, a tag or a commit alike; git clone takes no commit.
ssh_command all "set -e; mkdir -p segdiff_jax; cd segdiff_jax; git init --quiet; \
git fetch --quiet --depth 1 $(quote "$REPO" "$REF"); \
git checkout --quiet --force --detach FETCH_HEAD; bash launch/on_worker.sh setup"
run "${SSH[@]}"
