"""Datasets as random-access, picklable sequences of image/label pairs."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
from etils import epath

from segdiff_jax.config import DataConfig
from segdiff_jax.data import images, scenes
from segdiff_jax.data import vocabulary as vocabularies
from segdiff_jax.data.memory import Memory
from segdiff_jax.data.vocabulary import Vocabulary
from segdiff_jax.errors import UserError

IGNORE = 255
_OUTSIDE = -1  # marks ids that are no class in a lookup table
IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".webp"),
    *(".tif", ".tiff", ".gif", ".ppm", ".pgm"),
)
# Of the 182 ids of COCO-Stuff's own PNGs (0-based), those that COCO never annotated.
_COCO_UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)


class Source(Protocol):
    """source[i] = {"image": uint8 [H, W, 3], "labels": uint8 [H, W] (255: ignore), "name": str}."""

    vocabulary: Vocabulary
    novel: tuple[int, ...]  # ids that training never shows

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def open_source(config: DataConfig, split: str, seed: int) -> Source:
    """The dataset of `config.source`; `split` is one of config.train_split and .val_split.

    `seed` matters to procedural scenes only. Raises `UserError` when the files are not there.
    """
    if config.source == "scenes":
        train = split == config.train_split
        keep = config.cache_images
        return scenes.ScenesSource(config.scenes, config.image_size, train, seed, keep)
    readers: dict[str, Callable[[DataConfig, str], Source]] = {
        "folder": _folder,
        "ade20k": _ade20k,
        "coco_stuff": _coco_stuff,
        "tfds": _tfds,
    }
    if config.source not in readers:
        choices = ", ".join(("scenes", *readers))
        raise UserError(f"config.data.source={config.source!r}: choose one of {choices}")
    source = readers[config.source](config, split)
    if not len(source):
        raise UserError(f"{config.root}: no images in split {split!r}, check config.data.root")
    return source


class PairSource:
    """Image files and the label files that belong to them.

    lookup: int16 [256], from the id in the file to the class id; `_OUTSIDE` is an error.
    """

    novel: tuple[int, ...] = ()

    def __init__(
        self,
        pairs: list[tuple[str, str]],
        vocabulary: Vocabulary,
        lookup: np.ndarray,
        cache: bool,
    ):
        self.pairs = pairs
        self.vocabulary = vocabulary
        self.lookup = lookup
        self._memory = Memory(cache)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self.pairs):
            raise IndexError(index)
        return self._memory.get(index, self._read)

    def _read(self, index: int) -> dict[str, Any]:
        image_path, mask_path = self.pairs[index]
        image = images.read_image(image_path)
        labels = images.read_labels(mask_path)
        if image.shape[:2] != labels.shape:
            raise UserError(
                f"{mask_path}: {labels.shape[1]}x{labels.shape[0]} pixels, but its image has "
                f"{image.shape[1]}x{image.shape[0]}: make the sizes equal"
            )
        labels = to_class_ids(labels, self.lookup, mask_path, self.vocabulary)
        return {"image": image, "labels": labels, "name": epath.Path(image_path).stem}


def to_class_ids(
    labels: np.ndarray, lookup: np.ndarray, path: str, vocabulary: Vocabulary
) -> np.ndarray:
    """uint8 [H, W]: `labels` through `lookup`; `UserError` for an id that is no class."""
    low, high = int(labels.min()), int(labels.max())
    outside = low if low < 0 else high
    if 0 <= low <= high <= 255:
        present = np.flatnonzero(np.bincount(labels.ravel(), minlength=256))
        bad = present[lookup[present] == _OUTSIDE]
        if not bad.size:
            return lookup.astype(np.uint8)[labels]
        outside = int(bad[0])
    raise UserError(
        f"{path}: id {outside} is none of the {len(vocabulary)} classes of {vocabulary.name} "
        f"and not {IGNORE} (ignore): correct the mask or the class list"
    )


def _identity_lookup(vocabulary: Vocabulary) -> np.ndarray:
    """int16 [256]: ids as they are, 255 is ignore."""
    if len(vocabulary) > IGNORE:
        raise UserError(
            f"{vocabulary.name}: {len(vocabulary)} classes, but a label map holds at most "
            f"{IGNORE}: shorten the class list"
        )
    lookup = np.full(256, _OUTSIDE, np.int16)
    lookup[: len(vocabulary)] = np.arange(len(vocabulary))
    lookup[IGNORE] = IGNORE
    return lookup


def shifted_lookup() -> np.ndarray:
    """int16 [256]: ADE20K's ids, where 0 is *other* and classes are 1…150."""
    lookup = np.full(256, _OUTSIDE, np.int16)
    lookup[1:151] = np.arange(150)
    lookup[[0, IGNORE]] = IGNORE
    return lookup


def coco_stuff_lookup() -> np.ndarray:
    """int16 [256]: the 182 ids of COCO-Stuff's PNGs to the 171 classes that are annotated."""
    lookup = np.full(256, _OUTSIDE, np.int16)
    used = np.setdiff1d(np.arange(182), _COCO_UNUSED)
    lookup[used] = np.arange(len(used))
    lookup[IGNORE] = IGNORE
    return lookup


def _folder(config: DataConfig, split: str) -> Source:
    root = epath.Path(config.root)
    if not root.is_dir():
        raise UserError(f"config.data.root={config.root}: no such folder, correct the path")
    flat = not (root / split).is_dir() and (root / "images").is_dir()
    base = root if flat else root / split
    pairs = _pairs(base / "images", base / "masks")
    vocabulary = vocabularies.load(config.vocabulary or _class_file(root))
    return PairSource(pairs, vocabulary, _identity_lookup(vocabulary), config.cache_images)


def _class_file(root: epath.Path) -> epath.Path:
    path = root / "classes.txt"
    if not path.exists():
        raise UserError(
            f"{path}: no such file, write one class name a line in id order "
            "or set config.data.vocabulary"
        )
    return path


def _ade20k(config: DataConfig, split: str) -> Source:
    root = _descend(config.root, "ADEChallengeData2016")
    part = {"train": "training", "val": "validation"}.get(split, split)
    pairs = _pairs(root / "images" / part, root / "annotations" / part)
    vocabulary = vocabularies.load(config.vocabulary or "ade20k_150")
    return PairSource(pairs, vocabulary, shifted_lookup(), config.cache_images)


def _coco_stuff(config: DataConfig, split: str) -> Source:
    """Images in images/train2017 or train2017. Labels are either COCO-Stuff's own 182 ids
    (stuffthingmaps) or the 171 train ids that mmsegmentation's converter writes beside them."""
    root = _descend(config.root, "coco_stuff164k")
    part = {"train": "train2017", "val": "val2017"}.get(split, split)
    image_folder = _first_folder(root, (f"images/{part}", part))
    parents = ("annotations", "stuffthingmaps", "stuffthingmaps_trainval2017")
    mask_folder = _first_folder(root, tuple(f"{parent}/{part}" for parent in parents))
    vocabulary = vocabularies.load(config.vocabulary or "coco_stuff_171")
    suffix = "_labelTrainIds"
    converted = any(path.stem.endswith(suffix) for path in mask_folder.iterdir())
    pairs = _pairs(image_folder, mask_folder, suffix if converted else "")
    lookup = _identity_lookup(vocabulary) if converted else coco_stuff_lookup()
    return PairSource(pairs, vocabulary, lookup, config.cache_images)


def _descend(root: str, name: str) -> epath.Path:
    """`root`, or the dataset's own folder inside it."""
    path = epath.Path(root)
    if not path.is_dir():
        raise UserError(f"config.data.root={root}: no such folder, correct the path")
    return path / name if (path / name).is_dir() else path


def _first_folder(root: epath.Path, names: Iterable[str]) -> epath.Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise UserError(f"{root}: no folder {' or '.join(names)}, check config.data.root")


def _pairs(
    image_folder: epath.Path, mask_folder: epath.Path, mask_suffix: str = ""
) -> list[tuple[str, str]]:
    """Images and masks of the same stem, by name. Every image must have a mask."""
    image_files, mask_files = _by_stem(image_folder), _by_stem(mask_folder)
    for stem, path in image_files.items():
        if stem + mask_suffix not in mask_files:
            raise UserError(
                f"{path}: no mask {mask_folder / (stem + mask_suffix)}.png, "
                "add it or remove the image"
            )
    return [
        (str(path), str(mask_files[stem + mask_suffix]))
        for stem, path in sorted(image_files.items())
    ]


def _by_stem(folder: epath.Path) -> dict[str, epath.Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, check config.data.root and the split's name")
    files: dict[str, epath.Path] = {}
    for path in folder.iterdir():
        if path.suffix.lower() not in IMAGE_EXTENSIONS or path.name.startswith("."):
            continue
        if path.stem in files:
            raise UserError(
                f"{path}: has the same stem as {files[path.stem].name}, rename or remove one"
            )
        files[path.stem] = path
    return files


def _tfds(config: DataConfig, split: str) -> Source:
    from segdiff_jax.data.tfds_source import TfdsSource  # it imports this module

    return TfdsSource(config.root, split)
