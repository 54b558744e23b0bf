"""What the page needs of a result to show it, toggle classes and tell scores under the pointer.

All pixels travel inside the message, so that no file of this machine is served for them. The other
half is viewer.js.
"""

import base64
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

from segdiff_jax.data import geometry
from segdiff_jax.inference import pictures
from segdiff_jax.inference.result import Segmentation

_LONGEST = 1280  # pixels of the longer side of what is shown
_SCORES = 2_000_000  # values of all score maps together, in bytes of 0…255
_OTHER = 255

SCRIPT = (Path(__file__).parent / "viewer.js").read_text("utf-8")
STYLE = (Path(__file__).parent / "page.css").read_text("utf-8")


def data(found: Segmentation) -> str:
    """Return the value of the viewer, JSON, for fewer than 255 classes."""
    height, width = found.labels.shape
    shrink = min(1.0, _LONGEST / max(height, width))
    size = max(1, round(height * shrink)), max(1, round(width * shrink))
    labels = np.where(found.labels < len(found.classes), found.labels, _OTHER).astype(np.uint8)
    rows, columns = _grid(found.network_scores.shape)
    sheet, across = _sheet(found.network_scores, (rows, columns))
    shares, palette = found.shares(), found.vocabulary.palette().tolist()
    spread = found.uncertainty
    return json.dumps(
        {
            "height": size[0],
            "width": size[1],
            "classes": [
                {"name": name, "color": color, "share": shares.get(name, 0.0)}
                for name, color in zip(found.classes, palette, strict=True)
            ],
            "photo": _url(pictures.encode(geometry.resize(found.photo, size), photo=True), "jpeg"),
            "labels": _url(pictures.encode(geometry.resize(labels, size)), "png"),
            "uncertainty": None if spread is None else _uncertainty(spread, size),
            "scores": _url(pictures.encode(sheet), "png"),
            "grid": [rows, columns, across],
        }
    )


def _grid(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the size of one score map: the networks', or smaller so that all fit the message."""
    shrink = min(1.0, math.sqrt(_SCORES / math.prod(shape)))
    return max(1, int(shape[0] * shrink)), max(1, int(shape[1] * shrink))


def _sheet(scores: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, int]:
    """Return the maps [h, w, K] side by side in rows, uint8, and how many are in a row."""
    maps = np.moveaxis(geometry.enlarge(scores, size), -1, 0)  # smaller, if anything
    across = math.ceil(math.sqrt(len(maps)))
    down = math.ceil(len(maps) / across)
    sheet = np.zeros((down * across, *size), np.uint8)
    sheet[: len(maps)] = np.rint(255 * maps.clip(0.0, 1.0))
    tiled = sheet.reshape(down, across, *size).swapaxes(1, 2)
    return tiled.reshape(down * size[0], across * size[1]), across


def _uncertainty(spread: np.ndarray, size: tuple[int, int]) -> str:
    small = geometry.enlarge(spread, size)
    return _url(pictures.encode(Image.fromarray(pictures.uncertainty_map(small))), "png")


def _url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
