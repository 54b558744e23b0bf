"""Where the published data sets keep images and masks.

Each function returns the pairs of a split and how the ids of their files become classes.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from segdiff_jax import codec, stored
from segdiff_jax.config import DataConfig
from segdiff_jax.data.sources.pairing import (
    Pairs,
    is_image,
    listing,
    nearby,
    no_folder,
    pairs,
    pairs_by_mask,
)
from segdiff_jax.errors import UserError
from segdiff_jax.files import dangling
from segdiff_jax.text import vocabulary as vocabularies
from segdiff_jax.text.vocabulary import ClassEntry, Vocabulary

IGNORE, IGNORE_16 = codec.IGNORE, codec.IGNORE_16  # what files of 8 and of 16 bits ignore
OUTSIDE, IGNORED = -1, -2  # mark, in a lookup table, ids that are no class and ids to ignore
# Of the 182 ids of COCO-Stuff's own PNGs (0-based), those that COCO never annotated.
_COCO_UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
# Of Cityscapes' labelIds 0…33, those of the 19 train ids, in their order.
_CITYSCAPES_TRAINED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CITYSCAPES_IDS = 34


class Layout(NamedTuple):
    """lookup: int32 [n], from the id in a file to the class id, `IGNORED` or `OUTSIDE`.

    asked: what a benchmark has predicted in place of `vocabulary`, see `Source`.
    labels: returns the ids of pair `index`, [H, W], where masks are no images. Picklable.
    files: those that `labels` reads beside the pairs.
    """

    pairs: Pairs
    vocabulary: Vocabulary
    lookup: np.ndarray
    asked: Vocabulary | None = None
    labels: Callable[[int], np.ndarray] | None = None
    files: Sequence[str] = ()


def lookup_of(classes: Iterable[int], ignored: Iterable[int]) -> np.ndarray:
    """Return the table int32 [n] in which the class i has the id classes[i] in the files."""
    values, ignored = list(classes), list(ignored)
    lookup = np.full(max(256, *(value + 1 for value in (*values, *ignored, 0))), OUTSIDE, np.int32)
    lookup[values] = np.arange(len(values))
    lookup[ignored] = IGNORED
    return lookup


def to_labels(ids: np.ndarray, lookup: np.ndarray, num_classes: int) -> np.ndarray:
    """Map ids of a file [H, W], none of them `OUTSIDE`, to labels of `codec.label_type`."""
    table = np.where(lookup < 0, codec.ignore_label(num_classes), lookup)
    return table.astype(codec.label_type(num_classes))[ids]


def ade20k(config: DataConfig, split: str) -> Layout:
    root = _descend(config.root, "ADEChallengeData2016")
    part = {"train": "training", "val": "validation"}.get(split, split)
    images, masks = root / "images" / part, root / "annotations" / part
    if not images.is_dir():
        raise no_folder(images, nearby(root, "ade20k"))
    vocabulary = vocabularies.load(config.vocabulary or "ade20k_150")
    return Layout(pairs(images, masks), vocabulary, shifted_lookup())


def shifted_lookup() -> np.ndarray:
    """Return ADE20K's table int32 [256]: 0 is *other* and classes are 1…150."""
    return lookup_of(range(1, 151), (0, IGNORE))


def ade20k_847(config: DataConfig, split: str) -> Layout:
    """Open the full ADE20K as detectron2's preparation writes it: 16-bit TIFFs of 847 classes."""
    root = _descend(config.root, "ADE20K_2021_17_01")
    part = {"train": "training", "val": "validation"}.get(split, split)
    found = _prepared(root, f"images_detectron2/{part}", f"annotations_detectron2/{part}")
    vocabulary = vocabularies.load(config.vocabulary or "ade20k_847")
    return Layout(found, vocabulary, lookup_of(range(847), (IGNORE_16,)))


def pascal_context(config: DataConfig, split: str) -> Layout:
    """Open detectron2's preparation of VOC 2010, with 59 or 459 classes.

    PNGs of 59 ignore the background. In TIFFs of 16 bits, of 459, 255 is a class; what is ignored
    is 459 to some authors and 65535 to others.
    """
    count = int(config.source.removeprefix("pascal_context_"))
    voc = _voc_root(existing(config.root), (10,))
    found = _prepared(voc, "JPEGImages", f"annotations_detectron2/pc{count}_{split}")
    ignored = (IGNORE,) if count == 59 else (459, IGNORE_16)
    vocabulary = vocabularies.load(config.vocabulary or config.source)
    return Layout(found, vocabulary, lookup_of(range(count), ignored))


def _prepared(root: epath.Path, images: str, masks: str) -> Pairs:
    """Pair what detectron2's preparation scripts have written; the masks are the split."""
    for folder in (images, masks):
        if not (root / folder).is_dir():
            advice = ", or prepare the data set for detectron2 first (docs/data.md)"
            raise no_folder(root / folder, advice)
    return pairs_by_mask(root / images, root / masks)


def coco_stuff(config: DataConfig, split: str) -> Layout:
    """Open images in images/train2017 or train2017, and their labels.

    Labels are either COCO-Stuff's own 182 ids (stuffthingmaps) or the 171 train ids that
    mmsegmentation's converter writes beside them.
    """
    root = _descend(config.root, "coco_stuff164k")
    part = {"train": "train2017", "val": "val2017"}.get(split, split)
    image_folder = _first_folder(root, (f"images/{part}", part), "coco_stuff")
    parents = ("annotations", "stuffthingmaps", "stuffthingmaps_trainval2017")
    mask_folder = _first_folder(root, tuple(f"{p}/{part}" for p in parents), "coco_stuff")
    vocabulary = vocabularies.load(config.vocabulary or "coco_stuff_171")
    suffix = "_labelTrainIds"
    converted = any(path.stem.endswith(suffix) for path in mask_folder.iterdir())
    found = pairs(image_folder, mask_folder, suffix if converted else "")
    lookup = lookup_of(range(171), (IGNORE,)) if converted else coco_stuff_lookup()
    return Layout(found, vocabulary, lookup)


def coco_stuff_lookup() -> np.ndarray:
    """Return the table int32 [256] from COCO-Stuff's 182 ids to the 171 annotated classes."""
    return lookup_of([i for i in range(182) if i not in _COCO_UNUSED], (IGNORE,))


def pascal_voc(config: DataConfig, split: str) -> Layout:
    """Open the devkit's tree."""
    root = _voc_root(existing(config.root))
    vocabulary = vocabularies.load(config.vocabulary or "pascal_voc_21")
    if len(vocabulary) not in (20, 21):
        raise UserError(
            f"{vocabulary.name}: {len(vocabulary)} classes, but the masks of pascal_voc have 20, "
            "or 21 with background: correct config.data.vocabulary"
        )
    background = len(vocabulary) == 21
    lookup = lookup_of(range(21), (IGNORE,)) if background else lookup_of(range(1, 21), (0, IGNORE))
    return Layout(_voc_pairs(root, split), vocabulary, lookup)


def pascal_voc_20b(config: DataConfig, split: str) -> Layout:
    """Open VOC with its 20 classes and background, which is what none of them is.

    A model is asked for the 59 names of Pascal Context, and whatever it says beyond VOC's 20 counts
    as background.
    """
    root = _voc_root(existing(config.root))
    voc, context = (vocabularies.load(name) for name in ("pascal_voc_20", "pascal_context_59"))
    rest = tuple(entry for entry in context.classes if entry.name not in voc.names)
    vocabulary = Vocabulary("pascal_voc_20b", (*voc.classes, ClassEntry("background")))
    asked = Vocabulary("pascal_voc_20b", (*voc.classes, *rest))
    prepared = f"annotations_detectron2_bg/{split}"
    if (root / prepared).is_dir():
        found, lookup = _prepared(root, "JPEGImages", prepared), lookup_of(range(21), (IGNORE,))
    else:
        found, lookup = _voc_pairs(root, split), lookup_of((*range(1, 21), 0), (IGNORE,))
    return Layout(found, vocabulary, lookup, asked)


def _voc_pairs(root: epath.Path, split: str) -> Pairs:
    """List the pairs of a list in ImageSets/Segmentation.

    Masks that SegmentationClass does not have are taken from SegmentationClassAug, if it is there.
    """
    folders = [root / "SegmentationClass", root / "SegmentationClassAug"]
    masks = [_names(folder) for folder in folders]
    images = _names(root / "JPEGImages")
    found = []
    for name in _voc_list(root, split):
        mask = next((have[name] for have in masks if name in have), None)
        if name not in images or mask is None:
            where = folders[0] if name in images else root / "JPEGImages"
            raise UserError(
                f"{where}: has no image of {name!r}, which is in the list of {split!r}: "
                "unpack the whole archive, or correct the list"
            )
        found.append((images[name], mask))
    return found


def _voc_root(root: epath.Path, years: Sequence[int] = range(12, 6, -1)) -> epath.Path:
    """Return `root` or the folder in it that holds JPEGImages: the first of several years."""
    parents = (root, root / "VOCdevkit")
    names = [f"VOC20{year:02d}" for year in years]
    for choice in (root, *(parent / name for name in names for parent in parents)):
        if (choice / "JPEGImages").is_dir():
            return choice
    raise UserError(
        f"{root}: no folder JPEGImages, {names[0]} or VOCdevkit, check config.data.root"
        f"{nearby(root, 'pascal_voc')}"
    )


def _voc_list(root: epath.Path, split: str) -> list[str]:
    lists = root / "ImageSets" / "Segmentation"
    listed = lists.iterdir() if lists.is_dir() else ()
    have = sorted(path.stem for path in listed if path.suffix == ".txt")
    mend = f"choose one of {', '.join(have)}" if have else "unpack the whole archive"
    lines = stored.read_text(lists / f"{split}.txt", mend).splitlines()
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def _names(folder: epath.Path) -> dict[str, str]:
    if not folder.is_dir():
        return {}
    return {path.stem: str(path) for path in folder.iterdir() if is_image(path.name)}


def cityscapes(config: DataConfig, split: str) -> Layout:
    """Open leftImg8bit and gtFine as unpacked.

    Masks are labelTrainIds where all images have them, else labelIds, of which the 19 trained
    classes are kept.
    """
    root = existing(config.root)
    if not (root / "leftImg8bit").is_dir() and root.name == "leftImg8bit":
        root = root.parent
    images = root / "leftImg8bit" / split
    masks = root / "gtFine" / split
    for place in (images, masks):
        if not place.is_dir():
            beside = place.parent.iterdir() if place.parent.is_dir() else ()
            splits = sorted(path.name for path in beside if path.is_dir())
            found = f"; found {', '.join(splits)}" if splits else nearby(root, "cityscapes")
            raise no_folder(place, found)
    vocabulary = vocabularies.load(config.vocabulary or "cityscapes_19")
    count = _count(images, "_leftImg8bit")
    trained = _count(masks, "_gtFine_labelTrainIds")
    if trained and trained >= count:
        suffix, lookup = "_gtFine_labelTrainIds", lookup_of(range(19), (IGNORE,))
    else:
        suffix, rest = "_gtFine_labelIds", set(range(_CITYSCAPES_IDS)) - set(_CITYSCAPES_TRAINED)
        lookup = lookup_of(_CITYSCAPES_TRAINED, (*rest, IGNORE))
    return Layout(pairs(images, masks, suffix, "_leftImg8bit"), vocabulary, lookup)


def _count(folder: epath.Path, suffix: str) -> int:
    return sum(name.endswith(f"{suffix}.png") for name in listing(folder))


def existing(root: str) -> epath.Path:
    path = epath.Path(root)
    if not path.is_dir():
        absent = f"config.data.root={root}: no such folder, correct the path"
        raise UserError(dangling(path) or absent)
    return path


def _descend(root: str, name: str) -> epath.Path:
    """Return `root`, or the dataset's own folder inside it."""
    path = existing(root)
    return path / name if (path / name).is_dir() else path


def _first_folder(root: epath.Path, names: Iterable[str], source: str) -> epath.Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise UserError(
        f"{root}: no folder {' or '.join(names)}, check config.data.root{nearby(root, source)}"
    )
