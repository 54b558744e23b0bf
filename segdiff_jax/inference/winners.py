"""Which of many small maps is the largest at each pixel of a large photo, and by how much.

The photo is worked off in blocks that stay in the processor's cache. Enlarged values lie between
those of their neighbours, so a map whose neighbours are all below another's is left out of a block:
of 150 classes few are near the top anywhere. The result is that of enlarging them all.
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from segdiff_jax.data import geometry

_ROUNDING = 1e-5  # of enlarged values: a map that is left out is below the largest by more
_CELLS = (1, 16)  # of the small maps in a block, (down, across)
_PIXELS = 256  # along each side of a block, or more


def largest(maps: np.ndarray, size: geometry.Size) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest of maps float32 [K, h, w] at each pixel of `size`, and which it is, int32.

    Of equal ones it is the first.
    """
    best, which = np.full(size, -np.inf, np.float32), np.zeros(size, np.int32)
    pictures = [Image.fromarray(np.ascontiguousarray(one)) for one in maps]
    possible = _possible(maps, size)
    for place, box in _blocks(size, maps.shape[1:]):
        top, number = best[place], which[place]
        for k in range(len(maps)) if possible is None else _in_box(possible, box):
            values = _enlarged(pictures[k], top.shape, box)
            better = values > top
            np.copyto(top, values, where=better)
            np.copyto(number, k, where=better)
    return best, which


def picked(maps: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Return float32 [H, W], at each pixel the value of the map [K, h, w] that `which` names."""
    found = np.empty(which.shape, np.float32)
    pictures = [Image.fromarray(np.ascontiguousarray(one)) for one in maps]
    for place, box in _blocks(which.shape, maps.shape[1:]):
        part, number = found[place], which[place]
        for k in np.flatnonzero(np.bincount(number.ravel())):
            np.copyto(part, _enlarged(pictures[k], part.shape, box), where=number == k)
    return found


def _enlarged(picture: Image.Image, size: geometry.Size, box: geometry.Box) -> np.ndarray:
    """Return the `box` (in pixels of the picture) at `size`, bilinear as `geometry.enlarge`."""
    return np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR, box))


def _blocks(
    size: geometry.Size, small: geometry.Size
) -> Iterator[tuple[tuple[slice, slice], geometry.Box]]:
    """Yield parts of `size` that cover it, with their boxes in pixels of the small maps."""
    sides = [
        max(1, min(_PIXELS, whole), whole * cells // few)
        for whole, few, cells in zip(size, small, _CELLS, strict=True)
    ]
    down, across = small[0] / size[0], small[1] / size[1]
    for y in range(0, size[0], sides[0]):
        for x in range(0, size[1], sides[1]):
            bottom, right = min(y + sides[0], size[0]), min(x + sides[1], size[1])
            box = x * across, y * down, right * across, bottom * down
            yield (slice(y, bottom), slice(x, right)), box


def _possible(maps: np.ndarray, size: geometry.Size) -> np.ndarray | None:
    """Return where each map may be the largest, bool [K, h + 1, w + 1]: between four neighbours.

    Return None where that would cost more than it spares: where maps are hardly enlarged.
    """
    if size[0] * size[1] < 16 * maps.shape[1] * maps.shape[2] or len(maps) == 1:
        return None
    padded = np.pad(maps, ((0, 0), (1, 1), (1, 1)), mode="edge")
    corners = padded[:, 1:, 1:], padded[:, :-1, 1:], padded[:, 1:, :-1], padded[:, :-1, :-1]
    highest = np.maximum(np.maximum(*corners[:2]), np.maximum(*corners[2:]))
    lowest = np.minimum(np.minimum(*corners[:2]), np.minimum(*corners[2:]))
    return highest >= lowest.max(0) - _ROUNDING


def _in_box(possible: np.ndarray, box: geometry.Box) -> np.ndarray:
    """Return the numbers of the maps that may be the largest somewhere in a box."""
    left, top, right, bottom = box
    # Pixel centres at y in [top, bottom] lie between the centres of rows y - 0.5 and y + 0.5.
    rows = slice(int(top + 0.5), int(np.ceil(bottom + 0.5)) + 1)
    columns = slice(int(left + 0.5), int(np.ceil(right + 0.5)) + 1)
    return np.flatnonzero(possible[:, rows, columns].any((1, 2)))
