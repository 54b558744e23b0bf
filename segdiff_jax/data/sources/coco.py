"""COCO's JSON: instances as polygons or run-length encodings, and panoptic segments.

    ROOT/annotations/instances_val2017.json     ROOT/val2017/*.jpg or ROOT/images/val2017/*.jpg
    ROOT/annotations/panoptic_val2017.json      … and ROOT/annotations/panoptic_val2017/*.png
    ROOT/val/_annotations.coco.json             beside its photos: what labelling tools export

The classes are the file's categories in their order. Where annotations overlap, the smaller one is
seen. Pixels of no annotation are *ignore*, or "background" where a category has that name.
"""

import importlib.util
import json
from collections import defaultdict
from typing import Any

import numpy as np
from etils import epath

from segdiff_jax import codec
from segdiff_jax.config import DataConfig
from segdiff_jax.data import images
from segdiff_jax.data.sources.memory import Memory
from segdiff_jax.errors import UserError
from segdiff_jax.files import reading
from segdiff_jax.text import vocabulary as vocabularies
from segdiff_jax.text.vocabulary import ClassEntry, Vocabulary

_PARTS = {"train": "train2017", "val": "val2017"}


class CocoSource:
    """The images of one annotation file, whether they have annotations or not."""

    novel: tuple[int, ...] = ()

    def __init__(self, config: DataConfig, split: str):
        if not importlib.util.find_spec("pycocotools"):
            raise UserError(
                f"config.data.source={config.source}: needs pycocotools: "
                "pip install 'segdiff_jax[coco]'"
            )
        kind = config.source.removeprefix("coco_")
        root = epath.Path(config.root)
        self._file = _annotation_file(root, split, kind)
        about = _read(self._file)
        self.config, self._panoptic = config, kind == "panoptic"
        self._memory = Memory(config.cache_images)
        self.vocabulary, self._classes = _vocabulary(about["categories"], config, self._file)
        names = [name.casefold() for name in self.vocabulary.names]
        ignored = codec.ignore_label(len(names))
        self._rest = names.index("background") if "background" in names else ignored
        self._photos = sorted(about["images"], key=lambda photo: photo["file_name"])
        of_image = defaultdict(list)
        for annotation in about["annotations"]:
            of_image[annotation["image_id"]].append(annotation)
        self._annotations = [of_image[photo["id"]] for photo in self._photos]
        folder = _photo_folder(root, split, self._file, self._photos)
        self.pairs = [(str(folder / p["file_name"]), str(self._file)) for p in self._photos]
        self._masks = self._file.parent / self._file.stem

    def __len__(self) -> int:
        return len(self._photos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._memory.get(index, self._make)

    def _make(self, index: int) -> dict[str, Any]:
        path = self.pairs[index][0]
        # Annotations are drawn on the pixels as they are stored.
        options: dict[str, Any] = {"exif": "ignore", "max_value": self.config.max_value}
        image = images.read_image(path, self.config.max_pixels, **options)
        photo, size = self._photos[index], image.shape[:2]
        if size != (photo["height"], photo["width"]):
            raise UserError(
                f"{path}: {size[1]}x{size[0]} pixels, but {self._file} says "
                f"{photo['width']}x{photo['height']}: restore the photo that was annotated"
            )
        labels = np.full(size, self._rest, codec.label_type(len(self.vocabulary)))
        draw = self._draw_segments if self._panoptic else self._draw_instances
        draw(labels, self._annotations[index])
        return {"image": image, "labels": labels, "name": epath.Path(path).stem}

    def _draw_instances(self, labels: np.ndarray, annotations: list[dict[str, Any]]) -> None:
        masks = [(_mask(a["segmentation"], labels.shape, self._file), a) for a in annotations]
        for mask, annotation in sorted(masks, key=lambda pair: -int(pair[0].sum())):
            labels[mask] = self._class(annotation["category_id"])

    def _draw_segments(self, labels: np.ndarray, annotations: list[dict[str, Any]]) -> None:
        for annotation in annotations:
            path = self._masks / annotation["file_name"]
            colors = images.read_image(str(path), self.config.max_pixels).astype(np.int64)
            if colors.shape[:2] != labels.shape:
                raise UserError(f"{path}: not of its photo's size: unpack the archive again")
            ids = colors @ np.array([1, 256, 256**2])  # [H, W]
            for segment in annotation["segments_info"]:
                labels[ids == segment["id"]] = self._class(segment["category_id"])

    def _class(self, category: int) -> int:
        if category not in self._classes:
            raise UserError(f"{self._file}: category_id {category} is none of its categories")
        return self._classes[category]


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
            f"{file}: a mask of {found.shape[1]}x{found.shape[0]} in an image of other size"
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


def _read(path: epath.Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text())
        missing = [
            k for k in ("images", "annotations", "categories") if not isinstance(about[k], list)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no COCO annotations ({error}): fetch the file again") from error
    if missing:
        raise UserError(f"{path}: its {missing[0]!r} is no list: fetch the file again")
    return about


def _vocabulary(
    categories: list[dict[str, Any]], config: DataConfig, file: epath.Path
) -> tuple[Vocabulary, dict[int, int]]:
    """The classes, and class id by category id."""
    classes = {category["id"]: number for number, category in enumerate(categories)}
    if not config.vocabulary:
        entries = tuple(ClassEntry(str(category["name"])) for category in categories)
        return Vocabulary(file.stem, entries), classes
    vocabulary = vocabularies.load(config.vocabulary)
    if len(vocabulary) != len(categories):
        raise UserError(
            f"{vocabulary.name}: {len(vocabulary)} classes, but {file} has {len(categories)} "
            "categories: correct config.data.vocabulary"
        )
    return vocabulary, classes


def _photo_folder(root: epath.Path, split: str, file: epath.Path, photos: list[Any]) -> epath.Path:
    part = _PARTS.get(split, split)
    names = (part, f"images/{part}", split, f"images/{split}", "images", "")
    choices = [file.parent, *(root / name for name in names)]
    for folder in choices:
        if photos and (folder / photos[0]["file_name"]).exists():
            return folder
    what = photos[0]["file_name"] if photos else "images"
    raise UserError(f"{root}: no {what} in it or in {part}, images/{part}: check config.data.root")
