"""The HTML page that shows results: figures, pictures side by side with their classes, tables."""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from segdiff_jax import files
from segdiff_jax.inference import pictures

_GAP = 6  # pixels between the pictures of a contact sheet
_NAMES = 20  # pixels of the line with their names


class Table(NamedTuple):
    """A table of the page. Numbers get three decimals, None a dash."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]
    bar: int | None = None  # this column holds shares in [0, 1], drawn as bars
    colors: Sequence[Sequence[int]] | None = None  # one RGB swatch per row, before its first cell


class Row(NamedTuple):
    """Pictures side by side, each of which opens at its full size.

    A picture is PNG or JPEG bytes to embed, or the name of a file beside the page.
    """

    caption: str
    images: Mapping[str, bytes | str]  # title -> picture
    legend: Mapping[str, Sequence[int]] = {}  # class in the pictures -> RGB, 0…255 each
    originals: Mapping[str, str] = {}  # title of a reduced picture -> address of the whole one
    # Width and height, in any unit, that all pictures are shown with. What a picture has below that
    # (an overlay its legend, which the page has too) is seen where it is opened.
    shape: tuple[int, int] | None = None


def comparison(
    caption: str,
    image: np.ndarray,
    prediction: np.ndarray,
    colors: Mapping[str, Sequence[int]],
    truth: np.ndarray | None = None,
    uncertainty: np.ndarray | None = None,
) -> Row:
    """Make an embedded row of the page: image / truth / prediction / uncertainty, those given.

    `image` is uint8 [H, W, 3], `truth` and `prediction` are labels [H, W], `uncertainty` [H, W].
    `colors` are those of the classes in id order; the row's legend names what it shows.
    """
    names, palette = list(colors), np.array(list(colors.values()), np.uint8)
    images: dict[str, bytes | str] = {"image": pictures.encode(image, photo=True)}
    labels = [prediction] if truth is None else [truth, prediction]
    if truth is not None:
        images["truth"] = pictures.encode(pictures.colorize(truth, palette))
    images["prediction"] = pictures.encode(pictures.colorize(prediction, palette))
    if uncertainty is not None:
        images["uncertainty"] = pictures.encode(pictures.uncertainty_map(uncertainty))
    shown = pictures.present(np.stack(labels), palette)
    legend = {names[i]: colors[names[i]] for i in shown}
    return Row(caption, images, legend | no_class((np.stack(labels) >= len(palette)).any()))


def no_class(shown: bool | np.bool_) -> dict[str, tuple[int, int, int]]:
    """Return a legend's entry for pixels without a class (ignored, or *other*), if `shown`."""
    return {"no class": pictures.OTHER_COLOR} if shown else {}


def contact_sheet(rows: Sequence[Row], height: int = 160) -> Image.Image:
    """Put the embedded images of rows into one picture, each scaled to `height` pixels.

    The first row's names of the images stand above them.
    """
    strips = [_strip(row, height) for row in rows]
    strips.insert(0, _strip(rows[0], height, named=True))
    width = max(strip.width for strip in strips)
    tall = sum(strip.height + _GAP for strip in strips) - _GAP
    sheet, top = Image.new("RGB", (width, tall), "white"), 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height + _GAP
    return sheet


def _strip(row: Row, height: int, named: bool = False) -> Image.Image:
    """Put the embedded images of a row side by side, or with `named` their names alone."""
    shown = {name: data for name, data in row.images.items() if isinstance(data, bytes)}
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in shown.values()]
    sizes = [(round(p.width * height / p.height), height) for p in pictures]
    tall = _NAMES if named else height
    strip = Image.new("RGB", (sum(w + _GAP for w, _ in sizes) - _GAP, tall), "white")
    draw, font, left = ImageDraw.Draw(strip), ImageFont.load_default(0.7 * _NAMES), 0
    for name, picture, size in zip(shown, pictures, sizes, strict=True):
        if named:
            draw.text((left + size[0] / 2, tall / 2), name, "black", font, "mm")
        else:
            strip.paste(picture.resize(size, Image.Resampling.NEAREST), (left, 0))
        left += size[0] + _GAP
    return strip


def class_table(
    per_class: Mapping[str, float | None],
    colors: Mapping[str, Sequence[int]] | None = None,
    groups: Mapping[str, str] | None = None,
) -> Table:
    """Make a table of the IoU of every class, with a bar and its colour.

    `groups` may give a class a word for a second column, such as "trained" or "novel".
    """
    swatches = None if colors is None else [colors[name] for name in per_class]
    if groups is None:
        pairs = list(per_class.items())
        return Table("IoU per class", ["class", "IoU"], pairs, bar=1, colors=swatches)
    rows = [(name, groups.get(name), iou) for name, iou in per_class.items()]
    return Table("IoU per class", ["class", "split", "IoU"], rows, bar=2, colors=swatches)


def page(
    path: os.PathLike[str] | str,
    title: str,
    figures: Mapping[str, str | float | int | None] | None = None,
    tables: Sequence[Table] = (),
    rows: Sequence[Row] = (),
    note: str = "",
) -> None:
    """Write one HTML page with its style inside: headline figures, rows of pictures, tables.

    Args:
      path: the file, local or `gs://`; written whole or not at all.
      title, note: heading and a sentence below it. All text is escaped.
      figures: headline numbers by name, shown large.

    Raises:
      UserError: the file cannot be written.
    """
    text = pictures.template("page.html").render(
        title=title,
        note=note,
        figures=figures or {},
        tables=tables,
        rows=rows,
        cell=_cell,
        is_number=lambda value: value is None or isinstance(value, int | float),
        source=_source,
    )
    files.write_text(path, text)


def _cell(value: str | float | int | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _source(image: Any) -> str:
    if isinstance(image, str):
        return quote(image)
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
