"""Pictures of label maps and uncertainty, their files, and the templates of pages."""

import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from segdiff_jax import codec

OTHER_COLOR = (0, 0, 0)
_LEGEND_LINES = 3  # of one name, before it is cut
# Nine points of matplotlib's "magma" (CC0), whose lightness rises evenly: dark = certain.
_MAGMA = np.array(
    [(0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122)]
    + [(229, 80, 100), (251, 135, 97), (254, 194, 135), (252, 253, 191)],
    np.float64,
)
_RAMP = np.stack(
    [np.interp(np.linspace(0, 8, 1024), range(9), _MAGMA[:, c]) for c in range(3)], axis=-1
)


def colorize(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Return the colours of a label map: uint8 [H, W, 3].

    Args:
      labels: integers [H, W]; whatever is no row of the palette is *other* and becomes black.
      palette: uint8 [K, 3], RGB.
    """
    return _painted(_known(labels, len(palette)), palette)


def overlay(
    photo: np.ndarray,
    labels: np.ndarray,
    palette: np.ndarray,
    alpha: float = 0.5,
) -> Image.Image:
    """Paint labels over a photo, RGB. *Other* leaves the photo as it is.

    Args:
      photo: uint8 [H, W, 3].
      labels: integers [H, W].
      palette: uint8 [K, 3].
      alpha: weight of the colours, 0…1.
    """
    known = _known(labels, len(palette))
    below = Image.fromarray(np.ascontiguousarray(photo))
    picture = Image.blend(below, Image.fromarray(_painted(known, palette)), alpha)
    return Image.composite(picture, below, Image.fromarray(known < len(palette)))


def present(labels: np.ndarray, palette: np.ndarray) -> list[int]:
    """Return the classes in label maps [..., H, W], most pixels first."""
    counts = np.bincount(_known(labels, len(palette)).ravel())[: len(palette)]
    return [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]


def _painted(known: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Return the colours, uint8 [H, W, 3], of what `_known` gives."""
    table = np.concatenate([np.asarray(palette, np.uint8), np.array([OTHER_COLOR], np.uint8)])
    return np.take(table, known, axis=0)  # twice as fast as table[known]


def uncertainty_map(uncertainty: np.ndarray) -> np.ndarray:
    """Paint uncertainty [H, W], 0 or more, from black (certain) over red to pale yellow.

    The largest value of this map gets the brightest colour. The colours are uint8 [H, W, 3].
    """
    values = np.asarray(uncertainty, np.float32)
    top = float(values.max(initial=0.0))
    last = len(_RAMP) - 1
    steps = np.clip(values * (last / top if top > 0 else 0.0), 0, last)
    return np.rint(_RAMP).astype(np.uint8)[np.rint(steps).astype(np.uint16)]


def label_png(labels: np.ndarray, palette: np.ndarray) -> bytes:
    """Encode a label map as a PNG file whose pixel values are the class ids.

    Up to 255 classes: palette PNG, *other* = 255, black. More: 16-bit gray, *other* = 65535.
    """
    count = len(palette)
    values = np.append(np.arange(count), codec.ignore_label(count)).astype(codec.label_type(count))
    picture = Image.fromarray(values[_known(labels, count)])
    if count <= 255:
        colors = np.zeros((256, 3), np.uint8)
        colors[:count], colors[255] = palette, OTHER_COLOR
        picture.putpalette(colors.tobytes())  # turns "L" into "P", values unchanged
    return encode(picture)


def encode(image: Image.Image | np.ndarray, photo: bool = False, level: int = 6) -> bytes:
    """Encode a PIL image or an array as PNG, or with `photo` as JPEG.

    level: of PNG's compression, 0…9; 1 takes a fifth of the time of 6 for a picture with a photo.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    if photo:
        picture.convert("RGB").save(buffer, "JPEG", quality=90)
    else:
        picture.save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()


@functools.cache
def template(name: str) -> jinja2.Template:
    """Return one of the HTML templates beside this file. All that is put into them is escaped."""
    loader = jinja2.PackageLoader("segdiff_jax.inference")
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True).get_template(name)


def _known(labels: np.ndarray, count: int) -> np.ndarray:
    """Return labels as unsigned [H, W]; `count` stands for all that are not in 0…count-1."""
    numbers = np.asarray(labels).astype(np.int32, copy=False).view(np.uint32)
    known = np.minimum(numbers, np.uint32(count))
    return known.astype(np.uint8) if count < 256 else known


def with_legend(picture: Image.Image, legend: Mapping[str, Sequence[int]]) -> Image.Image:
    """Return the picture with the names of `legend`, each beside its colour, in lines below it."""
    if not legend:
        return picture
    size = max(10, min(picture.width, picture.height) // 24)
    font = ImageFont.load_default(size)
    line, pad = round(size * 1.5), size // 2
    placed, x, y, bottom = [], pad, picture.height + pad, picture.height + pad
    for name, color in legend.items():
        lines = _lines(name, font, picture.width - 2 * pad - line)
        width = line + max(map(font.getlength, lines)) + 2 * pad
        if x > pad and x + width - pad > picture.width:
            x, y = pad, bottom
        placed.append((x, y, lines, tuple(color)))
        x, bottom = x + round(width), max(bottom, y + line * len(lines))
    canvas = Image.new("RGB", (picture.width, bottom + pad), (255, 255, 255))
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for x, y, lines, color in placed:
        draw.rectangle((x, y + 1, x + size, y + 1 + size), fill=color, outline=(90, 90, 90))
        for number, text in enumerate(lines):
            middle = (x + line, y + 1 + size / 2 + number * line)
            draw.text(middle, text, fill=(20, 20, 20), font=font, anchor="lm")
    return canvas


def _lines(text: str, font: Any, width: float) -> list[str]:
    """Break a name that is wider than a small picture, between words where it can be."""
    rest = " ".join(text.split())  # a line break would upset the layout
    lines: list[str] = []
    while (fits := _fitting(rest, font, width)) < len(rest):
        if len(lines) == _LEGEND_LINES - 1:
            return [*lines, rest[: _fitting(rest, font, width, "…")] + "…"]
        space = rest.rfind(" ", 0, fits + 1)
        end = space if space > 0 else fits
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    return [*lines, rest]


def _fitting(text: str, font: Any, width: float, end: str = "") -> int:
    """Return how many letters of `text`, with `end` after them, fit `width` pixels: at least 1."""
    low, high = 1, min(int(width) + 1, len(text)) + 1  # no letter is narrower than a pixel
    while high - low > 1:
        middle = (low + high) // 2
        fits = font.getlength(text[:middle] + end) <= width
        low, high = (middle, high) if fits else (low, middle)
    return low
