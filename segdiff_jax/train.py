"""Trains a model: `python -m segdiff_jax.train --config configs/X.py --workdir W`."""

import logging
import os

from segdiff_jax import cli

_DESCRIPTION = """Train a model. The same command again continues from the newest checkpoint.

SIGTERM and Ctrl-C write a checkpoint and exit 0. Any key of the config can be overridden.

On a TPU pod run the same command on every worker: they find each other. Elsewhere, several
processes need JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
JAX_PROCESS_ID in their environment."""


def main(argv: list[str]) -> None:
    overrides, rest = cli.split_config_flags(argv)
    parser = cli.parser("segdiff_jax.train", _DESCRIPTION, cli.config_help())
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="Python file with get_config()"
    )
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="where checkpoints, logs and TensorBoard events go; local or gs://",
    )
    args = parser.parse_args(rest)
    config = cli.load_config(args.config, overrides)

    from segdiff_jax.files import check_writable
    from segdiff_jax.runtime import start
    from segdiff_jax.training import loop, processes, stages
    from segdiff_jax.training.throughput import StartUp, process_age

    startup = StartUp(process_age())
    startup.done("imports")
    start(os.fspath(args.workdir))
    processes.join()
    _start_logging(processes.is_first(), processes.index())
    with processes.together():
        if processes.is_first():
            check_writable(args.workdir)
        try:
            startup.done("processes")
            stages.train(config, os.fspath(args.workdir), startup)
        except loop.Stopped as stopped:
            logging.info("%s; run the same command to continue", stopped)


def _start_logging(first: bool, process: int) -> None:
    """The first process tells how the run goes, the others only what goes wrong with them."""
    level, name = (logging.INFO, "") if first else (logging.WARNING, f"[process {process}] ")
    form = f"%(asctime)s {name}%(message)s"
    # Imports may have set up a handler of their own.
    logging.basicConfig(level=level, format=form, datefmt="%H:%M:%S", force=True)
    logging.getLogger("absl").setLevel(logging.WARNING)


if __name__ == "__main__":
    cli.run(main)
