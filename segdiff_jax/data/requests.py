"""What a user asks of prediction, on the command line or in Python: which images and classes."""

import glob
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from etils import epath

from segdiff_jax import files
from segdiff_jax.data import vocabulary
from segdiff_jax.data.sources import IMAGE_EXTENSIONS
from segdiff_jax.data.vocabulary import ClassEntry, Vocabulary
from segdiff_jax.errors import UserError


def parse_classes(text: str) -> Vocabulary:
    """The value of --classes: "a; b, synonym", "@file", or the name of a packaged vocabulary.

    Raises `UserError` for an empty list, an empty or a repeated name, an unreadable file.
    """
    text = text.strip()
    if text in vocabulary.packaged():
        return vocabulary.load(text)
    if text.startswith("@"):
        return vocabulary.load(text[1:])
    if text.endswith((".txt", ".json")) and ";" not in text:
        raise UserError(f"--classes {text}: a file is read where @ stands before it: @{text}")
    return vocabulary.from_names([p for p in text.split(";") if p.strip()], name="--classes")


def as_classes(classes: Any) -> tuple[ClassEntry, ...]:
    """The classes that a caller in Python means: texts and `ClassEntry`s, or a `Vocabulary`.

    "building, edifice" names synonyms; one text that looks like a whole list is warned about.
    Raises `TypeError` for what is no list of them, and `UserError` as `Vocabulary` does.
    """
    if isinstance(classes, Vocabulary):
        return classes.classes
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
    return found.classes


def as_photo(image: Any) -> np.ndarray:
    """`image` as numpy uint8 [H, W, 3], which it must be.

    Raises `TypeError` for what is no array of uint8 and `ValueError` for another shape.
    """
    wanted = "give an array of uint8 [H, W, 3], RGB"
    if not hasattr(image, "dtype") or not hasattr(image, "shape"):
        what = "a path" if isinstance(image, str | os.PathLike) else f"a {type(image).__name__}"
        raise TypeError(f"image: {what} is no array: {wanted}, as np.asarray of a PIL image in RGB")
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
        return ", one a call"
    if len(shape) == 3 and shape[-1] == 4:
        return ", without its transparency as image[..., :3]"
    if len(shape) == 3 and shape[0] == 3:
        return ", with channels last as image.transpose(1, 2, 0)"
    return ""


def whole_numbers(given: dict[str, tuple[Any, int]]) -> dict[str, int]:
    """Of the settings {name: (value or None, lowest)} those that are given. Raises `ValueError`."""
    changes = {}
    for name, (value, lowest) in given.items():
        if value is None:
            continue
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or value < lowest:
            raise ValueError(f"{name}={value!r}: give a whole number from {lowest} on")
        changes[name] = int(value)
    return changes


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


def _expand(argument: str) -> list[str]:
    if not argument:
        raise UserError("--images: an empty name, name a file, a folder or a pattern")
    path = epath.Path(argument)
    if path.is_dir():
        inside = [p for p in path.iterdir() if p.suffix.lower() in IMAGE_EXTENSIONS]
        inside = [p for p in inside if not p.name.startswith(".")]
        if not inside:
            raise UserError(f"--images {argument}: no images in this folder, name another one")
        return sorted(os.fspath(p) for p in inside)
    if path.exists():
        return [argument]
    if not glob.has_magic(argument):
        raise UserError(f"--images {argument}: no such file or folder, correct the path")
    if files.is_remote(argument):
        matches = [os.fspath(p) for p in path.parent.glob(path.name)]
    else:
        matches = [p for p in glob.glob(argument, recursive=True) if os.path.isfile(p)]
    if not matches:
        raise UserError(f"--images {argument}: no file matches this pattern, correct it")
    return sorted(matches)


def identity(path: str) -> str:
    """The same for all names of one file."""
    return path if files.is_remote(path) else os.path.realpath(path)
