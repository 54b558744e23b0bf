"""The files of one predicted image: labels, overlay, uncertainty, and their description in JSON."""

import collections
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from segdiff_jax import files, ownership
from segdiff_jax.config import Config
from segdiff_jax.errors import UserError
from segdiff_jax.inference import page as report
from segdiff_jax.inference.requests import identity
from segdiff_jax.inference.result import Segmentation, other_label
from segdiff_jax.text.vocabulary import Vocabulary

_LONGEST_NAME = 255  # bytes, on most file systems
_THUMBNAIL = 640  # pixels of the longer side of photos inside index.html


KIND = "prediction"  # of a folder's marker (`ownership`)
PAGE = "index.html"


def names(paths: Sequence[str]) -> dict[str, str]:
    """What the results of each of `paths` are called: <name>_labels.png and so on.

    It is the file's stem, or its whole name where several stems are equal. Raises `UserError` where
    the names are equal too, or too long for a file.
    """
    stems = {path: files.shown(PurePath(path).stem) for path in paths}
    counts = collections.Counter(stems.values())
    owners: dict[str, str] = {}
    for path, stem in stems.items():
        name = stem if counts[stem] == 1 else files.shown(PurePath(path).name)
        if name in owners:
            raise UserError(
                f"{owners[name]} and {path} would both be written as {name}_labels.png: "
                "rename one, or use two --output folders"
            )
        if len(f"{name}_uncertainty.png".encode()) > _LONGEST_NAME:
            raise UserError(f"{path}: its results' names would be too long: rename it")
        owners[name] = path
    return {path: name for name, path in owners.items()}


def outputs(names: Iterable[str]) -> list[str]:
    """All files that may be written for images of these `names`, and the page over them."""
    ends = ("_labels.png", "_overlay.png", "_uncertainty.png", ".json")
    return [*(f"{name}{end}" for name in names for end in ends), PAGE]


def check_output(output: str, names: Mapping[str, str]) -> None:
    """Raises `UserError` if a result would overwrite one of the photos, or a file not ours.

    names: path → name, of `names`.
    """
    inputs = {identity(path) for path in names}
    for name in outputs(names.values()):
        if identity(os.path.join(output, name)) in inputs:
            raise UserError(
                f"--output {output}: {name} would overwrite an image of --images: "
                "choose another folder"
            )
    ownership.check(output, KIND, outputs(names.values()))


def all_settings(settings: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """`settings` of the call, and those of the model that shape its results."""
    return dict(settings) | {
        "eta": config.sampler.eta,
        "align": config.sampler.align,
        "reduce": config.sampler.reduce,
        "uncertainty": config.sampler.uncertainty,
        "classes_per_pass": config.codec.classes_per_pass,
        "context": config.codec.context,
        "image_size": list(config.data.image_size),
        "templates": list(config.prompts.templates),
    }


def write(
    target: str,
    path: str,
    photo: np.ndarray,
    found: Segmentation,
    classes: Vocabulary,
    settings: Mapping[str, Any],
) -> report.Row:
    """Writes the files of the image at `path`, all or none of them.

    target: the output folder and the image's name in it; "O/a" for O/a_labels.png and so on.

    Returns the image's row for `report.page`. Raises `UserError` if a file cannot be written.
    """
    output, name = os.path.split(target)
    description = {"image": path} | _describe(name, found, classes, settings)
    contents = _contents(photo, found, classes, description)
    contents[f"{name}.json"] = files.to_json(description).encode("utf-8")  # last: it names them
    _write_set(output, contents, stale=f"{name}_uncertainty.png")
    return _row(path, photo, description)


def _describe(
    name: str,
    found: Segmentation,
    classes: Vocabulary,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What O/<name>.json says of one image. Shares are of the image's pixels and sum to 1."""
    other = other_label(len(classes))
    height, width = found.labels.shape
    pixels = np.bincount(found.labels.ravel(), minlength=other + 1)

    def count(label: int) -> dict[str, Any]:
        return {"pixels": int(pixels[label]), "share": float(pixels[label] / found.labels.size)}

    spread = found.uncertainty
    return {
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
            "labels": f"{name}_labels.png",
            "overlay": f"{name}_overlay.png",
            "uncertainty": None if spread is None else f"{name}_uncertainty.png",
        },
        "settings": dict(settings),
    }


def _contents(
    photo: np.ndarray, found: Segmentation, classes: Vocabulary, description: dict[str, Any]
) -> dict[str, bytes]:
    """File names, as `description` has them, and contents of one image's pictures."""
    palette, names = classes.palette(), description["files"]
    contents = {
        names["labels"]: report.label_png(found.labels, palette),
        names["overlay"]: report.encode(
            report.overlay(photo, found.labels, palette, classes.names)
        ),
    }
    if found.uncertainty is not None:
        contents[names["uncertainty"]] = report.encode(report.uncertainty_map(found.uncertainty))
    return contents


def _write_set(output: str, contents: Mapping[str, bytes], stale: str) -> None:
    """Writes all files of one image or, if one cannot be written, none of them.

    `stale`: a file that an earlier run with other settings may have left and that would be wrong
    beside these.
    """
    written = []
    try:
        for name, data in contents.items():
            files.write_bytes(os.path.join(output, name), data)
            written.append(name)
    except BaseException:
        for name in written:
            epath.Path(output, name).unlink(missing_ok=True)
        raise
    if stale not in contents:
        epath.Path(output, stale).unlink(missing_ok=True)


def _row(path: str, photo: np.ndarray, description: dict[str, Any]) -> report.Row:
    thumbnail = Image.fromarray(photo)
    thumbnail.thumbnail((_THUMBNAIL, _THUMBNAIL))
    pictures: dict[str, bytes | str] = {"image": report.encode(thumbnail, photo=True)}
    pictures |= {kind: name for kind, name in description["files"].items() if name}
    return report.Row(path, pictures)
