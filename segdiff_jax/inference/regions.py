"""A mask in forms that other tools read: COCO's run-length encoding, and polygons."""

from typing import Any

import numpy as np


def rle(mask: np.ndarray) -> dict[str, Any]:
    """A mask bool [H, W] as COCO's compressed encoding: {"size": [H, W], "counts": text}.

    Runs of 0 and 1 in turn, 0 first, down the columns; from the third on as differences to the run
    before the last, in groups of five bits with a bit that says whether another follows.
    """
    flat = np.asarray(mask, bool).ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0] if flat[:1].any() else [], [0], edges, [flat.size]]))
    values = runs.astype(np.int64)
    values[3:] -= runs[1:-2].astype(np.int64)
    text = bytearray()
    for value in values.tolist():
        more = True
        while more:
            low, value = value & 31, value >> 5
            more = value != (-1 if low & 16 else 0)
            text.append(48 + low + (32 if more else 0))
    return {"size": list(mask.shape), "counts": text.decode("ascii")}


def polygons(mask: np.ndarray) -> list[np.ndarray]:
    """The rings int [n, 2] of (x, y) around a mask bool [H, W], along the edges of its pixels.

    The mask is on the right of each ring's direction (y points down), so outer rings run clockwise
    as one sees them. Where two pixels meet at a corner only, their rings stay apart.
    """
    following = _edges(np.pad(np.asarray(mask, bool), 1))
    rings = []
    while following:
        start = next(iter(following))
        ring, (x, y), (dx, dy) = [start], start, following[start][0]
        while True:
            choices = following[x, y]
            # To the right, so as to stay around one pixel where two meet.
            step = max(choices, key=lambda turn: dx * turn[1] - dy * turn[0])
            choices.remove(step)
            if not choices:
                del following[x, y]
            if step != (dx, dy):
                ring.append((x, y))
            dx, dy = step
            x, y = x + dx, y + dy
            if (x, y) == start:
                break
        rings.append(np.array(ring))
    return rings


def _edges(padded: np.ndarray) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Of a mask [H + 2, W + 2]: from each corner (x, y), the unit steps along its border."""
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def add(where: np.ndarray, begin: tuple[int, int], step: tuple[int, int]) -> None:
        for y, x in np.argwhere(where).tolist():
            following.setdefault((x + begin[0] - 1, y + begin[1] - 1), []).append(step)

    above, below = padded[:-1], padded[1:]
    add(np.pad(below & ~above, ((1, 0), (0, 0))), (0, 0), (1, 0))  # upper edges, rightwards
    add(np.pad(above & ~below, ((0, 1), (0, 0))), (1, 1), (-1, 0))  # lower edges, leftwards
    left, right = padded[:, :-1], padded[:, 1:]
    add(np.pad(left & ~right, ((0, 0), (0, 1))), (1, 0), (0, 1))  # right edges, downwards
    add(np.pad(right & ~left, ((0, 0), (1, 0))), (0, 1), (0, -1))  # left edges, upwards
    return following
