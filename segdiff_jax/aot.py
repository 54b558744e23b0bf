"""What a TPU would make of a config: `python -m segdiff_jax.aot --config C --topology v5e:4x4`."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from segdiff_jax import cli
from segdiff_jax.config import of_stage
from segdiff_jax.errors import UserError

_DESCRIPTION = """Compile the step of a config for TPUs that are not here. Reported per chip: memory
and whether it fits, FLOPs, bytes accessed, network traffic, and the roofline that follows.

The function is the one that train (or the segmenter) jits; its arguments are shapes. No data, no
weights and no TPU are needed, but pip install 'jax[tpu]' and, for Stable Diffusion 2, some 15 GB of
memory and 10 minutes; --plan takes 5 GB and 2 minutes. The architecture is that of
config.model.preset, whatever config.init_from names. docs/performance.md says what figures mean."""


def main(argv: list[str]) -> None:
    overrides, rest = cli.split_config_flags(argv)
    args = _parser().parse_args(rest)
    if not any(flag.startswith(f"{cli.PREFIX}data.root=") for flag in overrides):
        overrides = [f"{cli.PREFIX}data.root=unused", *overrides]  # no data is read
    config = of_stage(cli.load_config(args.config, overrides))
    before = [_read(args.compare)] if args.compare else []

    os.environ["JAX_PLATFORMS"] = "cpu"  # the compiler needs no device and must not look for one
    from segdiff_jax import files
    from segdiff_jax.roofline import measure, report

    if args.plan and args.step != "train":
        raise UserError(f"--plan: not with --step {args.step}, whose loops are compiled apart")
    target = measure.Target(args.topology, args.slices, args.step, args.images, args.classes)
    if args.search:
        log = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
        config, made = measure.search(config, target, log, planned=args.plan)
    else:
        made = measure.measure(config, target, planned=args.plan)
    print(report.table([*before, made]))
    if args.json:
        files.write_json(args.json, made)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("segdiff_jax.aot", _DESCRIPTION, cli.config_help())
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="Python file with get_config()")
    add(
        "--topology",
        required=True,
        metavar="CHIP:SHAPE",
        help="v4, v5e, v5p or v6e and the shape of a slice, such as v5e:4x4 or v5p:2x2x2",
    )
    add("--slices", type=cli.positive_int, default=1, metavar="N", help="slices of it (1)")
    add(
        "--step",
        choices=("train", "sample", "evaluate"),
        default="train",
        help="train: a training step. sample: all passes and members of --images at once. "
        "evaluate: config.sampler.batch_size of them, as evaluate runs (train)",
    )
    add("--images", type=cli.positive_int, default=1, metavar="N", help="of --step sample (1)")
    add(
        "--classes",
        type=cli.positive_int,
        metavar="K",
        help="of --step sample (the config's vocabulary)",
    )
    add(
        "--plan",
        action="store_true",
        help="stop at XLA's plan of memory, in a quarter of the time: all but the bytes accessed "
        "and the code's size",
    )
    add("--search", action="store_true", help="find the largest batch per chip that fits")
    add("--json", metavar="FILE", help="also write the report here")
    add("--compare", metavar="FILE", help="an earlier --json report, shown beside this one")
    return parser


def _read(path: str) -> dict[str, Any]:
    try:
        values = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise UserError(f"--compare {path}: {error.strerror}: give an earlier --json") from error
    except ValueError as error:
        raise UserError(f"--compare {path}: not JSON: give an earlier --json report") from error
    if not isinstance(values, dict) or "per_chip" not in values and "why" not in values:
        raise UserError(f"--compare {path}: no report of segdiff_jax.aot: give an earlier --json")
    return values


if __name__ == "__main__":
    cli.run(main)
