"""A folder of one's own: images and masks of equal names, by split."""

import numpy as np
from etils import epath

from segdiff_jax.config import DataConfig
from segdiff_jax.data.sources.layouts import IGNORE, IGNORE_16, Layout, existing, lookup_of
from segdiff_jax.data.sources.pairing import is_image, nearby, no_folder, pairs
from segdiff_jax.errors import UserError
from segdiff_jax.files import dangling
from segdiff_jax.text import vocabulary as vocabularies
from segdiff_jax.text.vocabulary import Vocabulary

# Of folders of masks, in place of "masks".
_OTHER_NAMES = ("mask", "labels", "label", "annotations", "gt", "segmentation", "SegmentationClass")


def folder(config: DataConfig, split: str) -> Layout:
    """Open SPLIT/images and SPLIT/masks, images/SPLIT and masks/SPLIT, or images and masks.

    With data.mask_suffix the masks may lie beside the images.
    """
    root = existing(config.root)
    images, masks = _folders_of(root, config, split)
    found = pairs(images, masks, config.mask_suffix)
    if not found:
        raise UserError(f"{images}: no images in split {split!r}{_unread(images)}")
    vocabulary = vocabularies.load(config.vocabulary or _class_file(root))
    return Layout(found, vocabulary, _configured_lookup(config, vocabulary))


def _folders_of(root: epath.Path, config: DataConfig, split: str) -> tuple[epath.Path, epath.Path]:
    nested = [root / split, root / "images" / split]
    choices = [(nested[0] / "images", nested[0] / "masks"), (nested[1], root / "masks" / split)]
    splits = {split, config.train_split, config.val_split}
    if not (root / split).is_dir() and not any((root / "images" / s).is_dir() for s in splits):
        choices.append((root / "images", root / "masks"))
    suffixed = bool(config.mask_suffix)
    for images, masks in choices:
        if images.is_dir():
            if masks.is_dir():
                return images, masks
            if suffixed:
                return images, images
            raise no_folder(masks, _other_names(masks) + nearby(masks.parent, "folder"))
    if suffixed:
        beside = root / split if (root / split).is_dir() else root
        if beside != root or not any((root / s).is_dir() for s in splits):
            return beside, beside
    images = choices[-1][0] if len(choices) == 2 and nested[1].is_dir() else choices[0][0]
    raise no_folder(images, nearby(root, "folder"))


def _other_names(masks: epath.Path) -> str:
    """Say where the masks lie under another usual name: "; found labels: …"."""
    for name in _OTHER_NAMES:
        if (masks.parent / name).is_dir():
            return f"; found {masks.parent / name}: rename it to {masks.name} if it holds the masks"
    return ""


def _unread(folder: epath.Path) -> str:
    """Say what an empty folder holds that is no image to us: "; found 3 *.heic"."""
    counts: dict[str, int] = {}
    for path in folder.iterdir():
        if not is_image(path.name) and path.suffix and not path.name.startswith("."):
            counts[path.suffix] = counts.get(path.suffix, 0) + 1
    if not counts:
        return ", check config.data.root"
    ending = max(counts, key=lambda suffix: counts[suffix])
    return f"; found {counts[ending]} *{ending}, which are not read: save them as PNG or JPEG"


def _class_file(root: epath.Path) -> epath.Path:
    path = root / "classes.txt"
    if not path.exists():
        mend = "write one class name a line in id order or set config.data.vocabulary"
        raise UserError(dangling(path) or f"{path}: no such file, {mend}")
    return path


def _configured_lookup(config: DataConfig, vocabulary: Vocabulary) -> np.ndarray:
    """Return the table of data.first_id, .mask_values and .ignore_ids.

    Ids below the first class's are ignored.
    """
    count, first = len(vocabulary), config.first_id
    if count > IGNORE_16:
        raise UserError(
            f"{vocabulary.name}: {count} classes, but a label map holds at most {IGNORE_16}: "
            "shorten the class list"
        )
    if config.mask_values and len(config.mask_values) != count:
        raise UserError(
            f"config.data.mask_values={config.mask_values}: {len(config.mask_values)} values for "
            f"the {count} classes of {vocabulary.name}: give one for each, in order"
        )
    values = config.mask_values or tuple(range(first, first + count))
    if config.mask_values and (first or len(set(values)) < count):
        twice = "leave config.data.first_id out" if first else "give each class a value of its own"
        raise UserError(f"config.data.mask_values={config.mask_values}: {twice}")
    both = sorted(set(values) & set(config.ignore_ids))
    if both:
        name = vocabulary.names[values.index(both[0])]
        rest = ",".join(str(i) for i in config.ignore_ids if i not in both)
        rest = rest or ("()" if count <= IGNORE else str(IGNORE_16))  # 255 is the default
        raise UserError(
            f"id {both[0]} in the masks would be the class {name!r} and ignored "
            f"(config.data.ignore_ids): set --config.data.ignore_ids={rest}, or change "
            f"config.data.{'mask_values' if config.mask_values else 'first_id'}"
        )
    return lookup_of(values, {*config.ignore_ids, *range(0 if config.mask_values else first)})
