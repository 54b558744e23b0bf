"""COCO's JSON: instances as polygons or run-length encodings, and panoptic segments.

    ROOT/annotations/instances_val2017.json     ROOT/val2017/*.jpg or ROOT/images/val2017/*.jpg
    ROOT/annotations/panoptic_val2017.json      … and ROOT/annotations/panoptic_val2017/*.png
    ROOT/val/_annotations.coco.json             beside its photos: what labelling tools export

The classes are the file's categories in their order. Where annotations overlap, the smaller one is
seen. Pixels of no annotation are *ignore*, or "background" where a category has that name.
"""

import dataclasses
import importlib.util
import json
import logging
from collections import Counter
from typing import Any

import numpy as np
from etils import epath

from segdiff_jax import codec, stored
from segdiff_jax.config import DataConfig
from segdiff_jax.data import images
from segdiff_jax.data.sources.layouts import Layout, lookup_of
from segdiff_jax.errors import UserError
from segdiff_jax.files import reading
from segdiff_jax.text import vocabulary as vocabularies
from segdiff_jax.text.vocabulary import ClassEntry, Vocabulary

log = logging.getLogger(__name__)

_PARTS = {"train": "train2017", "val": "val2017"}


def coco(config: DataConfig, split: str) -> Layout:
    """Open the images of one annotation file, whether they have annotations or not."""
    if not importlib.util.find_spec("pycocotools"):
        raise UserError(
            f"config.data.source={config.source}: needs pycocotools: "
            "pip install 'segdiff_jax[coco]'"
        )
    kind, root = config.source.removeprefix("coco_"), epath.Path(config.root)
    file = _annotation_file(root, split, kind)
    about = _read(file, panoptic=kind == "panoptic")
    photos = sorted(about["images"], key=lambda photo: photo["file_name"])
    names = [str(category["name"]) for category in about["categories"]]
    if config.vocabulary:
        vocabulary = vocabularies.load(config.vocabulary)
    else:
        vocabulary = Vocabulary(file.stem, tuple(map(ClassEntry, names)))
    folded = [name.casefold() for name in vocabulary.names]
    ignored = codec.ignore_label(len(names))
    labels = _Labels(
        file,
        [(int(photo["height"]), int(photo["width"])) for photo in photos],
        _by_image(about, photos, file),
        {category["id"]: number for number, category in enumerate(about["categories"])},
        folded.index("background") if "background" in folded else ignored,
        config.max_pixels,
    )
    folder = _photo_folder(root, split, file, photos)
    pairs = [(str(folder / photo["file_name"]), str(file)) for photo in photos]
    lookup = lookup_of(range(len(names)), (ignored,))
    return Layout(pairs, vocabulary, lookup, labels=labels, files=labels.files())


@dataclasses.dataclass(frozen=True)
class _Labels:
    """Draws the labels of a photo. A class because worker processes pickle it."""

    file: epath.Path
    sizes: list[tuple[int, int]]  # of the photos, (H, W)
    annotations: list[list[dict[str, Any]]]  # of each photo
    classes: dict[Any, int]  # category_id: number of the class
    rest: int  # what pixels of no annotation are
    max_pixels: int

    def __call__(self, index: int) -> np.ndarray:
        """Return class numbers [H, W]."""
        labels = np.full(self.sizes[index], self.rest, codec.label_type(len(self.classes)))
        found = self.annotations[index]
        segments = [annotation for annotation in found if "segments_info" in annotation]
        for annotation in segments:
            self._draw_segments(labels, annotation)
        if not segments:
            masks = [(_mask(_outline(a), labels.shape, self.file), a) for a in found]
            for mask, annotation in sorted(masks, key=lambda pair: -int(pair[0].sum())):
                labels[mask] = self._class(annotation["category_id"])
        return labels

    def files(self) -> list[str]:
        """Return the PNGs of panoptic segments."""
        found = (a for annotations in self.annotations for a in annotations)
        return [self._png(annotation) for annotation in found if "segments_info" in annotation]

    def _png(self, annotation: dict[str, Any]) -> str:
        return str(self.file.parent / self.file.stem / annotation["file_name"])

    def _draw_segments(self, labels: np.ndarray, annotation: dict[str, Any]) -> None:
        path = self._png(annotation)
        colors = images.read_image(path, self.max_pixels).astype(np.int64)
        if colors.shape[:2] != labels.shape:
            raise UserError(f"{path}: not of its photo's size: unpack the archive again")
        ids = colors @ np.array([1, 256, 256**2])  # [H, W]
        for segment in annotation["segments_info"]:
            labels[ids == segment["id"]] = self._class(segment["category_id"])

    def _class(self, category: Any) -> int:
        if category not in self.classes:
            raise UserError(f"{self.file}: category_id {category} is none of its categories")
        return self.classes[category]


def _mask(segmentation: Any, size: tuple[int, ...], file: epath.Path) -> np.ndarray:
    """bool [H, W] of polygons [[x, y, x, y, …], …], or of a run-length encoding."""
    from pycocotools import mask as masks  # an extra: only this source needs it

    height, width = size
    try:
        if isinstance(segmentation, list):
            encoded = masks.merge(masks.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            encoded = masks.frPyObjects(segmentation, height, width)
        else:
            encoded = segmentation
        found = masks.decode(encoded).astype(bool)
    except Exception as error:  # whatever its C code makes of what is no mask
        raise UserError(f"{file}: an annotation's segmentation is no mask ({error})") from error
    if found.shape != size:
        raise UserError(
            f"{file}: a mask of {found.shape[1]}x{found.shape[0]} in an image of {width}x{height}"
        )
    return found


def _annotation_file(root: epath.Path, split: str, kind: str) -> epath.Path:
    part = _PARTS.get(split, split)
    choices = [root / "annotations" / f"{kind}_{name}.json" for name in (part, split)]
    if kind == "instances":
        choices += [root / split / "_annotations.coco.json", root / "annotations" / f"{split}.json"]
    with reading(root):
        found = next((path for path in choices if path.exists()), None)
    if found is None:
        raise UserError(f"{choices[0]}: no such file, check config.data.root and the split's name")
    return found


def _read(path: epath.Path, panoptic: bool) -> dict[str, Any]:
    """Read an annotation file, in which each record has what is needed."""
    of_annotation = ("file_name", "segments_info") if panoptic else ("category_id",)
    keys = {
        "images": ("id", "file_name", "height", "width"),
        "annotations": ("image_id", *of_annotation),
        "categories": ("id", "name"),
    }
    try:
        about = json.loads(stored.read_text(path))
        lists = {name: about[name] for name in keys}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no COCO annotations ({error}): fetch the file again") from error
    for name, records in lists.items():
        if not isinstance(records, list):
            raise UserError(f"{path}: its {name!r} is no list: fetch the file again")
        for number, record in enumerate(records):
            for key in keys[name]:
                if not isinstance(record, dict) or record.get(key) is None:
                    raise UserError(f"{path}: {name}[{number}] has no {key!r}: export it again")
    for name, key in (("images", "id"), ("images", "file_name"), ("categories", "id")):
        counts = Counter(record[key] for record in lists[name])
        twice = next((value for value, count in counts.items() if count > 1), None)
        if twice is not None:
            raise UserError(f"{path}: several {name} have the {key!r} {twice!r}: give each its own")
    return lists


def _by_image(
    about: dict[str, Any], photos: list[dict[str, Any]], file: epath.Path
) -> list[list[dict[str, Any]]]:
    """Return the annotations of each photo, without those that have no area."""
    found: dict[Any, list[dict[str, Any]]] = {photo["id"]: [] for photo in photos}
    flat = 0
    for number, annotation in enumerate(about["annotations"]):
        image = annotation["image_id"]
        if image not in found:
            raise UserError(
                f"{file}: annotations[{number}] is of image {image!r}, which its images do not "
                "have: export it again"
            )
        if "segments_info" in annotation or _outline(annotation):
            found[image].append(annotation)
        else:
            flat += 1
    if flat:
        what = f"{flat} of {len(about['annotations'])} annotations have no area"
        log.warning("%s: %s (boxes, lines, points) and are left out", file, what)
    return list(found.values())


def _outline(annotation: dict[str, Any]) -> Any:
    """Return its run-length encoding, or its polygons of three corners and more."""
    found = annotation.get("segmentation")
    if not isinstance(found, list):
        return found
    return [part for part in found if not isinstance(part, list) or len(part) >= 6]


def _photo_folder(root: epath.Path, split: str, file: epath.Path, photos: list[Any]) -> epath.Path:
    part = _PARTS.get(split, split)
    names = (part, f"images/{part}", split, f"images/{split}", "images", "")
    choices = [file.parent, *(root / name for name in names)]
    for folder in choices:
        if photos and (folder / photos[0]["file_name"]).exists():
            return folder
    what = photos[0]["file_name"] if photos else "images"
    raise UserError(f"{root}: no {what} in it or in {part}, images/{part}: check config.data.root")
