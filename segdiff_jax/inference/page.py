"""Pictures of label maps and uncertainty, and the HTML page that shows them side by side."""

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from segdiff_jax import files

OTHER_COLOR = (0, 0, 0)
# Nine points of matplotlib's "magma" (CC0), whose lightness rises evenly: dark = certain.
_MAGMA = np.array(
    [(0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122)]
    + [(229, 80, 100), (251, 135, 97), (254, 194, 135), (252, 253, 191)],
    np.float64,
)


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


def colorize(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Colours of a label map: uint8 [H, W, 3].

    Args:
      labels: integers [H, W]; whatever is no row of the palette is *other* and becomes black.
      palette: uint8 [K, 3], RGB.
    """
    table = np.concatenate([np.asarray(palette, np.uint8), np.array([OTHER_COLOR], np.uint8)])
    return table[_known(labels, len(palette), len(palette))]


def overlay(
    image: Image.Image | np.ndarray,
    labels: np.ndarray,
    palette: np.ndarray,
    names: Sequence[str],
    alpha: float = 0.5,
    legend: bool = True,
) -> Image.Image:
    """The photo with its labels painted over, RGB. *Other* leaves the photo as it is.

    Args:
      image: photo, uint8 [H, W, 3].
      labels: integers [H, W].
      palette: uint8 [K, 3].
      names: K class names, for the legend.
      alpha: weight of the colours, 0…1.
      legend: add the classes present, most pixels first, in lines below the photo.
    """
    photo = np.asarray(image, np.float64)  # [H, W, 3]
    colors = colorize(labels, palette).astype(np.float64)
    known = (_known(labels, len(palette), -1) >= 0)[..., None]  # [H, W, 1]
    mixed = np.where(known, (1 - alpha) * photo + alpha * colors, photo)
    picture = Image.fromarray(np.rint(mixed).astype(np.uint8))
    if not legend:
        return picture
    ids, counts = np.unique(_known(labels, len(palette), -1), return_counts=True)
    present = [int(i) for i in ids[np.argsort(-counts, kind="stable")] if i >= 0]
    entries = [(names[i], tuple(int(c) for c in palette[i])) for i in present]
    return _with_legend(picture, entries)


def uncertainty_map(uncertainty: np.ndarray, high: float | None = None) -> np.ndarray:
    """Uncertainty as colours from black (certain) over red to pale yellow: uint8 [H, W, 3].

    Args:
      uncertainty: [H, W], 0 or more.
      high: value that gets the brightest colour; None = the largest one of this map.
    """
    values = np.asarray(uncertainty, np.float64)
    top = float(values.max(initial=0.0)) if high is None else high
    share = np.clip(values / top, 0, 1) if top > 0 else np.zeros_like(values)
    points = np.linspace(0, 1, len(_MAGMA))
    channels = [np.interp(share, points, _MAGMA[:, c]) for c in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def label_png(labels: np.ndarray, palette: np.ndarray) -> bytes:
    """A label map as a PNG file whose pixel values are the class ids.

    Up to 255 classes: palette PNG, *other* = 255, black. More: 16-bit gray, *other* = 65535.
    """
    count = len(palette)
    if count > 255:
        return encode(Image.fromarray(_known(labels, count, 65535).astype(np.uint16)))
    picture = Image.fromarray(_known(labels, count, 255).astype(np.uint8))
    colors = np.zeros((256, 3), np.uint8)
    colors[:count] = palette
    colors[255] = OTHER_COLOR
    picture.putpalette(colors.tobytes())  # turns "L" into "P", values unchanged
    return encode(picture)


def encode(image: Image.Image | np.ndarray, photo: bool = False) -> bytes:
    """PNG bytes, or with `photo` JPEG bytes, of a PIL image or a uint8 array."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    if photo:
        picture.convert("RGB").save(buffer, "JPEG", quality=90)
    else:
        picture.save(buffer, "PNG")
    return buffer.getvalue()


def comparison(
    caption: str,
    image: np.ndarray,
    prediction: np.ndarray,
    palette: np.ndarray,
    truth: np.ndarray | None = None,
    uncertainty: np.ndarray | None = None,
) -> Row:
    """One embedded row of the page: image / truth / prediction / uncertainty, those given.

    `image` is uint8 [H, W, 3], `truth` and `prediction` are labels [H, W], `uncertainty` [H, W].
    """
    images: dict[str, bytes | str] = {"image": encode(image, photo=True)}
    if truth is not None:
        images["truth"] = encode(colorize(truth, palette))
    images["prediction"] = encode(colorize(prediction, palette))
    if uncertainty is not None:
        images["uncertainty"] = encode(uncertainty_map(uncertainty))
    return Row(caption, images)


def contact_sheet(rows: Sequence[Row], height: int = 160, gap: int = 6) -> Image.Image:
    """The embedded images of comparison rows in one picture, each scaled to `height`."""
    strips = []
    for row in rows:
        pictures = [
            Image.open(io.BytesIO(data)).convert("RGB")
            for data in row.images.values()
            if isinstance(data, bytes)
        ]
        sizes = [(round(p.width * height / p.height), height) for p in pictures]
        strip = Image.new("RGB", (sum(w + gap for w, _ in sizes) - gap, height), "white")
        left = 0
        for picture, size in zip(pictures, sizes, strict=True):
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
    palette: np.ndarray | None = None,
    groups: Mapping[str, str] | None = None,
) -> Table:
    """The IoU of every class with a bar; the swatches make it the legend of the page.

    `groups` may give a class a word for a second column, such as "trained" or "novel".
    """
    colors = None if palette is None else [[int(c) for c in color] for color in palette]
    if groups is None:
        pairs = [(name, iou) for name, iou in per_class.items()]
        return Table("IoU per class", ["class", "IoU"], pairs, bar=1, colors=colors)
    rows = [(name, groups.get(name), iou) for name, iou in per_class.items()]
    return Table("IoU per class", ["class", "split", "IoU"], rows, bar=2, colors=colors)


def page(
    path: os.PathLike[str] | str,
    title: str,
    figures: Mapping[str, str | float | int | None] | None = None,
    tables: Sequence[Table] = (),
    rows: Sequence[Row] = (),
    note: str = "",
) -> None:
    """Writes one HTML page with its style inside: headline figures, tables, rows of images.

    Args:
      path: the file, local or `gs://`; written whole or not at all.
      title, note: heading and a sentence below it. All text is escaped.
      figures: headline numbers by name, shown large.

    Raises:
      UserError: the file cannot be written.
    """
    tiles = "".join(
        f"<div class=tile><b>{_cell(value)}</b><span>{html.escape(name)}</span></div>"
        for name, value in (figures or {}).items()
    )
    body = [f"<h1>{html.escape(title)}</h1>"]
    body += [f"<p class=note>{html.escape(note)}</p>"] if note else []
    body += [f"<div class=tiles>{tiles}</div>"] if tiles else []
    body += [_row(row) for row in rows]
    body += [_table(table) for table in tables]
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )
    files.write_text(path, text)


def _known(labels: np.ndarray, count: int, other: int) -> np.ndarray:
    """Labels as int64 [H, W] with `other` wherever they are not in 0…count-1."""
    labels = np.asarray(labels).astype(np.int64)
    return np.where((labels >= 0) & (labels < count), labels, other)


def _with_legend(picture: Image.Image, entries: Sequence[tuple[str, Any]]) -> Image.Image:
    if not entries:
        return picture
    size = max(10, min(picture.width, picture.height) // 24)
    font = ImageFont.load_default(size)
    line, pad = round(size * 1.5), size // 2
    placed, x, y = [], pad, picture.height + pad
    for name, color in entries:
        text = _shorten(name, font, picture.width - 2 * pad - line)
        width = line + font.getlength(text) + 2 * pad
        if x > pad and x + width - pad > picture.width:
            x, y = pad, y + line
        placed.append((x, y, text, color))
        x += round(width)
    canvas = Image.new("RGB", (picture.width, y + line + pad), (255, 255, 255))
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for x, y, text, color in placed:
        draw.rectangle((x, y + 1, x + size, y + 1 + size), fill=color, outline=(90, 90, 90))
        draw.text((x + line, y + 1 + size / 2), text, fill=(20, 20, 20), font=font, anchor="lm")
    return canvas


def _shorten(text: str, font: Any, width: float) -> str:
    text = " ".join(text.split())  # a line break would upset the layout
    high = 2  # so many letters do not fit: found from below, for a name may be very long
    while high < len(text) and font.getlength(text[:high]) <= width:
        high *= 2
    if high >= len(text) and font.getlength(text) <= width:
        return text
    low, high = 1, min(high, len(text))  # one is always shown
    while high - low > 1:
        middle = (low + high) // 2
        fits = font.getlength(text[:middle] + "…") <= width
        low, high = (middle, high) if fits else (low, middle)
    return text[:low] + "…"


def _cell(value: str | float | int | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else html.escape(str(value))


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    lines = []
    for i, row in enumerate(table.rows):
        cells = []
        for j, value in enumerate(row):
            text = _cell(value)
            if j == 0 and table.colors is not None:
                rgb = ",".join(str(int(c)) for c in table.colors[i])
                text = f'<i class=swatch style="background:rgb({rgb})"></i>{text}'
            if j == table.bar and isinstance(value, int | float):
                percent = 100 * min(max(float(value), 0.0), 1.0)
                text = f'<span class=bar><i style="width:{percent:.1f}%"></i></span>{text}'
            number = value is None or isinstance(value, int | float)
            cells.append(f"<td class=number>{text}</td>" if number else f"<td>{text}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    caption = f"<h2>{html.escape(table.caption)}</h2>"
    return (
        f"<section>{caption}<div class=scroll><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _row(row: Row) -> str:
    pictures = "".join(
        f'<figure><img loading="lazy" src="{_source(image)}" alt="{html.escape(title)} of '
        f'{html.escape(row.caption)}"><figcaption>{html.escape(title)}</figcaption></figure>'
        for title, image in row.images.items()
    )
    return f"<section><h3>{html.escape(row.caption)}</h3><div class=row>{pictures}</div></section>"


def _source(image: bytes | str) -> str:
    if isinstance(image, str):
        return html.escape(quote(image))
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1b2330; --soft: #667085;
  --line: #e3e6eb; --accent: #3867d6; }
@media (prefers-color-scheme: dark) { :root { --page: #12151b; --card: #1b2029; --text: #e8ebf0;
  --soft: #98a2b3; --line: #2d3440; --accent: #6d94ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .75rem; }
h3 { font-size: .95rem; margin: 0 0 .6rem; overflow-wrap: anywhere; }
.note { color: var(--soft); margin: 0 0 1.25rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .75rem; }
.tile, section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.tile { padding: .9rem 1rem; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
section { padding: 1rem; margin-top: 1rem; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(200px, 100%), 1fr));
  gap: .75rem; }
figure { margin: 0; }
img { width: 100%; height: auto; display: block; border-radius: 8px; }
figcaption { color: var(--soft); font-size: .8rem; padding-top: .25rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th { text-align: left; color: var(--soft); font-weight: 500; }
th, td { padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line); }
.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.swatch { display: inline-block; width: .85em; height: .85em; border-radius: 3px;
  margin-right: .5em; border: 1px solid var(--line); vertical-align: -.08em; }
.bar { display: inline-block; width: min(16rem, 40vw); height: .6em; border-radius: 1em;
  background: var(--line); margin-right: .75em; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--accent); }
"""
