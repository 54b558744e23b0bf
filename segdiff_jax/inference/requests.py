"""What a user asks of prediction, on the command line or in Python: which images and classes."""

import dataclasses
import glob
import itertools
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, TypedDict

import numpy as np
from etils import epath
from PIL import Image

from segdiff_jax import files, ownership
from segdiff_jax.config import CodecConfig, Config, DataConfig, SamplerConfig
from segdiff_jax.data import images
from segdiff_jax.data.sources.source import IMAGE_EXTENSIONS
from segdiff_jax.errors import UserError
from segdiff_jax.progress import Progress
from segdiff_jax.text import vocabulary
from segdiff_jax.text.vocabulary import ClassEntry, Vocabulary

_MOST_NAMED = 10  # unreadable images in one message
_MOST_FOLDERS = 1000  # that are looked into for images that were meant


def parse_classes(text: str) -> Vocabulary:
    """The value of --classes: "a; b, synonym", "@file", or the name of a packaged vocabulary.

    Raises `UserError` for an empty list, an empty or a repeated name, an unreadable file.
    """
    text = text.strip()
    if text in vocabulary.packaged():
        return vocabulary.load(text)
    if text.startswith("@"):
        files.check_scheme(text[1:])
        return vocabulary.load(text[1:])
    if text.endswith((".txt", ".json")) and ";" not in text:
        raise UserError(f"--classes {text}: a file is read where @ stands before it: @{text}")
    return vocabulary.from_names([p for p in text.split(";") if p.strip()], name="--classes")


def as_vocabulary(classes: Any) -> Vocabulary:
    """The classes that a caller in Python means: texts and `ClassEntry`s, or a `Vocabulary`.

    "building, edifice" names synonyms; one text that looks like a whole list is warned about.
    Raises `TypeError` for what is no list of them, and `UserError` as `Vocabulary` does.
    """
    if isinstance(classes, Vocabulary):
        return classes
    if isinstance(classes, str | ClassEntry):
        raise TypeError(f"classes: {classes!r} is one class: give a list, [{classes!r}]")
    ordered = isinstance(classes, Iterable) and not isinstance(classes, bytes | Mapping | Set)
    if not ordered or getattr(classes, "ndim", 1) != 1:
        raise TypeError(
            f"classes: a {type(classes).__name__} is no list of class names: "
            'give one such as ["sky", "building, edifice"]'
        )
    given = list(classes)
    for position, item in enumerate(given):
        if not isinstance(item, str | ClassEntry):
            raise TypeError(
                f"classes[{position}]: {item!r} is neither a text nor a ClassEntry: "
                "name the class in a text"
            )
    entries = [c if isinstance(c, ClassEntry) else vocabulary.entry_from(str(c)) for c in given]
    found = Vocabulary("classes", tuple(entries))
    if len(given) == 1 and isinstance(given[0], str) and vocabulary.looks_like_several(entries[0]):
        warnings.warn(found.summary(), stacklevel=3)
    return found


def as_photo(image: Any, data: DataConfig) -> np.ndarray:
    """uint8 [H, W, 3] of a path (local or gs://), a PIL image, or an array that is one already.

    data: max_pixels and max_value of it count, as for the photos of a data set.

    Raises `UserError` for a file that cannot be read, `TypeError` for what is no image and
    `ValueError` for an array of another shape.
    """
    if isinstance(image, str | os.PathLike):
        files.check_scheme(image)
        return images.read_image(image, data.max_pixels, max_value=data.max_value)
    if isinstance(image, Image.Image):
        return images.from_pil(image, data.max_value)
    wanted = "give a path, a PIL image or an array of uint8 [H, W, 3], RGB"
    if not hasattr(image, "dtype") or not hasattr(image, "shape"):
        raise TypeError(f"image: a {type(image).__name__} is no image: {wanted}")
    array = np.asarray(image)
    if array.dtype != np.uint8:
        real = np.issubdtype(array.dtype, np.floating)
        mend = ", such as (255 * image).round().astype(np.uint8) for values in 0…1" if real else ""
        raise TypeError(f"image: has dtype {array.dtype}: {wanted}{mend}")
    if array.ndim == 3 and array.shape[-1] == 3 and array.size:
        return array
    raise ValueError(f"image: has shape {list(array.shape)}: {wanted}{_mend(array.shape)}")


def _mend(shape: tuple[int, ...]) -> str:
    if len(shape) == 2:
        return ", a gray one as np.stack([image] * 3, axis=-1)"
    if len(shape) == 4:
        return ", several as a list"
    if len(shape) == 3 and shape[-1] == 4:
        return ", without its transparency as image[..., :3]"
    if len(shape) == 3 and shape[0] == 3:
        return ", with channels last as image.transpose(1, 2, 0)"
    return ""


class Settings(TypedDict, total=False):
    """What a call may ask otherwise than the config. None is as left out."""

    steps: int | None  # of denoising, from 1 on
    ensemble: int | None  # samples to merge, from 1 on; their spread is the uncertainty
    shortlist: int | None  # classes that get the full budget; 0 = all
    tiles: int | None  # windows along the longer side of a large image; 0 = it is seen as a whole
    threshold: float | None  # 0…1: pixels whose best score is below are *other*
    closed: bool | None  # every pixel gets a class


def chosen(config: Config, settings: Settings) -> tuple[SamplerConfig, CodecConfig]:
    """`config` with the `settings` of a call in place.

    Raises `TypeError` for another name, `ValueError` for a value out of range.
    """
    lowest = {"steps": 1, "ensemble": 1, "shortlist": 0, "tiles": 0}
    given: dict[str, Any] = {k: v for k, v in settings.items() if v is not None}
    for name, value in given.items():
        if name in lowest:
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if not whole or value < lowest[name]:
                raise ValueError(f"{name}={value!r}: give a whole number from {lowest[name]} on")
        elif name == "threshold" and not 0.0 <= value <= 1.0:
            raise ValueError(f"threshold={value}: scores are between 0 and 1")
        elif name not in Settings.__annotations__:
            raise TypeError(f"{name}: is none of {', '.join(Settings.__annotations__)}")
    sampler: dict[str, Any] = {name: int(v) for name, v in given.items() if name in lowest}
    decoding = {name: v for name, v in given.items() if name not in lowest}
    return (
        dataclasses.replace(config.sampler, **sampler),
        dataclasses.replace(config.codec, **decoding),
    )


def find_images(arguments: Sequence[str]) -> list[str]:
    """Files that --images names, each once, in the order of the arguments, folders by name.

    Folders give their images (by extension) and are not searched further down. Raises `UserError`
    for an argument that names nothing.
    """
    found: dict[str, str] = {}  # identity -> path as named
    for argument in arguments:
        for path in _expand(argument):
            found.setdefault(identity(path), path)
    return list(found.values())


def without_results(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """`paths` parted into photos and the files that an earlier command wrote beside them.

    The latter are those that the marker of their folder lists (`ownership`), nothing else.
    """
    listed: dict[str, set[str]] = {}

    def is_ours(path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in listed:
            listed[folder] = set().union(*ownership.owned(folder or ".").values())
        return name in listed[folder]

    ours = [path for path in paths if is_ours(path) or is_ours(identity(path))]
    return [path for path in paths if path not in set(ours)], ours


def unreadable(
    paths: Sequence[str],
    read: Callable[[str], images.Photo],
    skip: bool,
    progress: Progress,
) -> dict[str, str]:
    """Decodes every image once, before anything is loaded or written: path → why it cannot be.

    Raises `UserError`, which names them, unless they are to be skipped and others are left.
    """
    found: dict[str, images.UnreadableError] = {}
    guessed: Counter[int] = Counter()
    for done, path in enumerate(paths, 1):
        try:
            guessed[read(path).guessed_max] += 1
        except images.UnreadableError as error:
            found[path] = error
        if not found or skip:
            progress(done, len(paths))
    if found and not (skip and len(found) < len(paths)):
        raise _all_unreadable(found, len(paths))
    del guessed[0]  # nothing to guess
    if guessed:
        logging.warning("%s", images.guessed_range(guessed, len(paths)))
    return {path: str(error) for path, error in found.items()}


def _all_unreadable(found: Mapping[str, images.UnreadableError], total: int) -> UserError:
    shown = "; ".join(str(error) for error in list(found.values())[:_MOST_NAMED])
    more = f"; and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    mends = []
    if any(isinstance(error, images.TooLargeError) for error in found.values()):
        mends.append("--max-pixels N reads larger ones")
    if len(found) < total:
        mends.append("--skip-unreadable leaves them out")
    counted = f"{len(found)} of {total} images cannot be read: " if total > 1 else ""
    return UserError("".join((counted, shown, more, *(f"; {mend}" for mend in mends))))


def _expand(argument: str) -> list[str]:
    if not argument:
        raise UserError("--images: an empty name, name a file, a folder or a pattern")
    files.check_scheme(argument)
    path = epath.Path(argument)
    try:
        with files.reading(argument):
            if path.is_dir():
                return _images_in(argument)
            if path.exists():
                return [argument]
            if glob.has_magic(argument):
                return _matches(argument)
    except OSError as error:
        raise UserError(f"--images {argument}: {error.strerror}: correct the path") from error
    wrong = files.dangling(argument) or f"{argument}: no such file or folder, correct the path"
    raise UserError(f"--images {wrong}")


def _images_in(folder: str) -> list[str]:
    inside = [p for p in epath.Path(folder).iterdir() if _is_image(p.name)]
    found = [os.fspath(p) for p in inside if files.is_remote(folder) or not os.path.isdir(p)]
    if not found:
        raise UserError(f"--images {folder}: no images in this folder{_nearby(folder)}")
    return sorted(found)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS and not name.startswith(".")


def _nearby(folder: str) -> str:
    """What to do about a folder without images: which of its sub-folders have some."""
    found: list[str] = []
    if not files.is_remote(folder):
        for root, folders, names in itertools.islice(os.walk(folder), _MOST_FOLDERS):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [os.path.join(root, name) for name in names if _is_image(name)]
    if not found:
        return ", name another one"
    first = min(found)
    pattern = os.path.join(glob.escape(folder), "**", f"*{os.path.splitext(first)[1]}")
    return (
        f", but {len(found)} in its sub-folders, such as {first}: name one of those, "
        f"or all with '{pattern}'"
    )


def _matches(pattern: str) -> list[str]:
    if files.is_remote(pattern):
        path = epath.Path(pattern)
        found = [os.fspath(p) for p in path.parent.glob(path.name)]
    else:
        # Whatever is there, but for folders: what cannot be read is told of when it is opened.
        everything = glob.glob(_literal_start(pattern), recursive=True)
        found = [path for path in everything if not os.path.isdir(path)]
    if not found:
        hint = ""
        if "[" in pattern:
            hint = "; [ and ] enclose letters to choose from: write [[] for a bracket itself"
        raise UserError(f"--images {pattern}: no file matches this pattern, correct it{hint}")
    return sorted(found)


def _literal_start(pattern: str) -> str:
    """`pattern` with its first folders escaped, as far as there are folders of just these names."""
    parts = pattern.split(os.sep)
    for count in range(len(parts) - 1, 0, -1):
        start = os.sep.join(parts[:count])
        if glob.has_magic(start) and os.path.isdir(start):
            return os.path.join(glob.escape(start), *parts[count:])
    return pattern


def identity(path: str) -> str:
    """The same for all names of one file."""
    return path if files.is_remote(path) else os.path.realpath(path)
