# shellcheck shell=bash
# Shared by the launch scripts: flags, the env file, and how commands are shown and run.

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || {
  echo "bash 4.4 or newer is needed (macOS: brew install bash)" >&2
  exit 2
}
LAUNCH_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ENV_FILE=$LAUNCH_DIR/env
DRY_RUN=0
ARGS=()

# Bad input: one line, exit code 2.
die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

# The comment at the top of the script is its help.
usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

# Takes --help, --dry-run and --env out of "$@"; the rest stays in ARGS, --flag=value split in two.
parse_flags() {
  local split='^--(env|config|worker|lines)=(.*)$'
  while (($#)); do
    if [[ $1 =~ $split ]]; then
      set -- "--${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}" "${@:2}"
    fi
    case $1 in
      -h | --help)
        usage
        exit 0
        ;;
      --dry-run) DRY_RUN=1 ;;
      --env)
        (($# >= 2)) || die "--env needs a file"
        ENV_FILE=$2
        shift
        ;;
      *) ARGS+=("$1") ;;
    esac
    shift
  done
}

# load_env VARIABLE...: reads the env file; the named variables must not be empty.
load_env() {
  [[ -f $ENV_FILE ]] ||
    die "$ENV_FILE: no such file; cp launch/env.example launch/env and fill it in"
  CAPACITY=on-demand CREATE_ARGS=() WORKER_ENV=()
  # shellcheck source=env.example
  source "$ENV_FILE"
  BUCKET=${BUCKET:-}
  BUCKET=${BUCKET#gs://}
  BUCKET=${BUCKET%/}
  local name
  for name in PROJECT ZONE "$@"; do
    [[ -n ${!name:-} ]] || die "$ENV_FILE: $name is empty; give it a value"
  done
}

no_more_args() {
  ((${#ARGS[@]} == 0)) || die "unknown argument ${ARGS[0]@Q}; see --help"
}

# parse_run: reads NAME, CONFIG and OVERRIDES (--config.a.b=v) from ARGS.
parse_run() {
  NAME='' CONFIG=configs/ade.py OVERRIDES=()
  set -- "${ARGS[@]}"
  while (($#)); do
    case $1 in
      --config)
        (($# >= 2)) || die "--config needs a file"
        CONFIG=$2
        shift
        ;;
      --config.*=*) OVERRIDES+=("$1") ;;
      --config.*) die "$1: write overrides as $1=value" ;;
      -*) die "unknown flag ${1@Q}; see --help" ;;
      *)
        [[ -z $NAME ]] || die "two run names, ${NAME@Q} and ${1@Q}; give one"
        NAME=$1
        ;;
    esac
    shift
  done
  check_name
}

check_name() {
  [[ -n $NAME ]] || die "no run name given; see --help"
  [[ $NAME =~ ^[a-z0-9]([a-z0-9-]*[a-z0-9])?$ ]] ||
    die "run name ${NAME@Q}: use lower-case letters, digits and dashes"
}

# training_command PYTHON: sets COMMAND. Running the same command again resumes the run.
training_command() {
  # shellcheck disable=SC2034 # read by the scripts
  COMMAND=(env "${WORKER_ENV[@]}" "$1" -m segdiff_jax.train
    --config "$CONFIG" --workdir "gs://$BUCKET/runs/$NAME" "${OVERRIDES[@]}")
}

# One line that a shell reads back as exactly these words.
quote() {
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:,@%+=-]+$ ]] || word=${word@Q}
    line+="$word "
  done
  printf '%s' "${line% }"
}

# Shows a command and runs it; with --dry-run only shows it.
run() {
  if ((DRY_RUN)); then
    printf '%s\n' "$(quote "$@")"
  else
    printf '+ %s\n' "$(quote "$@")" >&2
    "$@"
  fi
}

# ssh_command WORKER COMMAND: sets SSH, the gcloud command that runs COMMAND on worker N or "all".
ssh_command() {
  SSH=(gcloud compute tpus tpu-vm ssh "$TPU_NAME" "--project=$PROJECT" "--zone=$ZONE"
    "--worker=$1" --quiet --ssh-flag=-oConnectTimeout=30 --ssh-flag=-oServerAliveInterval=30
    "--command=$2")
}

# on_workers WORKER ARGUMENT...: launch/on_worker.sh with these arguments, there.
on_workers() {
  ssh_command "$1" "cd segdiff_jax && bash launch/on_worker.sh $(quote "${@:2}")"
  run "${SSH[@]}"
}
