"""What a visitor asks for: checked, with messages for people who know neither flags nor paths."""

import math
import re
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from segdiff_jax import codec
from segdiff_jax.config import Config, DataConfig
from segdiff_jax.data import images
from segdiff_jax.errors import UserError
from segdiff_jax.inference.requests import check_no_list
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.text import conditioning, vocabulary
from segdiff_jax.text.prompts import expanded
from segdiff_jax.text.vocabulary import Vocabulary

# Of all that Pillow reads: some of the others call programs, or are no photos.
_KINDS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "AVIF")
_LETTERS = 100_000  # of the list of classes
_LONGEST_STEM = 80  # letters of a photo's name that its results keep


class Limits(NamedTuple):
    """What one request may take."""

    pixels: int = 32_000_000  # of a photo
    megabytes: int = 40  # of an upload
    classes: int = 200  # below 255: the page holds labels in a byte
    passes: int = 20_000  # calls of the UNet: steps × ensemble × passes


def photo(path: str | None, data: DataConfig, limits: Limits) -> np.ndarray:
    """Read an upload, uint8 [H, W, 3]; of `data`, the model's, its range of 16-bit files counts.

    Raise `UserError` for no photo and for too large a one.
    """
    if not path:
        raise UserError("Choose a photo first.")
    name = PurePath(path).name
    try:
        with Image.open(path, formats=_KINDS) as header:
            count = header.width * header.height
    except Image.DecompressionBombError:
        count = limits.pixels + 1
    except Exception as error:  # Pillow's plugins raise anything on what is no picture
        kinds = "JPEG, PNG, WebP, TIFF, BMP or AVIF"
        raise UserError(f"{name} is no photo that can be read. Use {kinds}.") from error
    if count > limits.pixels:
        most = f"{limits.pixels / 1e6:.0f} megapixels"
        raise UserError(f"{name} is larger than {most}. Make it smaller and try again.")
    try:
        return images.read_image(path, limits.pixels, max_value=data.max_value)
    except UserError as error:
        raise UserError(str(error).replace(str(path), name)) from error


def name_of(path: str) -> str:
    """Return what the results of an upload are called."""
    return re.sub(r"[^\w.-]+", "_", PurePath(path).stem)[:_LONGEST_STEM].strip("._") or "photo"


def classes(text: Any, limits: Limits) -> Vocabulary:
    """Return the classes of a text: one a line or between ";", "," before synonyms.

    The text may also be the name of a packaged list. No file is read, whatever the text says.
    Raise `UserError` for a text that gives no list.
    """
    if not isinstance(text, str) or not text.strip():
        raise UserError("Name what to look for: one class a line, such as sky.")
    if len(text) > _LETTERS:
        raise UserError("The list of classes is too long.")
    if text.strip() in vocabulary.packaged():
        found = vocabulary.load(text.strip())
    else:
        names = [part.strip() for part in re.split(r"[;\n]", text) if part.strip(" \t\r,")]
        if len(names) > limits.classes:
            raise UserError(f"{len(names)} classes are too many: name {limits.classes} at most.")
        check_no_list(text, "The list")
        found = vocabulary.from_names(names, "The list")
    if len(found) > limits.classes:
        raise UserError(f"{len(found)} classes are too many: name {limits.classes} at most.")
    return found


def not_read(segmenter: Segmenter, wanted: Vocabulary) -> str:
    """Say what a model does not see of names that are too long for it; of others nothing."""
    template = expanded(segmenter.config.prompts.templates)[0]
    lost = conditioning.lost_ends(segmenter.tokenizer, wanted.classes, template)
    if not lost:
        return ""
    name, end = lost[0]
    more = f", and of {len(lost) - 1} more the end" if len(lost) > 1 else ""
    shown = f"{vocabulary.shorten(end)!r} of {vocabulary.shorten(name)!r}"
    return f". Too long for this model, which does not see {shown}{more}"


def settings(asked: dict[str, Any], config: Config, count: int, limits: Limits) -> dict[str, Any]:
    """Check steps, ensemble, seed and closed, `asked` for `count` classes. Raise `UserError`."""
    steps = _whole("Steps", asked["steps"], 1, config.diffusion.num_train_timesteps)
    ensemble = _whole("Ensemble", asked["ensemble"], 1, 64)
    seed = _whole("Seed", asked["seed"], 0, 2**31 - 1)
    group = codec.group_size(count, config.codec.classes_per_pass)
    passes = steps * ensemble * math.ceil(count / group)
    if passes > limits.passes:
        raise UserError(
            f"This would take {passes:,} passes through the network, more than {limits.passes:,}. "
            "Ask for fewer classes, fewer steps or a smaller ensemble."
        )
    return {"steps": steps, "ensemble": ensemble, "seed": seed, "closed": bool(asked["closed"])}


def _whole(name: str, value: Any, low: int, high: int) -> int:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or value != int(value):
        raise UserError(f"{name}: give a whole number from {low} to {high}.")
    return int(value)
