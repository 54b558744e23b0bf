"""Score a model: `python -m segdiff_jax.evaluate --checkpoint W --output O`."""

import argparse
import contextlib
import copy
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from segdiff_jax import cli, ownership
from segdiff_jax.combinations import check_image_size
from segdiff_jax.config import Config
from segdiff_jax.errors import UserError
from segdiff_jax.evaluation.open_vocabulary import BENCHMARKS, config_of
from segdiff_jax.progress import reporter
from segdiff_jax.stages import get, of_stage

if TYPE_CHECKING:
    from segdiff_jax.data.sources.source import Source
    from segdiff_jax.evaluation.suite import Cost
    from segdiff_jax.inference.segmenter import Segmenter

_DESCRIPTION = (
    """Segment a labelled dataset and write O/metrics.json and O/index.html.

The config names data, sampler and codec; networks come from the checkpoint. Predictions are scored
at the labels' own resolution, and every pixel gets a class (closed vocabulary) unless --open.
The same command again goes on where it was stopped.

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

_SWITCHES = {
    "--ceiling": "score the ground truth after a trip through codec and VAE, in place of "
    "predictions: the best that any UNet could do",
    "--per-image": "also write per_image.csv: for each image and class the pixels of truth, "
    "prediction and both, of whole masks and of boundaries, for metrics without a second run",
    "--predictions": "also write predictions/<name>.png: the predicted class ids of each image",
    "--open": "pixels whose best score is below config.codec.threshold become *other*, which is "
    "counted as wrong; default: every pixel gets a class",
}
_KIND = "evaluation"  # of a folder's marker (`ownership`)
_OUTPUTS = ("metrics.json", "index.html", "examples.png", "per_image.csv")
_PREDICTIONS = "predictions"


def main(argv: list[str]) -> None:
    overrides, rest = cli.split_config_flags(argv)
    args = _parser().parse_args(rest)
    _check_open(args.open, overrides)
    _check_suite(args)
    if args.config:
        cli.load_config(args.config, overrides, "evaluate")

    from segdiff_jax.parallel import processes, runtime
    from segdiff_jax.weights import hub, workdir

    runtime.start()
    processes.join()
    runtime.start_logging()
    with processes.together():
        args.folder = hub.local(args.checkpoint)
        trained = workdir.read_config(args.folder)
        if args.suite:
            _suite(args, overrides, trained, argv)
        else:
            _evaluate(args, _config_of(args, overrides, trained))


def _config_of(args: argparse.Namespace, overrides: Sequence[str], trained: Config) -> Config:
    """Return what the config file, or the checkpoint's own config, asks of the model."""
    if not args.config:
        return _checked(cli.override_config(trained, overrides, "evaluate"), trained, args)
    config = of_stage(cli.load_config(args.config, overrides, "evaluate", trained))
    return _checked(config, trained, args)


def _checked(config: Config, trained: Config, args: argparse.Namespace) -> Config:
    """Return a config that asks of the model what it was trained for."""
    from segdiff_jax.parallel import processes

    for key in _TRAINED_FOR:
        wanted, had = get(config, key), get(trained, key)
        if wanted != had and (key != "sampler.initial_noise" or "zero" in (wanted, had)):
            raise UserError(
                f"{args.checkpoint}: was trained with config.{key}={had!r}, but the config says "
                f"{wanted!r}: use the config of the training, or another --checkpoint"
            )
    if config.data.fit != trained.data.fit and processes.is_first():
        logging.warning(
            "config.data.fit=%s, but %s was trained with %s: photos of another shape look "
            "otherwise than in its training",
            *(config.data.fit, args.checkpoint, trained.data.fit),
        )
    return config


def _suite(
    args: argparse.Namespace, overrides: list[str], trained: Config, argv: Sequence[str]
) -> None:
    """Evaluate on each benchmark that has data below --data; write a table of all."""
    from segdiff_jax.evaluation import parts, suite, tables
    from segdiff_jax.parallel import processes

    found, missing, configs = {}, {}, {}
    for name in BENCHMARKS:
        config = cli.override_config(config_of(name, copy.deepcopy(trained)), overrides, "evaluate")
        configs[name] = _checked(of_stage(config), trained, args)
    roots = sorted({config.data.root for config in configs.values()})
    present = [root for root in roots if (epath.Path(args.data) / root).is_dir()]
    if not present:
        raise UserError(
            f"--data {args.data}: has none of the benchmarks' folders ({', '.join(roots)}): "
            "docs/data.md says where each is downloaded"
        )
    for name, config in configs.items():
        absent = config.data.root not in present
        config.data.root = os.path.join(args.data, config.data.root)
        own = argparse.Namespace(**vars(args) | {"output": os.path.join(args.output, name)})
        if absent:
            missing[name] = f"no folder {config.data.root}"
            continue
        try:
            found[name] = _evaluate(own, config)
        except UserError as error:
            if processes.count() > 1:  # the others may be waiting for this one inside the benchmark
                raise
            missing[name] = str(error)
            if processes.is_first():
                logging.error("%s: %s", name, error)
    if not processes.is_first():
        return
    places = {args.output: "O", args.checkpoint: "W", args.data: "SETS"}
    about = tables.origin("segdiff evaluate", argv, places)
    about["title"] = "Open-vocabulary segmentation"
    with ownership.claimed(args.output, "suite", suite.OUTPUTS):
        print(suite.write(args.output, about, found, missing))
    for name in found:
        parts.remove(parts.folder_of(os.path.join(args.output, name)))


def _evaluate(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Evaluate in every process, write in the first one; return what metrics.json says."""
    from segdiff_jax.data import survey
    from segdiff_jax.evaluation import parts, report
    from segdiff_jax.evaluation.evaluator import evaluate
    from segdiff_jax.evaluation.plan import Plan
    from segdiff_jax.parallel import processes

    first, kept = processes.is_first(), parts.folder_of(args.output)
    split = args.split or config.data.val_split
    source = _source(config, split)
    outputs = (*_OUTPUTS, *([_PREDICTIONS] if args.predictions else []))
    if first:
        ownership.check(args.output, _KIND, outputs)
        print(source.vocabulary.summary())
    segmenter, cost = _segmenter(args, config, source)
    if first:
        survey.report(source, config.data, split)
    data = {"source": config.data.source, "root": config.data.root, "split": split}
    read = {"checkpoint": args.checkpoint, "checkpoint_step": segmenter.checkpoint_step}
    read |= {"data": data}
    claim = ownership.claimed(args.output, _KIND, outputs)
    with claim if first else contextlib.nullcontext():
        plan = Plan(
            segmenter,
            source,
            limit=args.limit,
            seed=args.seed,
            examples=args.rows,
            ceiling=args.ceiling,
            open_vocabulary=args.open,
            synonyms=args.synonyms,
            predictions=os.path.join(args.output, _PREDICTIONS) if args.predictions else "",
        )
        result = evaluate(plan, reporter("evaluate", enabled=first), (kept, read))
        summary = result.summary | read | ({} if args.ceiling or not cost else cost._asdict())
        if first:
            with processes.at_work("writes the page"):
                report.write(args.output, summary, result, source, args.per_image)
    if first:
        print(report.text_table(summary))
        print(f"written: {os.path.join(args.output, 'metrics.json')} and index.html")
    if not args.suite:
        parts.remove(kept)
    return summary


def _source(config: Config, split: str) -> "Source":
    """Open a split, the same one in all processes."""
    from segdiff_jax.data.sources.source import open_source
    from segdiff_jax.parallel import processes

    own = config.data.train_split, config.data.val_split
    if config.data.source == "scenes" and split not in own:
        raise UserError(f"--split {split}: scenes have {own[0]} and {own[1]}")
    source = open_source(config.data, split, config.seed)
    processes.check_same("images", [len(source), list(source.vocabulary.names)])
    return source


def _segmenter(
    args: argparse.Namespace, config: Config, source: "Source"
) -> tuple["Segmenter", "Cost | None"]:
    """Load the checkpoint; return with it what an image of `source` costs."""
    from segdiff_jax.evaluation import asked, suite
    from segdiff_jax.inference.segmenter import Segmenter
    from segdiff_jax.weights import loading, workdir

    networks, decoders, step = loading.load_networks(args.folder, which=args.which)
    unet, vae, text_encoder, tokenizer, _ = networks
    check_image_size(config, vae.config.downsampling, f"the VAE of {args.checkpoint}")
    trained = workdir.read_classes(args.folder)
    segmenter = Segmenter(unet, vae, text_encoder, tokenizer, config, trained=trained)
    segmenter.checkpoint_step = step
    segmenter.networks.add_decoders(decoders)
    classes = len(asked.of(source, args.synonyms).vocabulary)
    tokens = tokenizer.model_max_length
    return segmenter, suite.cost(unet.config, vae.config, config, classes, tokens)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("segdiff_jax.evaluate", _DESCRIPTION, cli.config_help())
    add = parser.add_argument
    config = "Python file with get_config(): data, sampler and codec; default: the checkpoint's own"
    add("--config", type=cli.path, metavar="FILE", help=config)
    suite = "all benchmarks with data below --data, in one table beside published figures"
    add("--suite", choices=("open_vocabulary",), help=suite)
    add("--data", type=cli.path, metavar="DIR", help="--suite: the folder that holds the data sets")
    cli.add_checkpoint(parser)
    output = "folder for metrics.json and index.html; only those of an earlier run are replaced"
    add("--output", required=True, type=cli.path, metavar="DIR", help=output)
    add("--split", help="split of the dataset; default: config.data.val_split")
    limit = "evaluate N images, spread evenly over the split; default: all"
    add("--limit", type=cli.positive_int, metavar="N", help=limit)
    add("--seed", type=cli.natural_int, default=0, help="seed of the sampling noise; default: 0")
    rows = "images shown on the page; default: 12"
    add("--rows", type=cli.natural_int, default=12, metavar="N", help=rows)
    for flag, meaning in _SWITCHES.items():
        add(flag, action="store_true", help=meaning)
    synonyms = (
        "of a class with several names: mean of their prompts (default), the highest of their "
        "scores, each name being asked for by itself, or the first name alone"
    )
    add("--synonyms", choices=("mean", "max", "first"), default="mean", help=synonyms)
    return parser


def _check_suite(args: argparse.Namespace) -> None:
    if bool(args.suite) != bool(args.data):
        missing, given = ("--data", "--suite") if args.suite else ("--suite", "--data")
        raise UserError(f"{given}: has no meaning without {missing}: give both")
    if args.suite and (args.config or args.split):
        raise UserError("--suite: has configs and splits of its own: leave --config, --split out")


def _check_open(wanted: bool, overrides: Sequence[str]) -> None:
    """Raise `UserError` for a key of the codec that would have no effect on the scores."""
    for key in ("threshold", "closed"):
        flag = f"{cli.PREFIX}codec.{key}"
        if any(override.startswith(f"{flag}=") for override in overrides):
            if not wanted:
                raise UserError(f"{flag}: has no effect without --open: add that, or leave it out")
            if key == "closed":
                raise UserError(f"{flag}: --open says it already: leave one of them out")


if __name__ == "__main__":
    cli.run(main)
