"""Scores a model: `python -m segdiff_jax.evaluate --checkpoint W --output O`."""

import argparse
import contextlib
import logging
import os
from collections.abc import Sequence

from segdiff_jax import cli
from segdiff_jax.combinations import check_image_size
from segdiff_jax.config import Config, of_stage
from segdiff_jax.errors import UserError

_DESCRIPTION = (
    """Segment a labelled dataset and write O/metrics.json and O/index.html.

The config names data, sampler and codec; networks come from the checkpoint. Predictions are scored
at the labels' own resolution, and every pixel gets a class (closed vocabulary) unless --open.

"""
    + cli.SEVERAL_PROCESSES
)

# What the networks were trained for: asking for anything else gives numbers without meaning.
_TRAINED_FOR = (
    "codec.classes_per_pass",
    "codec.context",
    "model.preset",
    "diffusion.prediction_type",
    "diffusion.beta_schedule",
    "diffusion.beta_start",
    "diffusion.beta_end",
    "diffusion.num_train_timesteps",
    "diffusion.rescale_betas_zero_snr",
    "sampler.initial_noise",
)


def main(argv: list[str]) -> None:
    overrides, rest = cli.split_config_flags(argv)
    args = _parser().parse_args(rest)
    _check_open(args.open, overrides)
    if args.config:
        config = of_stage(cli.load_config(args.config, overrides, "evaluate"))

    from segdiff_jax.parallel import processes, runtime
    from segdiff_jax.weights import hub, workdir

    runtime.start()
    processes.join()
    runtime.start_logging()
    with processes.together():
        args.checkpoint_folder = hub.local(args.checkpoint)
        trained = workdir.read_config(args.checkpoint_folder)
        if not args.config:
            config = cli.override_config(trained, overrides, "evaluate")
        _check_trained_for(args.checkpoint, config, trained)
        if config.data.fit != trained.data.fit and processes.is_first():
            logging.warning(
                "config.data.fit=%s, but %s was trained with %s: photos of another shape look "
                "otherwise than in its training",
                *(config.data.fit, args.checkpoint, trained.data.fit),
            )
        if config.sampler.tiles and processes.is_first():
            logging.warning(
                "config.sampler.tiles=%d: evaluation sees whole images", config.sampler.tiles
            )
        config.sampler.tiles = 0
        _evaluate(args, config)


def _evaluate(args: argparse.Namespace, config: Config) -> None:
    """Every process evaluates, the first one writes."""
    from segdiff_jax import ownership
    from segdiff_jax.data import label_summary
    from segdiff_jax.data.sources.source import open_source
    from segdiff_jax.evaluation import report
    from segdiff_jax.evaluation.evaluator import evaluate
    from segdiff_jax.inference.segmenter import Segmenter
    from segdiff_jax.parallel import processes
    from segdiff_jax.progress import reporter
    from segdiff_jax.weights import workdir

    first = processes.is_first()
    split = args.split or config.data.val_split
    if config.data.source == "scenes" and split not in (
        config.data.train_split,
        config.data.val_split,
    ):
        raise UserError(
            f"--split {split}: scenes have {config.data.train_split} and {config.data.val_split}"
        )
    source = open_source(config.data, split, config.seed)
    processes.check_same("images", [len(source), list(source.vocabulary.names)])
    if first:
        ownership.check(args.output, _KIND, _OUTPUTS)
        print(source.vocabulary.summary())
    networks, step = workdir.load_with_step(args.checkpoint_folder, which=args.which)
    unet, vae, text_encoder, tokenizer, _ = networks
    check_image_size(config, vae.config.downsampling, f"the VAE of {args.checkpoint}")
    if first:
        label_summary.report(source, config.data, split)
    trained = workdir.read_classes(args.checkpoint_folder)
    segmenter = Segmenter(unet, vae, text_encoder, tokenizer, config, trained=trained)
    segmenter.add_decoders(*workdir.load_decoders(args.checkpoint_folder, vae))
    with contextlib.ExitStack() as stack:
        if first:
            stack.enter_context(ownership.claimed(args.output, _KIND, _OUTPUTS))
        result = evaluate(
            segmenter,
            source,
            limit=args.limit,
            seed=args.seed,
            examples=args.rows,
            ceiling=args.ceiling,
            open_vocabulary=args.open,
            progress=reporter("evaluate", enabled=first),
        )
        if not first:
            return
        stack.enter_context(processes.at_work("writes the page"))
        data = {"source": config.data.source, "root": config.data.root, "split": split}
        read = {"checkpoint": args.checkpoint, "checkpoint_step": step, "data": data}
        summary = result.summary | read
        report.write(args.output, summary, result, source, args.per_image)
    print(report.text_table(summary))
    print(f"written: {os.path.join(args.output, 'metrics.json')} and index.html")


_KIND = "evaluation"  # of a folder's marker (`ownership`)
_OUTPUTS = ("metrics.json", "index.html", "examples.png", "per_image.csv")


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("segdiff_jax.evaluate", _DESCRIPTION, cli.config_help())
    add = parser.add_argument
    add(
        "--config",
        type=cli.path,
        metavar="FILE",
        help="Python file with get_config(): data, sampler and codec; "
        "default: the config that the checkpoint was trained with",
    )
    cli.add_checkpoint(parser)
    add(
        "--output",
        required=True,
        type=cli.path,
        metavar="DIR",
        help="folder for metrics.json and index.html; only those of an earlier run are replaced",
    )
    add("--split", help="split of the dataset; default: config.data.val_split")
    add(
        "--limit",
        type=cli.positive_int,
        metavar="N",
        help="evaluate N images, spread evenly over the split; default: all",
    )
    add("--seed", type=cli.natural_int, default=0, help="seed of the sampling noise; default: 0")
    add(
        "--rows",
        type=cli.natural_int,
        default=12,
        metavar="N",
        help="images shown on the page; default: 12",
    )
    add(
        "--ceiling",
        action="store_true",
        help="score the ground truth after a trip through codec and VAE, in place of predictions: "
        "the best that any UNet could do",
    )
    add(
        "--per-image",
        action="store_true",
        help="also write per_image.csv: for each image and class the pixels of truth, prediction "
        "and both, of whole masks and of boundaries, so that another metric needs no second run",
    )
    add(
        "--open",
        action="store_true",
        help="pixels whose best score is below config.codec.threshold become *other*, which is "
        "counted as wrong; default: every pixel gets a class",
    )
    return parser


def _check_trained_for(checkpoint: str, config: Config, trained: Config) -> None:
    for key in _TRAINED_FOR:
        group, name = key.split(".")
        wanted, had = (getattr(getattr(c, group), name) for c in (config, trained))
        if wanted != had:
            raise UserError(
                f"{checkpoint}: was trained with config.{key}={had!r}, but the config says "
                f"{wanted!r}: use the config of the training, or another --checkpoint"
            )


def _check_open(wanted: bool, overrides: Sequence[str]) -> None:
    """Raises `UserError` for a key of the codec that would have no effect on the scores."""
    for key in ("threshold", "closed"):
        flag = f"{cli.PREFIX}codec.{key}"
        if any(override.startswith(f"{flag}=") for override in overrides):
            if not wanted:
                raise UserError(f"{flag}: has no effect without --open: add that, or leave it out")
            if key == "closed":
                raise UserError(f"{flag}: --open says it already: leave one of them out")


if __name__ == "__main__":
    cli.run(main)
