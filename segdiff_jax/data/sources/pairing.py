"""Which images and masks of two folders belong together; where none do, what lies nearby."""

import contextlib
import itertools
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import NoReturn

import fsspec
from etils import epath

from segdiff_jax.errors import UserError
from segdiff_jax.files import dangling, is_remote, reading

_IMAGES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".webp"),
    *(".tif", ".tiff", ".gif", ".ppm", ".pgm"),
)
_FILES_GLANCED_AT = 500_000  # where a data set is not found: a wrong path may be that of a disk
_SHOWN = 4  # of a list in a message

Pairs = list[tuple[str, str]]


def pairs(
    image_folder: epath.Path,
    mask_folder: epath.Path,
    mask_suffix: str = "",
    image_suffix: str = "",
) -> Pairs:
    """List (image, mask) of equal names, in the order of the names.

    A name is the path below the folder without extension and suffix. Upper and lower case may
    differ where that leaves no doubt. Both folders may be the same, if the masks have a suffix.
    Masks without an image are left out, with a warning that counts them. Raises `UserError` for an
    image without mask, for files that share a name, and for folders that do not exist.
    """
    beside = mask_folder == image_folder
    images = _by_name(image_folder, image_suffix, without=mask_suffix if beside else "")
    masks = _by_name(mask_folder, mask_suffix)
    folded = {_folded(name): path for name, path in masks.items()}
    found = {name: folded.get(_folded(name)) for name in images}
    lonely = [name for name, mask in found.items() if mask is None]
    if lonely:
        _refuse_without_mask(images, lonely, mask_folder, mask_suffix)
    extra = sorted(set(masks.values()) - set(found.values()))
    if extra and images:
        what = "mask has" if len(extra) == 1 else "masks have"
        logging.warning("%d %s no image and are left out, such as %s", len(extra), what, extra[0])
    return [(images[name], found[name] or "") for name in sorted(images)]


def pairs_by_mask(image_folder: epath.Path, mask_folder: epath.Path) -> Pairs:
    """List (image, mask) of each mask, in the order of the names; other images are passed over.

    Raises `UserError` for a mask without image and a folder without masks.
    """
    masks = _by_name(mask_folder)
    if not masks:
        raise UserError(f"{mask_folder}: no masks, prepare the data set again")
    images = _by_name(image_folder)
    lonely = sorted(set(masks) - set(images))
    if lonely:
        raise UserError(
            f"{masks[lonely[0]]}: no image {image_folder / lonely[0]}.jpg "
            f"({len(lonely)} of {len(masks)} masks have none): unpack the whole archive"
        )
    return [(images[name], masks[name]) for name in sorted(masks)]


def _refuse_without_mask(
    images: dict[str, str], lonely: list[str], mask_folder: epath.Path, mask_suffix: str
) -> NoReturn:
    first = min(lonely)
    count = f" ({len(lonely)} of {len(images)} images have none)" if len(lonely) > 1 else ""
    masks = [os.path.splitext(name)[0] for name in listing(mask_folder) if is_image(name)]
    mend = suffix_hint(lonely, masks)
    if not mend and set(map(os.path.basename, masks)) & set(map(os.path.basename, lonely)):
        mend = "found masks of these names in other sub-folders: mirror those of the images"
    raise UserError(
        f"{images[first]}: no mask {mask_folder / (first + mask_suffix)}.png{count}: "
        f"{mend or 'add it or remove the image'}"
    )


def suffix_hint(images: Collection[str], masks: Iterable[str]) -> str:
    """Say what to do where masks are there and only named otherwise: "found …", or ""."""
    wanted = set(images)
    endings: Counter[str] = Counter()
    for name in masks:
        starts = (name[:cut] for cut in range(len(name) - 1, 0, -1))
        start = next((start for start in starts if start in wanted), None)
        if start:
            endings[name[len(start) :]] += 1
    ending, count = endings.most_common(1)[0] if endings else ("", 0)
    if not count or 2 * count < len(wanted):
        return ""
    return f"found {count} masks named *{ending}: set config.data.mask_suffix={ending}"


def _by_name(folder: epath.Path, suffix: str = "", without: str = "") -> dict[str, str]:
    """Map image files below `folder` whose stem ends with `suffix`, not `without`, by name."""
    if not folder.is_dir():
        raise no_folder(folder)
    found: dict[str, str] = {}
    folded: dict[str, str] = {}
    for name in listing(folder):
        stem = os.path.splitext(name)[0]
        if not is_image(name) or not stem.endswith(suffix) or (without and stem.endswith(without)):
            continue
        path, key = str(folder / name), stem[: len(stem) - len(suffix)]
        twin = folded.setdefault(_folded(key), path)
        if twin != path:
            same = "the same stem" if key in found else "the same stem but for upper and lower case"
            one, other = sorted((twin, path))
            raise UserError(f"{one}: has {same} as {other}: rename or remove one")
        found[key] = path
    return found


def no_folder(folder: epath.Path, found: str = "") -> UserError:
    """Word the error for a folder of a split that is not there; `found` says what there is."""
    absent = f"{folder}: no such folder, check config.data.root and the split's name{found}"
    return UserError(dangling(folder) or absent)


def _folded(name: str) -> str:
    """Fold names that some file system takes for one: by case, by how accents are coded."""
    return unicodedata.normalize("NFC", name).casefold()


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in _IMAGES


def listing(folder: epath.Path) -> Iterator[str]:
    """List files below `folder`, as paths below it. Hidden files and folders are not listed.

    Links are followed, to no folder a second time. Raises `UserError` for a folder that cannot be
    listed: its files would be missing in silence.
    """
    if is_remote(folder):
        with reading(folder):  # one question, not one for each folder
            store, top = fsspec.core.url_to_fs(os.fspath(folder))
            names = [path[len(top.rstrip("/")) + 1 :] for path in store.find(top)]
        yield from (name for name in names if not any(map(_hidden, name.split("/"))))
        return
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(place)
        below = os.path.relpath(place, folder)
        new = [] if real in seen else [name for name in folders if not _hidden(name)]
        # A folder before a link to it, so that what is below has the name of its own place.
        folders[:] = sorted(new, key=lambda name: (os.path.islink(os.path.join(place, name)), name))
        if real in seen:
            continue
        seen.add(real)
        for name in names:
            if not _hidden(name):
                yield name if below == "." else os.path.join(below, name)


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be listed ({error.strerror}): check who may read it")


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def nearby(root: epath.Path, source: str) -> str:
    """Say what there is where `source` found nothing: "; this looks like …", "; found …" or ""."""
    images: dict[str, list[str]] = {}  # of each folder, the stems of those in it
    with contextlib.suppress(UserError):  # what cannot be listed is no hint
        for folder, name in map(os.path.split, itertools.islice(listing(root), _FILES_GLANCED_AT)):
            found = images.setdefault(folder, [])
            found += [os.path.splitext(name)[0]] * is_image(name)
    around = {part for folder in images for part in folder.split("/")}
    around |= {root.name, root.parent.name}
    around |= {"/".join(folder.split("/")[-2:]) for folder in images}
    for marks, name, other in _LAYOUTS:
        if marks <= around and other != source:
            return f"; this looks like {name}: set config.data.source={other}"
    if {"images", "ADE"} <= around or any(part.startswith("ADE20K_20") for part in around):
        return (
            "; this looks like the full ADE20K, whose *_seg.png are colours: "
            "get ADEChallengeData2016, the scene parsing benchmark, for config.data.source=ade20k, "
            "or prepare this for ade20k_847 (docs/data.md)"
        )
    if any((root / "annotations").glob("instances_*.json")):
        return "; this looks like COCO's JSON: set config.data.source=coco_instances"
    folders = [folder for folder, stems in images.items() if stems]
    folders.sort(key=lambda folder: (folder.count("/"), folder))  # the nearest first
    for folder in folders if source == "folder" else ():
        if hint := suffix_hint(images[folder], images[folder]):
            return f"; in {root / folder}: {hint}"
    shown = [f"{len(images[folder])} images in {root / folder}" for folder in folders[:_SHOWN]]
    more = f" and {len(folders) - _SHOWN} more folders" if len(folders) > _SHOWN else ""
    return f"; found {', '.join(shown)}{more}" if shown else ""


# Folders that give a data set away, its name, and its source here.
_LAYOUTS = (
    ({"leftImg8bit"}, "Cityscapes", "cityscapes"),
    ({"JPEGImages", "SegmentationClass"}, "Pascal VOC", "pascal_voc"),
    ({"ADEChallengeData2016"}, "ADE20K", "ade20k"),
    ({"images", "annotations", "training"}, "ADE20K", "ade20k"),
    ({"stuffthingmaps"}, "COCO-Stuff", "coco_stuff"),
    ({"stuffthingmaps_trainval2017"}, "COCO-Stuff", "coco_stuff"),
    ({"annotations/train2017"}, "COCO-Stuff", "coco_stuff"),
)
