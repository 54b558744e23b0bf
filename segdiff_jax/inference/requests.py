"""What a user asks of prediction, on the command line or in Python: classes, images, settings."""

import dataclasses
import os
import warnings
from collections.abc import Iterable, Mapping, Set
from typing import Any, NamedTuple, TypedDict
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from segdiff_jax import cli, files
from segdiff_jax.config import CodecConfig, Config, DataConfig, SamplerConfig
from segdiff_jax.data import images
from segdiff_jax.errors import UserError
from segdiff_jax.text import vocabulary
from segdiff_jax.text.vocabulary import ClassEntry, Vocabulary

STDIN = "-"


class Encoded(NamedTuple):
    """An image that has been through the VAE: to be asked for many lists of classes."""

    photo: np.ndarray  # uint8 [H, W, 3]
    latent: np.ndarray  # float32, one row of what `Networks.latents` gives

    def __repr__(self) -> str:
        return f"Encoded({self.photo.shape[0]} × {self.photo.shape[1]})"


def image(text: str) -> str:
    """Check a value of --images, for `type=` of argparse: "-", a URL, or as `cli.path`."""
    return text if text == STDIN or is_url(text) else cli.path(text)


def is_url(path: str) -> bool:
    """Return whether `path` is an address that photos are fetched from."""
    try:
        parts = urlsplit(path)
        return parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return False


def parse_classes(text: str) -> Vocabulary:
    """Read the value of --classes: "a; b, synonym", "@file", or the name of a packaged vocabulary.

    Raise `UserError` for an empty list, an empty or a repeated name, an unreadable file.
    """
    text = text.strip()
    if text in vocabulary.packaged():
        return vocabulary.load(text)
    if text.startswith("@"):
        files.check_scheme(text[1:])
        return vocabulary.load(text[1:])
    if text.endswith((".txt", ".json")) and ";" not in text:
        raise UserError(f"--classes {text}: a file is read where @ stands before it: @{text}")
    check_no_list(text, "--classes")
    return vocabulary.from_names([p for p in text.split(";") if p.strip()], name="--classes")


def check_no_list(text: str, name: str) -> None:
    """Raise `UserError` for "cityscapes" or "ade20k-150", which would be one class of that name."""

    def letters(name: str) -> str:
        return "".join(filter(str.isalnum, name)).casefold()

    names = vocabulary.packaged()
    meant = [n for n in names if letters(text) in (letters(n), letters(n.rpartition("_")[0]))]
    if meant and not {";", ",", "\n"} & set(text.strip()):
        listed = " or ".join(meant)
        raise UserError(f"{name} {text.strip()}: no packaged list of this name: write {listed}")


def as_vocabulary(classes: Any) -> Vocabulary:
    """Return the classes that a caller in Python means: texts and `ClassEntry`s, or a `Vocabulary`.

    "building, edifice" names synonyms; one text that looks like a whole list is warned about.
    Raise `TypeError` for what is no list of them, and `UserError` as `Vocabulary` does.
    """
    if isinstance(classes, Vocabulary):
        return classes
    others = str | bytes | ClassEntry | Mapping | Set
    listed = isinstance(classes, Iterable) and not isinstance(classes, others)
    if not listed or getattr(classes, "ndim", 1) != 1:
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
    """Return uint8 [H, W, 3] of a path (local or gs://), a PIL image, or an array that is one.

    data: max_pixels and max_value of it count, as for the photos of a data set.

    Raise `UserError` for a file that cannot be read, `TypeError` for what is no image and
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
        raise TypeError(f"image: has dtype {array.dtype}: {wanted}")
    if array.ndim == 3 and array.shape[-1] == 3 and array.size:
        return array
    raise ValueError(f"image: has shape {list(array.shape)}: {wanted}")


class Settings(TypedDict, total=False):
    """What a call may ask otherwise than the config. None is as left out."""

    steps: int | None  # of denoising, from 1 on
    ensemble: int | None  # samples to merge, from 1 on; their spread is the uncertainty
    shortlist: int | None  # classes that get the whole budget; 0 = all
    tiles: int | None  # windows along each side of a large image, at most; 0 = as a whole only
    threshold: float | None  # 0…1: pixels whose best score is below are *other*, unless `closed`
    closed: bool | None  # every pixel gets a class


def chosen(config: Config, settings: Settings) -> tuple[SamplerConfig, CodecConfig]:
    """Return sampler and codec of `config` with the `settings` of a call in place.

    Raise `TypeError` for another name, `ValueError` for a value out of range.
    """
    lowest = {"steps": 1, "ensemble": 1, "shortlist": 0, "tiles": 0}
    given: dict[str, Any] = {k: v for k, v in settings.items() if v is not None}
    for name, value in given.items():
        if name in lowest:
            given[name] = whole(name, value, lowest[name])
        elif name == "threshold":
            if not isinstance(value, int | float | np.number) or not 0.0 <= value <= 1.0:
                raise ValueError(f"threshold={value!r}: scores are between 0 and 1")
        elif name == "closed":
            if not isinstance(value, bool | np.bool_):
                raise ValueError(f"closed={value!r}: give True or False")
        else:
            raise TypeError(f"{name}: is none of {', '.join(Settings.__annotations__)}")
    if "threshold" in given:
        # Who names a threshold wants *other*, even from a model whose config is closed.
        given.setdefault("closed", False)
    sampler = {name: v for name, v in given.items() if name in lowest}
    decoding = {name: v for name, v in given.items() if name not in lowest}
    return (
        dataclasses.replace(config.sampler, **sampler),
        dataclasses.replace(config.codec, **decoding),
    )


def whole(name: str, value: Any, lowest: int) -> int:
    """Return a whole number that a caller gave. Raise `ValueError` for what is none or too low."""
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_whole or not lowest <= value < 2**31:  # JAX's own integers and seeds end there
        raise ValueError(f"{name}={value!r}: give a whole number from {lowest} to {2**31 - 1}")
    return int(value)


def plural(count: int, noun: str) -> str:
    """Write "1 image", "2 images", "2 classes"."""
    return f"{count} {noun}" + ("" if count == 1 else "es" if noun.endswith("s") else "s")
