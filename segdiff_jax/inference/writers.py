"""The files of one predicted image: in the formats asked for, a picture, and a description."""

import collections
import functools
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from segdiff_jax import files, ownership
from segdiff_jax.config import Config
from segdiff_jax.data import geometry
from segdiff_jax.errors import UserError
from segdiff_jax.inference import page, pictures, regions
from segdiff_jax.inference.photos import file_name, identity
from segdiff_jax.inference.result import Segmentation, other_label
from segdiff_jax.text.vocabulary import Vocabulary

_LONGEST_NAME = 255  # bytes, on most file systems
_THUMBNAIL = 640  # pixels of the longer side of photos inside index.html
_ALWAYS = ("_overlay.png", "_uncertainty.png", ".json")

KIND = "prediction"  # of a folder's marker (`ownership`)
PAGE = "index.html"


def labels_png(found: Segmentation) -> bytes:
    """Class ids as pixel values, with a palette."""
    return pictures.label_png(found.labels, found.vocabulary.palette())


def scores_npz(found: Segmentation) -> bytes:
    """`scores` float16 [K, H, W], `classes` [K] and, of an ensemble, `uncertainty` [H, W]."""
    scores = np.empty((len(found.classes), *found.labels.shape), np.float16)
    for row, one in zip(scores, np.moveaxis(found.network_scores, -1, 0), strict=True):
        row[...] = geometry.enlarge(one, found.labels.shape)  # not all of them in float32
    arrays: dict[str, Any] = {"scores": scores, "classes": np.array(found.classes)}
    if found.uncertainty is not None:
        arrays["uncertainty"] = found.uncertainty
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def coco_json(found: Segmentation) -> bytes:
    """COCO's annotations of one image: a mask in run-length encoding for each class present."""
    height, width = found.labels.shape
    annotations: list[dict[str, Any]] = []
    for number in np.unique(found.labels[found.labels < len(found.classes)]).tolist():
        mask = found.labels == number
        rows, columns = (np.flatnonzero(mask.any(axis)).tolist() for axis in (1, 0))
        size = [columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
        annotations.append(
            {"id": len(annotations) + 1, "image_id": 1, "category_id": number, "iscrowd": 0}
            | {"bbox": [columns[0], rows[0], *size]}
            | {"area": int(mask.sum()), "segmentation": regions.rle(mask)}
        )
    categories = [{"id": i, "name": name} for i, name in enumerate(found.classes)]
    image = {"id": 1, "width": width, "height": height}
    whole = {"images": [image], "categories": categories, "annotations": annotations}
    return json.dumps(whole, ensure_ascii=False).encode("utf-8")


class Format(NamedTuple):
    """The suffixes of its files for K classes; what makes one of them, by its number."""

    suffixes: Callable[[int], Sequence[str]]
    encode: Callable[[Segmentation, int], bytes]


FORMATS = {
    "labels": Format(lambda count: ["_labels.png"], lambda found, _: labels_png(found)),
    "scores": Format(lambda count: ["_scores.npz"], lambda found, _: scores_npz(found)),
    "masks": Format(
        lambda count: [f"_mask_{number}.png" for number in range(count)],
        lambda found, number: pictures.encode(Image.fromarray(found.labels == number)),
    ),
    "coco": Format(lambda count: ["_coco.json"], lambda found, _: coco_json(found)),
}
_BY_SUFFIX = {".png": labels_png, ".npz": scores_npz, ".json": coco_json}


def by_suffix(path: str) -> Callable[[Segmentation], bytes]:
    """What makes the contents of a file of this name. Raises `UserError` for another suffix."""
    suffix = PurePath(path).suffix.lower()
    if suffix not in _BY_SUFFIX:
        raise UserError(f"{path}: end the name with one of {', '.join(_BY_SUFFIX)}")
    return _BY_SUFFIX[suffix]


def names(paths: Sequence[str]) -> dict[str, str]:
    """What the results of each of `paths` are called: <name>_labels.png and so on.

    It is the file's stem, its whole name where several stems are equal, and with the names of the
    folders above it where these are equal too: <folder>_<name>. Raises `UserError` where even so
    two are the same, or one is too long for a file.
    """
    named = {path: files.shown(file_name(path)) for path in paths}
    stems = {path: PurePath(name).stem for path, name in named.items()}
    forms = [stems, named]
    for depth in range(1, max(path.count("/") for path in paths) + 1):
        forms += [
            {p: "_".join([*_folders(p)[-depth:], n]) for p, n in f.items()} for f in forms[:2]
        ]
    chosen: dict[str, str] = {}
    for form in forms:
        left = {path: name for path, name in form.items() if path not in chosen}
        counts = collections.Counter(left.values())
        taken = set(chosen.values())
        chosen |= {p: n for p, n in left.items() if counts[n] == 1 and n not in taken}
    for path in paths:
        if path not in chosen:
            raise UserError(
                f"{path}: its results would have the name of another one's, {named[path]}: "
                "rename one, or use two --output folders"
            )
        if len(f"{chosen[path]}_uncertainty.png".encode()) > _LONGEST_NAME:
            raise UserError(f"{path}: its results' names would be too long: rename it")
    return {path: chosen[path] for path in paths}


def _folders(path: str) -> list[str]:
    return [files.shown(part) for part in path.split("/")[:-1] if part not in ("", ".", "..")]


def outputs(names: Iterable[str], formats: Sequence[str], count: int) -> list[str]:
    """All files that may be written for images of these `names` and `count` classes."""
    ends = [end for kind in formats for end in FORMATS[kind].suffixes(count)]
    return [*(f"{name}{end}" for name in names for end in (*ends, *_ALWAYS)), PAGE]


def check_output(output: str, names: Mapping[str, str], written: Sequence[str]) -> None:
    """Raises `UserError` if a file to be written would replace one of the photos, or one not ours.

    names: path → name, of `names`.
    """
    inputs = {identity(path) for path in names}
    for name in written:
        if identity(os.path.join(output, name)) in inputs:
            raise UserError(
                f"--output {output}: {name} would overwrite an image of --images: "
                "choose another folder"
            )
    ownership.check(output, KIND, written)


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
        "fit": config.data.fit,
        "templates": list(config.prompts.templates),
    }


def write(
    target: str,
    path: str,
    found: Segmentation,
    settings: Mapping[str, Any],
    formats: Sequence[str] = ("labels",),
) -> page.Row:
    """Writes the files of the image at `path`, all or none of them.

    target: the output folder and the image's name in it; "O/a" for O/a_labels.png and so on.

    Returns the image's row for `page.page`. Raises `UserError` if a file cannot be written.
    """
    output, name = os.path.split(target)
    description = {"image": path} | _describe(name, found, settings, formats)
    contents = _contents(name, found, formats)
    contents[f"{name}.json"] = files.to_json(description).encode("utf-8")  # last: it names them
    _write_set(output, contents)
    _remove_stale(output, name, contents)
    return row(path, found.photo, found.legend(), description["files"])


def _describe(
    name: str, found: Segmentation, settings: Mapping[str, Any], formats: Sequence[str]
) -> dict[str, Any]:
    """What O/<name>.json says of one image. Shares are of the image's pixels and sum to 1."""
    other, spread = other_label(len(found.classes)), found.uncertainty
    height, width = found.labels.shape
    pixels = np.bincount(found.labels.ravel(), minlength=other + 1)

    def count(label: int) -> dict[str, Any]:
        return {"pixels": int(pixels[label]), "share": float(pixels[label] / found.labels.size)}

    written: dict[str, Any] = {}
    for kind in formats:
        names = [f"{name}{end}" for end in FORMATS[kind].suffixes(len(found.classes))]
        written[kind] = names if kind == "masks" else names[0]
    return {
        "width": width,
        "height": height,
        "classes": [
            {"id": i, "name": e.name, "synonyms": list(e.synonyms), **count(i)}
            for i, e in enumerate(found.vocabulary.classes)
        ],
        "other": {"id": other, **count(other)},
        "uncertainty": None
        if spread is None
        else {"mean": float(spread.mean()), "max": float(spread.max())},
        "files": written
        | {
            "overlay": f"{name}_overlay.png",
            "uncertainty": None if spread is None else f"{name}_uncertainty.png",
        },
        "settings": dict(settings),
    }


def _contents(name: str, found: Segmentation, formats: Sequence[str]) -> dict[str, bytes]:
    """File names and contents of one image's files, made side by side: zlib lets threads run."""
    makers: dict[str, Callable[[], bytes]] = {}
    for kind in formats:
        suffixes, encode = FORMATS[kind]
        for number, end in enumerate(suffixes(len(found.classes))):
            makers[f"{name}{end}"] = functools.partial(encode, found, number)
    makers[f"{name}_overlay.png"] = lambda: pictures.encode(found.overlay(), level=1)
    spread = found.uncertainty
    if spread is not None:
        colored = lambda: pictures.encode(pictures.uncertainty_map(spread), level=1)  # noqa: E731
        makers[f"{name}_uncertainty.png"] = colored
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(makers, pool.map(lambda make: make(), makers.values()), strict=True))


def _write_set(output: str, contents: Mapping[str, bytes]) -> None:
    """Writes all files of one image or, if one cannot be written, none of them."""
    written = []
    try:
        for name, data in contents.items():
            files.write_bytes(os.path.join(output, name), data)
            written.append(name)
    except BaseException:
        for name in written:
            epath.Path(output, name).unlink(missing_ok=True)
        raise


def _remove_stale(output: str, name: str, written: Mapping[str, bytes]) -> None:
    """Removes what an earlier run with other settings wrote of an image: it would be wrong here."""
    ends = r"_labels\.png|_scores\.npz|_mask_\d+\.png|_coco\.json|_uncertainty\.png"
    for ours in ownership.owned(output).get(KIND, ()):
        if re.fullmatch(rf"{re.escape(name)}({ends})", ours) and ours not in written:
            epath.Path(output, ours).unlink(missing_ok=True)


def row(
    path: str,
    photo: np.ndarray,
    legend: Mapping[str, Sequence[int]],
    written: Mapping[str, Any],
) -> page.Row:
    """The row of `page.page` for a photo uint8 [H, W, 3] whose files are `written`."""
    thumbnail = Image.fromarray(photo)
    thumbnail.thumbnail((_THUMBNAIL, _THUMBNAIL))
    shown: dict[str, bytes | str] = {"image": pictures.encode(thumbnail, photo=True)}
    for kind in ("labels", "overlay", "uncertainty"):
        if written.get(kind):
            shown[kind] = written[kind]
    return page.Row(path, shown, legend)


def write_page(
    output: str,
    rows: Sequence[page.Row],
    classes: Vocabulary,
    note: str,
    unreadable: Mapping[str, str],
) -> None:
    """Writes index.html over all images; `unreadable`: those that were left out, and why."""
    legend = page.Table(
        "Classes",
        ["class", "synonyms"],
        [(entry.name, ", ".join(entry.synonyms)) for entry in classes.classes],
        colors=classes.palette().tolist(),
    )
    tables = [legend]
    if unreadable:
        left_out = list(unreadable.items())
        tables.append(page.Table("Left out: cannot be read", ["image", "why"], left_out))
    page.page(
        os.path.join(output, PAGE),
        f"{len(rows)} images, {len(classes)} classes",
        tables=tables,
        rows=rows,
        note=f"{note}. Uncertainty is brightest at each image's own maximum.",
    )
