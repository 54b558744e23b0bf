"""The files of one predicted image: labels, overlay, uncertainty, and their description in JSON."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from segdiff_jax import files
from segdiff_jax.config import Config
from segdiff_jax.data.requests import identity
from segdiff_jax.data.vocabulary import Vocabulary
from segdiff_jax.errors import UserError
from segdiff_jax.evaluation import report
from segdiff_jax.segmentation import Segmentation, other_label

_THUMBNAIL = 640  # pixels of the longer side of photos inside index.html


def check_names(paths: Sequence[str], output: str) -> None:
    """Raises `UserError` if a result would overwrite another result, or one of the photos."""
    owners: dict[str, str] = {}
    inputs = {identity(path): path for path in paths}
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
            if identity(os.path.join(output, name)) in inputs:
                raise UserError(
                    f"--output {output}: {name}, made from {path}, would overwrite an image of "
                    "--images: choose another folder"
                )


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
    output: str,
    path: str,
    photo: np.ndarray,
    found: Segmentation,
    classes: Vocabulary,
    settings: Mapping[str, Any],
) -> report.Row:
    """Writes the files of the image at `path` into the folder `output`, all or none of them.

    Returns the image's row for `report.page`. Raises `UserError` if a file cannot be written.
    """
    description = _describe(path, found, classes, settings)
    outputs = _outputs(path, photo, found, classes, description)
    _write_set(output, outputs, stale=f"{PurePath(path).stem}_uncertainty.png")
    return _row(path, photo, description)


def _describe(
    path: str,
    found: Segmentation,
    classes: Vocabulary,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What O/<stem>.json says of one image. Shares are of the image's pixels and sum to 1."""
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
        "settings": dict(settings),
    }


def _outputs(
    path: str,
    photo: np.ndarray,
    found: Segmentation,
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
