"""Datasets as random-access, picklable sequences of image/label pairs."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from segdiff_jax.config import SOURCES, DataConfig
from segdiff_jax.data import images
from segdiff_jax.data.images import Header, Photo
from segdiff_jax.data.sources import coco, folder, layouts, scenes
from segdiff_jax.data.sources.layouts import (
    IGNORE,
    IGNORE_16,
    IGNORED,
    OUTSIDE,
    Layout,
    to_labels,
)
from segdiff_jax.errors import UserError
from segdiff_jax.files import is_remote
from segdiff_jax.text.vocabulary import Vocabulary

T = TypeVar("T")


class Source(Protocol):
    """source[i] = {"image": uint8 [H, W, 3], "labels": [H, W], "name": str, of this pair alone}.

    Labels are uint8, 255 for *ignore*; of more than 255 classes uint16 and 65535
    (`codec.label_type`). Sources of files add "ids": {id in the mask file: pixels}. A source may
    have `asked`, the classes that a model is asked for in place of `vocabulary`: the same ones but
    for the last, and beyond them others, which all mean the last.
    """

    vocabulary: Vocabulary
    novel: tuple[int, ...]  # ids that training never shows

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def open_source(config: DataConfig, split: str, seed: int) -> Source:
    """Open the dataset of `config.source`; `split` is one of config.train_split and .val_split.

    `seed` matters to procedural scenes only. Raises `UserError` when the files are not there.
    """
    if config.source == "scenes":
        train = split == config.train_split
        return scenes.ScenesSource(config.scenes, config.image_size, train, seed)
    if config.source == "tfds":
        from segdiff_jax.data.sources.tfds import TfdsSource

        return TfdsSource(config.root, split)
    readers: dict[str, Callable[[DataConfig, str], Layout]] = {
        "folder": folder.folder,
        "ade20k": layouts.ade20k,
        "ade20k_847": layouts.ade20k_847,
        "coco_instances": coco.coco,
        "coco_panoptic": coco.coco,
        "coco_stuff": layouts.coco_stuff,
        "pascal_voc": layouts.pascal_voc,
        "pascal_voc_20b": layouts.pascal_voc_20b,
        "pascal_context_59": layouts.pascal_context,
        "pascal_context_459": layouts.pascal_context,
        "cityscapes": layouts.cityscapes,
    }
    if config.source not in readers:
        choices = ", ".join(SOURCES)
        raise UserError(f"config.data.source={config.source!r}: choose one of {choices}")
    source = PairSource(readers[config.source](config, split), config)
    if not len(source):
        raise UserError(f"{config.root}: no images in split {split!r}, check config.data.root")
    return source


class ForeignIdError(UserError):
    """A mask with an id that is no class and not ignored. `ids`: all of the mask, with pixels."""

    ids: dict[int, int] = {}


class Look(NamedTuple):
    """What a pair shows."""

    ids: dict[int, int]  # id in the mask file: pixels
    turn_unsure: bool = False  # EXIF turns the photo, and nothing tells whether the mask wants that
    guessed_max: int = 0  # the range by which a photo of 16 bits is read if that is a guess, else 0


class PairSource:
    """Image files and the labels that belong to them. lookup, asked, files: see `Layout`."""

    novel: tuple[int, ...] = ()

    def __init__(self, layout: Layout, config: DataConfig):
        self.pairs, self.vocabulary, self.lookup, self.asked, self._drawn, self.files = layout
        self.config = config
        self._names = _names([image for image, _ in self.pairs])
        classes = np.unique(self.lookup[self.lookup >= 0])
        if len(classes) != len(self.vocabulary):
            raise UserError(
                f"{self.vocabulary.name}: {len(self.vocabulary)} classes, but the masks of "
                f"config.data.source={config.source} have {len(classes)}: "
                "correct config.data.vocabulary"
            )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self.pairs):
            raise IndexError(index)
        photo = self._photo(index, images.read_photo)
        labels, ids = self._labels(index, photo.size)
        labels = to_labels(labels, self.lookup, len(self.vocabulary))
        return {"image": photo.pixels, "labels": labels, "name": self._names[index], "ids": ids}

    def look(self, index: int, whole: bool = False) -> Look:
        """Return what pair `index` shows. Raise as reading does, but find less damage in photos.

        whole: decode the photo too, and find all.
        """
        read: Callable[..., Photo | Header] = images.read_photo if whole else images.look_at
        photo = self._photo(index, read)
        labels, ids = self._labels(index, photo.size)
        square = photo.size[0] == photo.size[1]  # else the sizes tell
        unsure = photo.orientation in (2, 3, 4) or (photo.orientation > 4 and square)
        if unsure and not self._drawn:
            mask = images.look_at(self.pairs[index][1], self.config.max_pixels)
            unsure = mask.orientation == 1
        return Look(ids, unsure and self.config.exif == "apply", photo.guessed_max)

    def _photo(self, index: int, read: Callable[..., T]) -> T:
        config, path = self.config, self.pairs[index][0]
        return read(path, config.max_pixels, exif=config.exif, max_value=config.max_value)

    def _labels(self, index: int, size: tuple[int, int]) -> tuple[np.ndarray, dict[int, int]]:
        """Return the ids in the mask of a photo of this size, [H, W], and their pixels."""
        path, config = self.pairs[index][1], self.config
        if self._drawn:
            labels = self._drawn(index)
        else:
            labels = images.read_labels(path, config.max_pixels, exif=config.exif)
        self._check_sizes(index, size, labels.shape)
        ids = count_ids(labels)
        check_ids(ids, self.lookup, path, self.vocabulary, config.source == "folder")
        return labels, ids

    def _check_sizes(self, index: int, image: tuple[int, ...], mask: tuple[int, ...]) -> None:
        if image == mask:
            return
        image_path, mask_path = self.pairs[index]
        which = f" ({os.path.basename(image_path)})" if self._drawn else ""
        mend = "make the sizes equal"
        turned = images.look_at(image_path, self.config.max_pixels).orientation > 4
        if turned and image[::-1] == mask:
            applied = self.config.exif == "apply"
            fits = "stored" if applied else "turned"
            other = "ignore" if applied else "apply"
            mend = (
                "the photo is turned by its EXIF tag, and the mask fits its "
                f"{fits} pixels: set config.data.exif={other}"
            )
        raise UserError(
            f"{mask_path}{which}: {mask[1]}x{mask[0]} pixels, but its image has "
            f"{image[1]}x{image[0]}: {mend}"
        )


def evenly(count: int, length: int) -> list[int]:
    """Return `count` of the positions 0…length-1, evenly spaced; all of them for count = length.

    Neighbouring pairs are often frames of one video.
    """
    return [i * length // count for i in range(count)]


def files_digest(source: Source) -> str:
    """Digest the paths of a source's files and, of local ones, sizes and times.

    A corrected mask gives another digest, unless it lies in a store of objects.
    """
    digest = hashlib.sha256()
    paths = [path for pair in getattr(source, "pairs", ()) for path in pair]
    for path in dict.fromkeys([*paths, *getattr(source, "files", ())]):
        status = None if is_remote(path) or not os.path.exists(path) else os.stat(path)
        digest.update(repr((path, status and (status.st_size, status.st_mtime_ns))).encode())
    return digest.hexdigest()


def _names(photos: Sequence[str]) -> list[str]:
    """Return a name for each of these paths: its stem, or its place where stems occur twice.

    That a photo has no suffix there must not make two names one.
    """
    paths = [PurePosixPath(photo) for photo in photos]
    stems = [path.stem for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    shared = len(os.path.commonprefix([path.parts for path in paths]))
    places = ["/".join(path.with_suffix("").parts[shared:]) for path in paths]
    if len(set(places)) == len(places):
        return places
    return ["/".join(path.parts[shared:]) for path in paths]


def count_ids(labels: np.ndarray) -> dict[int, int]:
    """Count the ids in `labels` [...]: {id: pixels}, in order."""
    if labels.min() < 0 or labels.max() > IGNORE_16:  # a table of ids would be long
        ids, pixels = np.unique(labels, return_counts=True)
        return dict(zip(ids.tolist(), pixels.tolist(), strict=True))
    pixels = np.bincount(labels.ravel())
    return {int(i): int(pixels[i]) for i in np.flatnonzero(pixels)}


def check_ids(
    ids: dict[int, int],
    lookup: np.ndarray,
    path: str,
    vocabulary: Vocabulary,
    configurable: bool = False,
) -> None:
    """Raise `ForeignIdError` for an id that `lookup` knows nothing of.

    configurable: whether the keys of a `folder` can say what it means.
    """
    bad = [i for i in ids if not 0 <= i < len(lookup) or lookup[i] == OUTSIDE]
    if not bad:
        return
    ignored = [int(i) for i in np.flatnonzero(lookup == IGNORED)]
    shown = ", ".join(map(str, ignored[:3])) + (", ..." if len(ignored) > 3 else "")
    mend = _id_mend(sorted(ids), bad, lookup) if configurable else ""
    error = ForeignIdError(
        f"{path}: id {bad[0]} is none of the {len(vocabulary)} classes of {vocabulary.name} "
        f"and not ignored ({shown or 'no id is'}): "
        f"{mend or 'correct the mask or the class list'}"
    )
    error.ids = ids
    raise error


def _id_mend(ids: list[int], bad: list[int], lookup: np.ndarray) -> str:
    """Name the key that would give the ids that are no class a meaning, if one is likely meant."""
    classes = np.flatnonzero(lookup >= 0)
    labelled = [i for i in ids if i not in (IGNORE, IGNORE_16) or i in classes]
    if bad in ([IGNORE], [IGNORE_16]) and len(labelled) > 1:
        ignored = [int(i) for i in np.flatnonzero(lookup == IGNORED)] + bad
        value = ",".join(map(str, ignored))
        return f"to ignore it set config.data.ignore_ids={value}"
    if bad == [int(classes[-1]) + 1] and classes[0] == 0:
        return "if the first class has the id 1 in the masks, set config.data.first_id=1"
    if len(ids) == len(classes) and ids[-1] > classes[-1]:
        return (
            "if each class has a value of its own in the masks, list them in order: "
            f"--config.data.mask_values={','.join(map(str, ids))} --config.data.ignore_ids=()"
        )
    return ""
