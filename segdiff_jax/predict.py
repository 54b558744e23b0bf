"""Segments photos: `python -m segdiff_jax.predict --checkpoint W --images a.jpg --output O …`."""

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

from segdiff_jax import cli, files
from segdiff_jax.config import Config
from segdiff_jax.data import images, requests, vocabulary
from segdiff_jax.data.vocabulary import Vocabulary
from segdiff_jax.errors import UserError
from segdiff_jax.evaluation import report
from segdiff_jax.progress import Progress, reporter

_DESCRIPTION = (
    """Segment photos into the classes you name.

Per image: O/<name>_labels.png (class ids, palette), O/<name>_overlay.png with a legend,
O/<name>_uncertainty.png (for an ensemble of two or more) and O/<name>.json; O/index.html over all.
The same seed gives the same bytes.

"""
    + cli.SEVERAL_PROCESSES
)


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    from segdiff_jax import runtime
    from segdiff_jax.training import processes

    runtime.start()
    processes.join()
    runtime.start_logging()
    with processes.together():
        paths = requests.find_images(args.images)
        processes.check_same("--images", paths)
        _predict(args, paths, processes.is_first())


def _predict(args: argparse.Namespace, paths: Sequence[str], first: bool) -> None:
    """Every process segments, the first one writes."""
    from segdiff_jax import workdir
    from segdiff_jax.evaluation import results
    from segdiff_jax.segmenter import Segmenter

    classes = requests.parse_classes(args.classes)
    results.check_names(paths, args.output)
    settings = _settings(args, workdir.read_config(args.checkpoint), classes)
    _check_images(paths, reporter("check", enabled=first))
    if first:
        files.check_writable(args.output)
    segmenter = Segmenter.load(args.checkpoint, args.which)
    used = results.all_settings(settings, segmenter.config) | {
        "checkpoint": args.checkpoint,
        "checkpoint_step": segmenter.checkpoint_step,
    }
    rows = []
    progress = reporter("predict", enabled=first)
    progress(0, len(paths))
    for done, path in enumerate(paths, 1):
        photo = images.read_image(path)
        found = segmenter(photo, classes.classes, **settings)
        if first:
            rows.append(results.write(args.output, path, photo, found, classes, used))
        progress(done, len(paths))
    if first:
        _write_page(args, rows, classes, settings)
        print(f"{len(paths)} images segmented: {os.path.join(args.output, 'index.html')}")


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("segdiff_jax.predict", _DESCRIPTION)
    add = parser.add_argument
    cli.add_checkpoint(parser)
    add(
        "--images",
        required=True,
        nargs="+",
        metavar="IMAGE",
        help="image files, folders of them, or patterns such as 'dir/*.png'",
    )
    add(
        "--classes",
        required=True,
        metavar="NAMES",
        help='";" between classes, "," between synonyms: "sky; building, edifice; road"; '
        "or @FILE with one class a line; "
        f"or one of {', '.join(vocabulary.packaged())}",
    )
    add("--output", required=True, metavar="DIR", help="folder for the results")
    add(
        "--steps",
        type=cli.positive_int,
        metavar="T",
        help="denoising steps; default: as the checkpoint's config says, like the next two",
    )
    add(
        "--ensemble",
        type=cli.positive_int,
        metavar="N",
        help="samples to merge; their spread is the uncertainty",
    )
    add(
        "--shortlist",
        type=cli.natural_int,
        metavar="M",
        help="score all classes in one cheap pass, spend T and N on the M most present; 0 = off",
    )
    add("--seed", type=cli.natural_int, default=0, help="seed of the sampling noise; default: 0")
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--threshold",
        type=_share,
        metavar="S",
        help="pixels whose best score is below S, 0…1, are *other* (255)",
    )
    other.add_argument(
        "--closed", action="store_true", help="every pixel gets one of the classes, none is *other*"
    )
    return parser


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


def _check_images(paths: Sequence[str], progress: Progress) -> None:
    """Decodes every image once: a broken one is found before anything is loaded or written."""
    for done, path in enumerate(paths, 1):
        images.read_image(path)
        progress(done, len(paths))


def _settings(args: argparse.Namespace, config: Config, classes: Vocabulary) -> dict[str, Any]:
    """Arguments of the call to the segmenter. Raises `UserError` for what the model cannot do."""
    from segdiff_jax import codec

    sampler, total = config.sampler, config.diffusion.num_train_timesteps
    steps = args.steps or sampler.steps
    if steps > total:
        raise UserError(f"--steps {steps}: this model has {total} steps, ask for 1 to {total}")
    shortlist = sampler.shortlist if args.shortlist is None else args.shortlist
    group = codec.group_size(len(classes), config.codec.classes_per_pass)
    if shortlist and group > 1:
        raise UserError(
            f"--shortlist {shortlist}: this model paints {group} classes in one pass, "
            "so there is nothing to leave out: set it to 0"
        )
    return {
        "steps": steps,
        "ensemble": args.ensemble or sampler.ensemble,
        "shortlist": shortlist,
        "seed": args.seed,
        "threshold": config.codec.threshold if args.threshold is None else args.threshold,
        # Who names a threshold wants *other*, even from a model whose config is closed.
        "closed": args.closed or (config.codec.closed and args.threshold is None),
    }


def _write_page(
    args: argparse.Namespace,
    rows: Sequence[report.Row],
    classes: Vocabulary,
    settings: Mapping[str, Any],
) -> None:
    legend = report.Table(
        "Classes",
        ["class", "synonyms"],
        [(entry.name, ", ".join(entry.synonyms)) for entry in classes.classes],
        colors=[[int(c) for c in color] for color in classes.palette()],
    )
    note = ", ".join(f"{name} {value}" for name, value in settings.items())
    report.page(
        os.path.join(args.output, "index.html"),
        f"{len(rows)} images, {len(classes)} classes",
        tables=[legend],
        rows=rows,
        note=f"{args.checkpoint}: {note}. Uncertainty is brightest at each image's own maximum.",
    )


if __name__ == "__main__":
    cli.run(main)
