#!/usr/bin/env bash
# The same run on GKE with xpk (pip install xpk): one slice or several, restarts done by Kubernetes.
#
#   launch/xpk.sh cluster [--env FILE] [--dry-run]        creates the cluster
#   launch/xpk.sh image                                   builds launch/Dockerfile and pushes IMAGE
#   launch/xpk.sh run NAME [--config configs/ade.py] [--config.a.b=v ...]
#   launch/xpk.sh stop NAME                               deletes the workload
#   launch/xpk.sh delete                                  deletes the cluster
#
# A preempted or failed workload is started again by xpk, with the same command, so it resumes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_flags "$@"
load_env TPU_TYPE CLUSTER NUM_SLICES
action=${ARGS[0]:-}
ARGS=("${ARGS[@]:1}")
where=("--cluster=$CLUSTER" "--project=$PROJECT" "--zone=$ZONE")
slices=("--tpu-type=$TPU_TYPE" "--num-slices=$NUM_SLICES")

need() {
  [[ -n ${!1:-} ]] || die "$ENV_FILE: $1 is empty; give it a value"
}

case $action in
  cluster)
    no_more_args
    case $CAPACITY in
      *spot) capacity=--spot ;;
      *) capacity=--on-demand ;;
    esac
    run xpk cluster create "${where[@]}" "${slices[@]}" "$capacity"
    ;;
  image)
    no_more_args
    need IMAGE
    run docker build --file "$LAUNCH_DIR/Dockerfile" --tag "$IMAGE" "$(dirname "$LAUNCH_DIR")"
    run docker push "$IMAGE"
    ;;
  run)
    need IMAGE
    need BUCKET
    parse_run
    training_command python
    run xpk workload create "${where[@]}" "${slices[@]}" "--workload=$NAME" \
      "--docker-image=$IMAGE" --max-restarts=100 "--command=$(quote "${COMMAND[@]}")"
    ;;
  stop)
    parse_run
    run xpk workload delete "${where[@]}" "--workload=$NAME" --force
    ;;
  delete)
    no_more_args
    run xpk cluster delete "${where[@]}"
    ;;
  *) die "unknown action ${action@Q}; see --help" ;;
esac
