"""Qualitative panels, as papers print them: photos beside the label maps of several methods."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from segdiff_jax import codec, files
from segdiff_jax.config import Config
from segdiff_jax.data import images
from segdiff_jax.data.sources.source import evenly, open_source
from segdiff_jax.errors import UserError
from segdiff_jax.inference import page, pictures
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.text.vocabulary import Vocabulary

_SMALLEST = 0.004  # of the picture: regions below it are not named
_LONGEST = 480  # pixels of a panel's longer side


def write(
    output: str, checkpoint: str, config: Config, columns: Mapping[str, str], count: int
) -> None:
    """Write panels.png and panels.html: `count` photos of the validation split, evenly spread.

    columns: name → folder of label maps, PNGs of class ids that are called as the photos are. The
    model's own labels follow, then the truth. Raises `UserError` for a map that is not there, or
    is of another size.
    """
    source = open_source(config.data, config.data.val_split, config.seed)
    model, classes = Segmenter.load(checkpoint), source.vocabulary
    ignored, colors = codec.ignore_label(len(classes)), classes.palette().tolist()
    count = min(count, len(source))
    rows = []
    for number in evenly(count, len(source)):
        record = source[number]
        found = model(record["image"], classes, closed=True)
        maps = {name: _stored(Path(folder), record) for name, folder in columns.items()}
        maps |= {"ours": found.labels, "truth": record["labels"]}
        shown = {name: pictures.encode(named(ids, classes)) for name, ids in maps.items()}
        photo = Image.fromarray(record["image"])
        photo = photo.resize(_size(photo.size), Image.Resampling.BICUBIC)
        present = np.unique(np.stack(list(maps.values())))
        legend = {classes.names[i]: colors[i] for i in present if i < min(ignored, len(classes))}
        cells: dict[str, bytes | str] = {"image": pictures.encode(photo, photo=True), **shown}
        rows.append(page.Row(record["name"], cells, legend))
    sheet = page.contact_sheet(rows, height=min(_LONGEST, 320))
    files.write_bytes(os.path.join(output, "panels.png"), pictures.encode(sheet))
    note = f"Columns: {', '.join(rows[0].images)}. {checkpoint}"
    page.page(os.path.join(output, "panels.html"), "Panels", rows=rows, note=note)


def _stored(folder: Path, record: Mapping) -> np.ndarray:
    """Read the label map of a photo in another method's folder, int [H, W]."""
    names = (f"{record['name']}{end}.png" for end in ("", "_labels"))
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        raise UserError(f"{folder}: has no {record['name']}.png: name maps as the photos are")
    labels = images.read_labels(str(path))
    if labels.shape != record["labels"].shape:
        (h, w), (height, width) = labels.shape, record["labels"].shape
        raise UserError(f"{path}: {w}x{h} pixels, but its photo has {width}x{height}")
    return labels


def named(labels: np.ndarray, classes: Vocabulary) -> Image.Image:
    """Colour a label map [H, W], with the name of each class deep in its largest region."""
    picture = Image.fromarray(pictures.colorize(labels, classes.palette()))
    size, native = _size(picture.size), picture.size
    picture = picture.resize(size, Image.Resampling.NEAREST)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(max(11, min(size) // 22))
    for number in pictures.present(labels, classes.palette()):
        mask = labels == number
        if mask.mean() < _SMALLEST:
            continue
        # Far from every edge of the region, and of the picture.
        depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
        y, x = np.unravel_index(depth.argmax(), depth.shape)
        text = classes.names[number]
        half = font.getlength(text) / 2 + 2
        centre = float(np.clip(x * size[0] / native[0], half, max(half, size[0] - half)))
        at = centre, y * size[1] / native[1]
        draw.text(at, text, (255, 255, 255), font, "mm", stroke_width=2, stroke_fill=(0, 0, 0))
    return picture


def _size(native: Sequence[int]) -> tuple[int, int]:
    """Return (width, height) to show a picture at: small ones are enlarged, so names fit."""
    scale = _LONGEST / max(native)
    return round(native[0] * scale), round(native[1] * scale)
