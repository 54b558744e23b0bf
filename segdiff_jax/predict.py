"""Segments photos: `python -m segdiff_jax.predict --checkpoint W --images … --classes … --output O`."""

import argparse
import glob
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from PIL import Image

from segdiff_jax import cli, files
from segdiff_jax.config import Config
from segdiff_jax.data import images, vocabulary
from segdiff_jax.data.sources import IMAGE_EXTENSIONS
from segdiff_jax.data.vocabulary import Vocabulary
from segdiff_jax.errors import UserError
from segdiff_jax.evaluation import report
from segdiff_jax.progress import reporter

if TYPE_CHECKING:
    from segdiff_jax.segmenter import Segmentation

_DESCRIPTION = """Segment photos into the classes you name.

Per image: O/<name>_labels.png (class ids, palette), O/<name>_overlay.png with a legend,
O/<name>_uncertainty.png (for an ensemble of two or more) and O/<name>.json; O/index.html over all.
The same seed gives the same bytes."""

_THUMBNAIL = 640  # pixels of the longer side of photos inside index.html


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    classes = parse_classes(args.classes)
    paths = find_images(args.images)
    _check_names(paths, args.output)

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("absl").setLevel(logging.WARNING)
    from segdiff_jax import runtime, workdir
    from segdiff_jax.segmenter import Segmenter

    settings = _settings(args, workdir.read_config(args.checkpoint), classes)
    _check_images(paths)
    files.check_writable(args.output)
    runtime.start()
    segmenter = Segmenter.load(args.checkpoint)
    rows = []
    progress = reporter("predict")
    progress(0, len(paths))
    for done, path in enumerate(paths, 1):
        photo = images.read_image(path)
        found = segmenter(photo, classes.classes, **settings)
        description = _describe(path, found, classes, settings, segmenter.config)
        description["settings"]["checkpoint"] = args.checkpoint
        outputs = _outputs(path, photo, found, classes, description)
        _write_set(args.output, outputs, stale=f"{PurePath(path).stem}_uncertainty.png")
        rows.append(_row(path, photo, description))
        progress(done, len(paths))
    _write_page(args, rows, classes, settings)
    print(f"{len(paths)} images segmented: {os.path.join(args.output, 'index.html')}")


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("segdiff_jax.predict", _DESCRIPTION)
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="workdir of a training run, or an exported folder; local or gs://",
    )
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


def parse_classes(text: str) -> Vocabulary:
    """The value of --classes: "a; b, synonym", "@file", or the name of a packaged vocabulary.

    Raises `UserError` for an empty list, an empty or a repeated name, an unreadable file.
    """
    text = text.strip()
    if text in vocabulary.packaged():
        return vocabulary.load(text)
    if text.startswith("@"):
        return vocabulary.load(text[1:])
    return vocabulary.from_names([p for p in text.split(";") if p.strip()], name="--classes")


def find_images(arguments: Sequence[str]) -> list[str]:
    """Files that --images names, each once, in the order of the arguments, folders by name.

    Folders give their images (by extension) and are not searched further down. Raises `UserError`
    for an argument that names nothing.
    """
    found: dict[str, str] = {}  # identity -> path as named
    for argument in arguments:
        for path in _expand(argument):
            found.setdefault(_identity(path), path)
    return list(found.values())


def _expand(argument: str) -> list[str]:
    path = epath.Path(argument)
    if path.is_dir():
        inside = [p for p in path.iterdir() if p.suffix.lower() in IMAGE_EXTENSIONS]
        inside = [p for p in inside if not p.name.startswith(".")]
        if not inside:
            raise UserError(f"--images {argument}: no images in this folder, name another one")
        return sorted(os.fspath(p) for p in inside)
    if path.exists():
        return [argument]
    if not glob.has_magic(argument):
        raise UserError(f"--images {argument}: no such file or folder, correct the path")
    if files.is_remote(argument):
        matches = [os.fspath(p) for p in path.parent.glob(path.name)]
    else:
        matches = [p for p in glob.glob(argument, recursive=True) if os.path.isfile(p)]
    if not matches:
        raise UserError(f"--images {argument}: no file matches this pattern, correct it")
    return sorted(matches)


def _identity(path: str) -> str:
    return path if files.is_remote(path) else os.path.realpath(path)


def _check_names(paths: Sequence[str], output: str) -> None:
    """No result may overwrite another result, or one of the photos."""
    owners: dict[str, str] = {}
    inputs = {_identity(path): path for path in paths}
    for path in paths:
        stem = PurePath(path).stem
        if stem in owners:
            raise UserError(
                f"{owners[stem]} and {path} would both be written to "
                f"{os.path.join(output, stem)}_labels.png: rename one, or use two --output folders"
            )
        owners[stem] = path
    for stem, path in owners.items():
        for name in (f"{stem}_labels.png", f"{stem}_overlay.png", f"{stem}_uncertainty.png"):
            if _identity(os.path.join(output, name)) in inputs:
                raise UserError(
                    f"--output {output}: {name}, made from {path}, would overwrite an image of "
                    "--images: choose another folder"
                )


def _check_images(paths: Sequence[str]) -> None:
    """Decodes every image once: a broken one is found before anything is loaded or written."""
    progress = reporter("check")
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


def _describe(
    path: str,
    found: "Segmentation",
    classes: Vocabulary,
    settings: Mapping[str, Any],
    config: Config,
) -> dict[str, Any]:
    """What O/<stem>.json says of one image. Shares are of the image's pixels and sum to 1."""
    from segdiff_jax.segmenter import other_label

    stem, other = PurePath(path).stem, other_label(len(classes))
    height, width = found.labels.shape
    pixels = np.bincount(found.labels.ravel(), minlength=other + 1)

    def count(label: int) -> dict[str, Any]:
        return {"pixels": int(pixels[label]), "share": float(pixels[label] / found.labels.size)}

    spread = found.uncertainty
    return {
        "image": path,
        "width": width,
        "height": height,
        "classes": [
            {"id": i, "name": e.name, "synonyms": list(e.synonyms), **count(i)}
            for i, e in enumerate(classes.classes)
        ],
        "other": {"id": other, **count(other)},
        "uncertainty": None
        if spread is None
        else {"mean": float(spread.mean()), "max": float(spread.max())},
        "files": {
            "labels": f"{stem}_labels.png",
            "overlay": f"{stem}_overlay.png",
            "uncertainty": None if spread is None else f"{stem}_uncertainty.png",
        },
        "settings": dict(settings)
        | {
            "eta": config.sampler.eta,
            "align": config.sampler.align,
            "reduce": config.sampler.reduce,
            "spread": config.sampler.uncertainty,
            "classes_per_pass": config.codec.classes_per_pass,
            "context": config.codec.context,
            "image_size": list(config.data.image_size),
            "templates": list(config.prompts.templates),
        },
    }


def _outputs(
    path: str,
    photo: np.ndarray,
    found: "Segmentation",
    classes: Vocabulary,
    description: dict[str, Any],
) -> dict[str, bytes]:
    """File names and contents for one image; the JSON, which names the others, comes last."""
    palette, names = classes.palette(), description["files"]
    outputs = {
        names["labels"]: report.label_png(found.labels, palette),
        names["overlay"]: report.encode(
            report.overlay(photo, found.labels, palette, classes.names)
        ),
    }
    if found.uncertainty is not None:
        outputs[names["uncertainty"]] = report.encode(report.uncertainty_map(found.uncertainty))
    text = json.dumps(description, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    outputs[f"{PurePath(path).stem}.json"] = text.encode("utf-8")
    return outputs


def _write_set(output: str, outputs: Mapping[str, bytes], stale: str) -> None:
    """Writes all files of one image or, if one cannot be written, none of them.

    `stale`: a file that an earlier run with other settings may have left and that would be wrong
    beside these.
    """
    written = []
    try:
        for name, data in outputs.items():
            files.write_bytes(os.path.join(output, name), data)
            written.append(name)
    except BaseException:
        for name in written:
            epath.Path(output, name).unlink(missing_ok=True)
        raise
    if stale not in outputs:
        epath.Path(output, stale).unlink(missing_ok=True)


def _row(path: str, photo: np.ndarray, description: dict[str, Any]) -> report.Row:
    thumbnail = Image.fromarray(photo)
    thumbnail.thumbnail((_THUMBNAIL, _THUMBNAIL))
    pictures: dict[str, bytes | str] = {"image": report.encode(thumbnail, photo=True)}
    pictures |= {kind: name for kind, name in description["files"].items() if name}
    return report.Row(path, pictures)


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
