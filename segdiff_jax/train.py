"""Trains a model: `python -m segdiff_jax.train --config configs/X.py --workdir W`."""

import logging
import os

from segdiff_jax import cli

_DESCRIPTION = """Train a model. The same command again continues from the newest checkpoint.

SIGTERM and Ctrl-C write a checkpoint and exit 0. Any key of the config can be overridden."""


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

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("absl").setLevel(logging.WARNING)
    from segdiff_jax.files import check_writable
    from segdiff_jax.runtime import start
    from segdiff_jax.training import loop, stages

    check_writable(args.workdir)
    start()
    try:
        stages.train(config, os.fspath(args.workdir))
    except loop.Stopped as stopped:
        logging.info("%s; run the same command to continue", stopped)


if __name__ == "__main__":
    cli.run(main)
