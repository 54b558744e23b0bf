"""What a result is written as: one row of `FORMATS` for each word that --format takes.

Most formats are files of one image. COCO, YOLO and CVAT import a whole set: `summary` makes what
such a set needs beside the files of its images, from those files.
"""

import collections
import functools
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from segdiff_jax.data import geometry
from segdiff_jax.errors import UserError
from segdiff_jax.inference import pictures, regions
from segdiff_jax.inference.result import Segmentation
from segdiff_jax.text.vocabulary import Vocabulary, same_name

_CVAT = "cvat/SegmentationClass/"
_EXACT = 1.0  # pixels that a polygon of YOLO may leave the edge of its mask


def labels_png(found: Segmentation, number: int = 0, source: str = "") -> bytes:
    """Encode class ids as pixel values, with a palette."""
    return pictures.label_png(found.labels, found.vocabulary.palette())


def scores_npz(found: Segmentation, number: int = 0, source: str = "") -> bytes:
    """Pack `scores` float16 [K, H, W], `classes` [K] and, of an ensemble, `uncertainty` [H, W]."""
    scores = np.empty((len(found.classes), *found.labels.shape), np.float16)
    for k, row in enumerate(scores):
        row[...] = _score(found, k)  # not all of them in float32
    arrays: dict[str, Any] = {"scores": scores, "classes": np.array(found.classes)}
    if found.uncertainty is not None:
        arrays["uncertainty"] = found.uncertainty
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def coco_json(found: Segmentation, number: int = 0, source: str = "") -> bytes:
    """Write COCO's annotations of the image `source`: one for each class present.

    They are as `supervision` writes them: a polygon where one ring says it all, run lengths where a
    mask has holes or several parts.
    """
    height, width = found.labels.shape
    annotations: list[dict[str, Any]] = []
    for label in np.unique(found.labels[found.labels < len(found.classes)]).tolist():
        mask = found.labels == label
        rows, columns = (np.flatnonzero(mask.any(axis)).tolist() for axis in (1, 0))
        size = [columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
        rings = regions.polygons(mask)
        encoded = [rings[0].ravel().tolist()] if len(rings) == 1 else regions.rle(mask)
        annotations.append(
            {"id": len(annotations) + 1, "image_id": 1, "category_id": label, "iscrowd": 0}
            | {"bbox": [columns[0], rows[0], *size]}
            | {"area": int(mask.sum()), "segmentation": encoded}
        )
    image = {"id": 1, "file_name": source, "width": width, "height": height}
    return _coco([image], annotations, found.classes)


def _coco(images: Sequence[Any], annotations: Sequence[Any], classes: Sequence[str]) -> bytes:
    categories = [{"id": i, "name": name} for i, name in enumerate(classes)]
    whole = {"images": images, "categories": categories, "annotations": annotations}
    return json.dumps(whole, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _score(found: Segmentation, number: int) -> np.ndarray:
    """Return the scores of one class, float32 [H, W] in [0, 1]."""
    return geometry.enlarge(found.network_scores[..., number], found.labels.shape)


def _score_png(found: Segmentation, number: int, source: str) -> bytes:
    """Encode the scores of one class in 16-bit gray: 65535 is a score of 1."""
    return pictures.encode(np.rint(_score(found, number) * 65535).astype(np.uint16))


def _mask_png(found: Segmentation, number: int, source: str) -> bytes:
    return pictures.encode(Image.fromarray(found.labels == number))


def _cutout_png(found: Segmentation, number: int, source: str) -> bytes | None:
    mask = found.labels == number
    if not mask.any():
        return None
    alpha = np.where(mask, np.uint8(255), np.uint8(0))[..., None]
    return pictures.encode(np.concatenate([found.photo * mask[..., None], alpha], -1), level=1)


def _yolo_txt(found: Segmentation, number: int, source: str) -> bytes:
    """Write a line `class x1 y1 x2 y2 …` for each connected part, in shares of width and height."""
    size = found.labels.shape[::-1]
    lines = []
    for label in np.unique(found.labels[found.labels < len(found.classes)]).tolist():
        for ring in regions.parts(found.labels == label, _EXACT):
            points = " ".join(f"{value:.6f}" for value in (ring / size).ravel())
            lines.append(f"{label} {points}\n")
    return "".join(lines).encode()


def _yolo_photo(found: Segmentation, number: int, source: str) -> bytes:
    """Encode the photo as the labels mean it: upright, 8 bits, whatever its file was."""
    return pictures.encode(found.photo, photo=True)


def _cvat_png(found: Segmentation, number: int, source: str) -> bytes:
    return pictures.encode(pictures.colorize(found.labels, cvat_colors(found.vocabulary)))


class File(NamedTuple):
    """One file of an image, or one for each class."""

    name: str  # with {name}, the image's, and where there is one for each class {number}
    # (result, number of the class, the photo's file name) → contents, None where there is nothing
    encode: Callable[[Segmentation, int, str], bytes | None]

    @property
    def per_class(self) -> bool:
        return "{number}" in self.name


FORMATS: dict[str, tuple[File, ...]] = {
    "labels": (File("{name}_labels.png", labels_png),),
    "scores": (File("{name}_scores.npz", scores_npz),),
    "scoremaps": (File("{name}_score_{number}.png", _score_png),),
    "masks": (File("{name}_mask_{number}.png", _mask_png),),
    "cutouts": (File("{name}_cutout_{number}.png", _cutout_png),),
    "coco": (File("{name}_coco.json", coco_json),),
    "yolo": (
        File("yolo/labels/{name}.txt", _yolo_txt),
        File("yolo/images/{name}.jpg", _yolo_photo),
    ),
    "cvat": (File(_CVAT + "{name}.png", _cvat_png),),
}
SUMMARIES = {
    "coco": ("coco.json",),
    "yolo": ("yolo/data.yaml",),
    "cvat": ("cvat/labelmap.txt", "cvat/ImageSets/Segmentation/default.txt", "cvat.zip"),
}
_BY_SUFFIX = {".png": labels_png, ".npz": scores_npz, ".json": coco_json}


def by_suffix(path: str) -> Callable[[Segmentation], bytes]:
    """Return what makes the contents of a file of this name. Raise `UserError` if nothing does."""
    suffix = PurePath(path).suffix.lower()
    if suffix not in _BY_SUFFIX:
        raise UserError(f"{path}: end the name with one of {', '.join(_BY_SUFFIX)}")
    return _BY_SUFFIX[suffix]


def names_of(name: str, kind: str, count: int) -> list[str]:
    """Return the files of an image of this `name` that may be written for `count` classes."""
    return [path for path, _, _ in _files(name, kind, count)]


def makers(
    name: str, kind: str, found: Segmentation, source: str
) -> Iterator[tuple[str, Callable[[], bytes | None]]]:
    """Yield each of `names_of` with what makes its contents."""
    for path, encode, number in _files(name, kind, len(found.classes)):
        yield path, functools.partial(encode, found, number, source)


def _files(name: str, kind: str, count: int) -> Iterator[tuple[str, Callable, int]]:
    for file in FORMATS[kind]:
        for number in range(count if file.per_class else 1):
            yield file.name.format(name=name, number=number), file.encode, number


def check(kinds: Sequence[str], classes: Vocabulary) -> None:
    """Raise `UserError` for class names that a format cannot hold."""
    if "cvat" not in kinds:
        return
    for name in classes.names:
        if ":" in name or name.startswith("#"):
            raise UserError(
                f"--format cvat: the class name {name!r} holds a {':#'[':' not in name]!r}, which "
                "has a meaning in CVAT's label map: rename the class"
            )


def summary(
    kind: str, read: Callable[[str], bytes], names: Sequence[str], classes: Vocabulary
) -> dict[str, bytes]:
    """Make what a set of images needs beside their files, which `read` gives by name.

    names: of the results of each image. A zip for CVAT is as large in memory as on disk.
    """
    if kind == "coco":
        return {"coco.json": _joined_coco(read, names, classes)}
    if kind == "yolo":
        listed = "".join(
            f"  {i}: {json.dumps(n, ensure_ascii=False)}\n" for i, n in enumerate(classes.names)
        )
        text = f"train: images\nval: images\nnc: {len(classes)}\nnames:\n{listed}"
        return {"yolo/data.yaml": text.encode()}
    if kind == "cvat":
        return _cvat(read, names, classes)
    return {}


def _joined_coco(read: Callable[[str], bytes], names: Sequence[str], classes: Vocabulary) -> bytes:
    """Join the annotations of all images. Those that share a file name go by their paths."""
    found = [json.loads(read(f"{name}_coco.json")) for name in names]
    counts = collections.Counter(image["file_name"] for one in found for image in one["images"])
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (name, one) in enumerate(zip(names, found, strict=True), 1):
        for image in one["images"]:
            if counts[image["file_name"]] > 1:
                image["file_name"] = json.loads(read(f"{name}.json"))["image"]
            images.append(image | {"id": number})
        for annotation in one["annotations"]:
            annotations.append(annotation | {"id": len(annotations) + 1, "image_id": number})
    return _coco(images, annotations, classes.names)


def _cvat(
    read: Callable[[str], bytes], names: Sequence[str], classes: Vocabulary
) -> dict[str, bytes]:
    """Make CVAT's "Segmentation mask 1.1"; black is what nobody has annotated."""
    colors = cvat_colors(classes).tolist()
    lines = [
        f"{name}:{','.join(map(str, c))}::\n" for name, c in zip(classes.names, colors, strict=True)
    ]
    if not any(map(_is_background, classes.names)):
        lines.insert(0, "background:0,0,0::\n")
    found = {
        "cvat/labelmap.txt": ("# label:color_rgb:parts:actions\n" + "".join(lines)).encode(),
        "cvat/ImageSets/Segmentation/default.txt": "".join(f"{n}\n" for n in names).encode(),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name, data in found.items():
            packed.writestr(name.removeprefix("cvat/"), data)
        for name in names:
            packed.writestr(f"SegmentationClass/{name}.png", read(f"{_CVAT}{name}.png"))
    return found | {"cvat.zip": buffer.getvalue()}


def cvat_colors(classes: Vocabulary) -> np.ndarray:
    """Return colours uint8 [K, 3], all different, black only for a class named background."""
    used = {(0, 0, 0)}
    colors = []
    for name, wanted in zip(classes.names, classes.palette().tolist(), strict=True):
        color = (0, 0, 0) if _is_background(name) else tuple(wanted)
        while color in used and not _is_background(name):  # the next of all colours
            value = (int.from_bytes(bytes(color), "big") + 1) % 2**24
            color = tuple(value.to_bytes(3, "big"))
        used.add(color)
        colors.append(color)
    return np.array(colors, np.uint8)


def _is_background(name: str) -> bool:
    return same_name(name) == "background"
