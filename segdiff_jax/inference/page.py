"""The HTML page that shows results: figures, images side by side with their classes, tables."""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from PIL import Image

from segdiff_jax import files
from segdiff_jax.inference import pictures


class Table(NamedTuple):
    """A table of the page. Numbers get three decimals, None a dash."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]
    bar: int | None = None  # this column holds shares in [0, 1], drawn as bars
    colors: Sequence[Sequence[int]] | None = None  # one RGB swatch per row, before its first cell


class Row(NamedTuple):
    """Images side by side. Each is PNG or JPEG bytes to embed, or a file name beside the page."""

    caption: str
    images: Mapping[str, bytes | str]  # title -> image
    legend: Mapping[str, Sequence[int]] = {}  # class in the images -> RGB
    originals: Mapping[str, str] = {}  # title of a reduced image -> address of the whole one


def comparison(
    caption: str,
    image: np.ndarray,
    prediction: np.ndarray,
    colors: Mapping[str, Sequence[int]],
    truth: np.ndarray | None = None,
    uncertainty: np.ndarray | None = None,
) -> Row:
    """One embedded row of the page: image / truth / prediction / uncertainty, those given.

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
    """The entry of a legend for pixels without a class (ignored, or *other*), if there are any."""
    return {"no class": pictures.OTHER_COLOR} if shown else {}


def contact_sheet(rows: Sequence[Row], height: int = 160, gap: int = 6) -> Image.Image:
    """The embedded images of comparison rows in one picture, each scaled to `height`."""
    strips = []
    for row in rows:
        embedded = [data for data in row.images.values() if isinstance(data, bytes)]
        shown = [Image.open(io.BytesIO(data)).convert("RGB") for data in embedded]
        sizes = [(round(p.width * height / p.height), height) for p in shown]
        strip = Image.new("RGB", (sum(w + gap for w, _ in sizes) - gap, height), "white")
        left = 0
        for picture, size in zip(shown, sizes, strict=True):
            strip.paste(picture.resize(size, Image.Resampling.NEAREST), (left, 0))
            left += size[0] + gap
        strips.append(strip)
    width = max(strip.width for strip in strips)
    sheet = Image.new("RGB", (width, len(strips) * (height + gap) - gap), "white")
    for index, strip in enumerate(strips):
        sheet.paste(strip, (0, index * (height + gap)))
    return sheet


def class_table(
    per_class: Mapping[str, float | None],
    colors: Mapping[str, Sequence[int]] | None = None,
    groups: Mapping[str, str] | None = None,
) -> Table:
    """The IoU of every class with a bar, and its colour.

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
    """Writes one HTML page with its style inside: headline figures, rows of images, tables.

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
