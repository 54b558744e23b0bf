"""Segments photos: `python -m segdiff_jax.predict --checkpoint W --images a.jpg --output O …`."""

import argparse
import contextlib
import functools
import itertools
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from segdiff_jax import cli, ownership
from segdiff_jax.config import Config
from segdiff_jax.errors import UserError
from segdiff_jax.inference import photos, requests
from segdiff_jax.progress import Progress, reporter, working
from segdiff_jax.text import vocabulary
from segdiff_jax.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from segdiff_jax.inference.segmenter import Segmenter

_DESCRIPTION = (
    """Segment photos into the classes you name.

Per image: O/<name>_labels.png (or what --format says), O/<name>_overlay.png with a legend,
O/<name>_uncertainty.png (for an ensemble of two or more) and O/<name>.json; O/index.html over all.
<name> is the image's without its extension, with it where several would be equal, and with its
folders where these are equal too. The same seed gives the same bytes. The same command again goes
on where it was stopped: what is done with the same settings is skipped.

"""
    + cli.SEVERAL_PROCESSES
)
_STDOUT = "-"
_SUFFIXES = {"labels": ".png", "scores": ".npz", "coco": ".json"}  # of formats of one file


def main(argv: list[str]) -> None:
    args = _parse(argv)
    with working("starting"):
        from segdiff_jax.parallel import processes, runtime

        runtime.start()
        processes.join()
        runtime.start_logging()
    with processes.together(), tempfile.TemporaryDirectory(prefix="segdiff_") as folder:
        paths, ours = photos.without_results(photos.find(args.images))
        _check_streams(args, paths)
        processes.check_same("--images", paths)
        say = functools.partial(_say, args)
        if ours:
            counted = f"{len(ours)} result" + ("s" if len(ours) > 1 else "")
            say(f"left out: {counted} of an earlier run, such as {ours[0]}")
        if not paths:
            raise UserError(f"--images {ours[0]}: only results of an earlier run: name the photos")
        _predict(args, paths, folder)


def _say(args: argparse.Namespace, text: str) -> None:
    """What is for people: on stdout, unless that is for programs."""
    from segdiff_jax.parallel import processes

    if processes.is_first() and not args.quiet:
        for_programs = args.json_lines or args.output == _STDOUT
        print(text, file=sys.stderr if for_programs else sys.stdout, flush=True)


def _check_streams(args: argparse.Namespace, paths: Sequence[str]) -> None:
    """Raises `UserError` for what cannot come from stdin or go to stdout."""
    from segdiff_jax.parallel import processes

    if photos.STDIN in paths and processes.count() > 1:
        raise UserError("--images -: only one process has stdin: write the photo to a file")
    if args.output != _STDOUT:
        return
    if len(paths) > 1 or len(args.format) > 1 or args.format[0] not in _SUFFIXES:
        raise UserError(
            f"--output -: for one image and one --format of {', '.join(_SUFFIXES)}: "
            "name a folder for more"
        )
    if args.json_lines or sys.stdout.isatty():
        why = "--json-lines writes there too" if args.json_lines else "it is a terminal"
        raise UserError(
            f"--output -: stdout is to take the file, but {why}: use one or redirect it"
        )


def _predict(args: argparse.Namespace, paths: Sequence[str], folder: str) -> None:
    """Every process segments, the first one writes."""
    from segdiff_jax.parallel import processes

    with working("loading libraries", processes.is_first()):
        from segdiff_jax.inference import resuming, writers
        from segdiff_jax.inference.segmenter import Segmenter
        from segdiff_jax.weights import hub, workdir

    first, to_folder = processes.is_first(), args.output != _STDOUT
    classes = requests.parse_classes(args.classes)
    place = hub.local(args.checkpoint)
    config = workdir.read_config(place)
    settings = _settings(args, config, classes)
    names = writers.names(paths)
    read = photos.Photos(config.data, args.max_pixels, folder)
    progress = functools.partial(reporter, enabled=first and not args.quiet)
    if first and to_folder:
        written = writers.outputs(names.values(), args.format, len(classes))
        writers.check_output(args.output, names, written)
    _say(args, classes.summary())
    had = resuming.earlier(args.output, names) if to_folder else {}
    digests = {path: said["settings"][resuming.DIGEST] for path, said in had.items()}
    unreadable = photos.checked(read, paths, digests, args.skip_unreadable, progress("check"))
    paths = [path for path in paths if path not in unreadable]
    with working(f"loading {args.checkpoint}", first):
        segmenter = Segmenter.load(place, args.which)
        segmenter.table(classes.classes)  # what is wrong with the classes stops before all else
    used = writers.all_settings(settings, segmenter.config) | {
        "checkpoint": args.checkpoint,
        "checkpoint_step": segmenter.checkpoint_step,
        "weights": segmenter.networks.checksum(),
    }
    own = {path: used | {resuming.DIGEST: read.digest(path)} for path in paths}
    changes = {
        path: resuming.changes(had[path], own[path], classes, args.format)
        for path in paths
        if path in had
    }
    # The first process, which writes, decides: others need not see its folder.
    flags = processes.stacked(np.array([changes.get(path) == [] for path in paths]))[0]
    done = [path for path, is_done in zip(paths, flags, strict=True) if is_done]
    again = Counter(change for found in changes.values() for change in found)
    if again:
        listed = "; ".join(text for text, _ in again.most_common(3))
        count = sum(map(bool, changes.values()))
        _say(args, f"{count} of an earlier run are done again, for other settings: {listed}")
    todo = [path for path in paths if path not in done]
    results = _stream(segmenter, read, todo, classes, settings, progress("predict"))
    if not to_folder:
        found = next(results)
        if first:
            sys.stdout.buffer.write(found.encoded(_SUFFIXES[args.format[0]]))
            sys.stdout.buffer.flush()
        return
    rows = {}
    with contextlib.ExitStack() as stack:
        if first:
            written = writers.outputs([names[path] for path in paths], args.format, len(classes))
            stack.enter_context(ownership.claimed(args.output, writers.KIND, written))
        for path in paths:
            if path not in done:
                found = next(results)
            if not first:
                continue
            target = os.path.join(args.output, names[path])
            with processes.at_work("writes its results"):
                if path in done:
                    rows[path] = resuming.row(path, read.read(path).pixels, had[path], classes)
                else:
                    rows[path] = writers.write(target, path, found, own[path], args.format)
                _json_line(args, target, path in done)
        next(results, None)
        if first:
            note = f"{args.checkpoint}: " + ", ".join(f"{k} {v}" for k, v in settings.items())
            writers.write_page(args.output, list(rows.values()), classes, note, unreadable)
    if first:
        _report(args, len(todo), len(done), unreadable)


def _stream(
    segmenter: "Segmenter",
    read: photos.Photos,
    paths: Sequence[str],
    classes: Vocabulary,
    settings: Mapping[str, Any],
    step: Progress,
) -> Any:
    """The `Segmentation` of each photo. Raises `UserError` that names it."""
    if not paths:
        return
    finished = [0]
    step(0, len(paths))

    def part(done: float, total: int) -> None:
        # The stream is one photo ahead of its results: what is told is what the networks do.
        if done and finished[0] < len(paths):
            step(round(finished[0] + min(done / total, 0.99), 2), len(paths))
        finished[0] += done == total

    pixels = (read.read(path).pixels for path in paths)
    results = segmenter.stream(pixels, classes, progress=part, **settings)
    for count, path in enumerate(paths, 1):
        try:
            yield next(results)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        if count == len(paths):
            step(count, len(paths))


def _json_line(args: argparse.Namespace, target: str, skipped: bool) -> None:
    """What O/<name>.json says, on one line of stdout."""
    if args.json_lines:
        with open(f"{target}.json", encoding="utf-8") as file:
            said = {"output": args.output, "skipped": skipped} | json.load(file)
        print(json.dumps(said, ensure_ascii=False), flush=True)


def _report(
    args: argparse.Namespace, segmented: int, skipped: int, unreadable: Mapping[str, str]
) -> None:
    from segdiff_jax.inference import writers

    if args.json_lines:
        for path, why in unreadable.items():
            print(json.dumps({"image": path, "error": why}, ensure_ascii=False), flush=True)
    parts = [f"{segmented} images segmented"]
    if skipped:
        parts.append(f"{skipped} skipped, done before with the same settings")
    if unreadable:
        parts.append(f"{len(unreadable)} unreadable left out")
    _say(args, f"{', '.join(parts)}: {os.path.join(args.output, writers.PAGE)}")


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
        type=photos.argument,
        metavar="IMAGE",
        help="image files, folders with all below them, patterns such as 'dir/*.png', "
        "http(s):// addresses, or - for stdin",
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
        help="folder for the results; of the files there, only earlier results are replaced; "
        "- writes the one file of one image to stdout",
    )
    add(
        "--format",
        nargs="+",
        choices=("labels", "scores", "masks", "coco"),
        default=["labels"],
        metavar="FORMAT",
        help="labels (default): class ids as O/<name>_labels.png; scores: O/<name>_scores.npz; "
        "masks: O/<name>_mask_<id>.png; coco: O/<name>_coco.json with run-length encoded masks",
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
    add(
        "--tiles",
        type=cli.natural_int,
        metavar="N",
        help="see a large photo also in windows, at most N along each side; 0 = as a whole only",
    )
    add("--seed", type=cli.natural_int, default=0, help="seed of the sampling noise; default: 0")
    add(
        "--json-lines",
        action="store_true",
        help="also print what <name>.json says, one photo a line, on stdout; the rest on stderr",
    )
    add("--quiet", action="store_true", help="say nothing but warnings and errors")
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
        "tiles": sampler.tiles if args.tiles is None else args.tiles,
        "seed": args.seed,
        "threshold": config.codec.threshold if args.threshold is None else args.threshold,
        # Who names a threshold wants *other*, even from a model whose config is closed.
        "closed": args.closed or (config.codec.closed and args.threshold is None),
    }


if __name__ == "__main__":
    cli.run(main)
