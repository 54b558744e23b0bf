"""Train a model: `python -m segdiff_jax.train --config configs/X.py --workdir W`."""

import logging
import os
from typing import TYPE_CHECKING

from segdiff_jax import cli
from segdiff_jax.config import Config

if TYPE_CHECKING:
    from segdiff_jax.training.timing import StartUp

_DESCRIPTION = (
    """Train a model. The same command again continues from the newest checkpoint.

SIGTERM and Ctrl-C write a checkpoint and exit 0. Any key of the config can be overridden.

"""
    + cli.SEVERAL_PROCESSES
)


def main(argv: list[str]) -> None:
    overrides, rest = cli.split_config_flags(argv)
    parser = cli.parser("segdiff_jax.train", _DESCRIPTION, cli.config_help())
    parser.add_argument(
        "--config",
        required=True,
        type=cli.path,
        metavar="FILE",
        help="Python file with get_config()",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        type=cli.path,
        metavar="DIR",
        help="where checkpoints, logs and TensorBoard events go; local or gs://",
    )
    args = parser.parse_args(rest)
    config = cli.load_config(args.config, overrides)

    from segdiff_jax.parallel import processes
    from segdiff_jax.parallel.runtime import start, start_logging
    from segdiff_jax.training.stop import Stopped
    from segdiff_jax.training.timing import StartUp, process_age

    startup = StartUp(process_age())
    startup.done("imports")
    start(os.fspath(args.workdir))
    processes.join()
    start_logging(times=True, libraries=logging.WARNING)
    with processes.together():
        try:
            startup.done("processes")
            train(config, os.fspath(args.workdir), startup)
            logging.info("finished: %s", args.workdir)
        except Stopped as stopped:
            logging.info("%s; run the same command to continue", stopped)


def train(config: Config, workdir: str, startup: "StartUp | None" = None) -> None:
    """Run a training, judged by an evaluation where the config asks for it."""
    from segdiff_jax.evaluation.validation import validator_of
    from segdiff_jax.training import run

    run.train(config, workdir, startup, validator_of if config.train.eval_every else None)


if __name__ == "__main__":
    cli.run(main)
