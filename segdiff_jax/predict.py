"""Segments photos: `python -m segdiff_jax.predict --checkpoint W --images a.jpg --output O …`."""

import argparse
import contextlib
import functools
import itertools
import os
from collections.abc import Sequence
from typing import Any

from segdiff_jax import cli, ownership
from segdiff_jax.config import Config
from segdiff_jax.data import images
from segdiff_jax.errors import UserError
from segdiff_jax.inference import page, requests
from segdiff_jax.progress import reporter
from segdiff_jax.text import vocabulary
from segdiff_jax.text.vocabulary import Vocabulary

_DESCRIPTION = (
    """Segment photos into the classes you name.

Per image: O/<name>_labels.png (or what --format says), O/<name>_overlay.png with a legend,
O/<name>_uncertainty.png (for an ensemble of two or more) and O/<name>.json; O/index.html over all.
<name> is the image's without its extension, or with it where several would be equal.
The same seed gives the same bytes.

"""
    + cli.SEVERAL_PROCESSES
)


def main(argv: list[str]) -> None:
    args = _parse(argv)
    from segdiff_jax.parallel import processes, runtime

    runtime.start()
    processes.join()
    runtime.start_logging()
    with processes.together():
        paths, ours = requests.without_results(requests.find_images(args.images))
        processes.check_same("--images", paths)
        first = processes.is_first()
        if ours and first:
            counted = f"{len(ours)} result" + ("s" if len(ours) > 1 else "")
            print(f"left out: {counted} of an earlier run, such as {ours[0]}", flush=True)
        if not paths:
            raise UserError(f"--images {ours[0]}: only results of an earlier run: name the photos")
        _predict(args, paths, first)


def _predict(args: argparse.Namespace, paths: Sequence[str], first: bool) -> None:
    """Every process segments, the first one writes."""
    from segdiff_jax.inference import formats, writers
    from segdiff_jax.inference.segmenter import Segmenter
    from segdiff_jax.parallel import processes
    from segdiff_jax.weights import hub, workdir

    classes = requests.parse_classes(args.classes)
    folder = hub.local(args.checkpoint)
    config = workdir.read_config(folder)
    settings = _settings(args, config, classes)
    names = writers.names(paths)
    read = functools.partial(
        images.read_photo,
        max_pixels=args.max_pixels or config.data.max_pixels,
        max_value=config.data.max_value,
    )
    progress = functools.partial(reporter, enabled=first)
    if first:
        formats.check(args.format, classes)
        written = writers.outputs(names.values(), args.format, len(classes))
        writers.check_output(args.output, names, written)
        print(classes.summary(), flush=True)
    unreadable = requests.unreadable(paths, read, args.skip_unreadable, progress("check"))
    paths = [path for path in paths if path not in unreadable]
    segmenter = Segmenter.load(folder, args.which)
    segmenter.table(classes.classes)  # what is wrong with the classes stops before all else
    used = writers.all_settings(settings, segmenter.config) | {
        "checkpoint": args.checkpoint,
        "checkpoint_step": segmenter.checkpoint_step,
    }
    rows: list[page.Row] = []
    step = progress("predict")
    with contextlib.ExitStack() as stack:
        if first:
            written = writers.outputs([names[path] for path in paths], args.format, len(classes))
            stack.enter_context(ownership.claimed(args.output, writers.KIND, written))
        step(0, len(paths))
        photos = (read(path).pixels for path in paths)
        results = segmenter.stream(photos, classes, **settings)
        for done, path in enumerate(paths, 1):
            try:
                found = next(results)
            except UserError as error:
                raise UserError(f"{path}: {error}") from error
            if first:
                target = os.path.join(args.output, names[path])
                with processes.at_work("writes its results"):
                    rows.append(writers.write(target, path, found, used, args.format))
            step(done, len(paths))
        if first:
            note = f"{args.checkpoint}: " + ", ".join(f"{k} {v}" for k, v in settings.items())
            with processes.at_work("writes its results"):
                written = [names[path] for path in paths]
                writers.write_summaries(args.output, written, classes, args.format)
            writers.write_page(args.output, rows, classes, note, unreadable)
    if first:
        skipped = f", {len(unreadable)} unreadable left out" if unreadable else ""
        index = os.path.join(args.output, writers.PAGE)
        print(f"{len(paths)} images segmented{skipped}: {index}")


def _parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; what a shell made of class names without quotes gets a hint."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if not rest:
        return args
    flag = next(i for i, word in enumerate(argv) if word.split("=")[0] == "--classes")
    words = [argv[flag].partition("=")[2]] if "=" in argv[flag] else []
    words += itertools.takewhile(lambda word: not word.startswith("-"), argv[flag + 1 :])
    if set(rest) <= set(words):
        given = " ".join(word for word in words if word)
        raise UserError(f'--classes {given}: put quotes around the names: --classes "{given}"')
    parser.error(f"unrecognized arguments: {' '.join(rest)}")


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("segdiff_jax.predict", _DESCRIPTION)
    add = parser.add_argument
    cli.add_checkpoint(parser)
    add(
        "--images",
        required=True,
        nargs="+",
        type=cli.path,
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
    add(
        "--output",
        required=True,
        type=cli.path,
        metavar="DIR",
        help="folder for the results; of the files there, only earlier results are replaced",
    )
    add(
        "--format",
        nargs="+",
        choices=("labels", "scores", "scoremaps", "masks", "cutouts", "coco", "yolo", "cvat"),
        default=["labels"],
        metavar="FORMAT",
        help="labels (default): class ids as O/<name>_labels.png; scores: O/<name>_scores.npz; "
        "of each class, scoremaps: O/<name>_score_<id>.png, 16 bits; masks: O/<name>_mask_<id>.png;"
        " cutouts: O/<name>_cutout_<id>.png, with alpha; to be imported elsewhere, "
        "coco: O/coco.json and O/<name>_coco.json; yolo: polygons in O/yolo/ with data.yaml; "
        "cvat: O/cvat.zip, segmentation mask 1.1",
    )
    add(
        "--skip-unreadable",
        action="store_true",
        help="leave out images that cannot be read, and list them in index.html",
    )
    add(
        "--max-pixels",
        type=cli.positive_int,
        metavar="N",
        help="refuse larger images; default: as the checkpoint's config says (data.max_pixels)",
    )
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


if __name__ == "__main__":
    cli.run(main)
