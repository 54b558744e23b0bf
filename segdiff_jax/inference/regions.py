"""A mask in forms that other tools read: COCO's run-length encoding, and polygons."""

from typing import Any

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree


def rle(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask bool [H, W] as COCO does in short: {"size": [H, W], "counts": text}.

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
    """Return the rings int [n, 2] of (x, y) around a mask bool [H, W], along its pixels' edges.

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
            # Turn right where pixels meet at a corner, so as to stay around one of them.
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
    """Return the unit steps along the border of a mask [H + 2, W + 2], by the corner they leave."""
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


def parts(mask: np.ndarray, tolerance: float) -> list[np.ndarray]:
    """Return one ring int [n, 2] of (x, y) for each connected part of a mask bool [H, W].

    A hole is joined to its outer ring by a seam there and back, which encloses nothing: formats
    without holes hold them so. Corners within `tolerance` pixels of the rest are left out.
    """
    labels, _ = ndimage.label(mask)
    found = []
    for number, window in enumerate(ndimage.find_objects(labels), 1):
        # The outer ring is the one that reaches furthest to the right.
        rings = sorted(polygons(labels[window] == number), key=lambda ring: -ring[:, 0].max())
        outer, *holes = [simplified(ring, tolerance) for ring in rings]
        found.append(_joined(outer, holes) + [window[1].start, window[0].start])
    return found


def _joined(outer: np.ndarray, holes: list[np.ndarray]) -> np.ndarray:
    """Join rings to one, which leaves the outer at the corner nearest to each hole and returns."""
    detours: dict[int, list[np.ndarray]] = {}
    tree = cKDTree(outer)
    for hole in holes:
        distances, nearest = tree.query(hole)
        start = int(distances.argmin())
        turned = np.roll(hole, -start, axis=0)
        corner = int(nearest[start])
        detours.setdefault(corner, []).append(
            np.concatenate([turned, turned[:1], outer[corner : corner + 1]])
        )
    pieces = [[outer[i : i + 1], *detours.get(i, [])] for i in range(len(outer))]
    return np.concatenate(sum(pieces, []))


def simplified(ring: np.ndarray, tolerance: float) -> np.ndarray:
    """Leave out corners of a ring [n, 2] (Douglas and Peucker, 1973), but for three of them."""
    closed = np.concatenate([ring, ring[:1]]).astype(np.float64)
    far = int(np.hypot(*(closed - closed[0]).T).argmax())
    keep = {0, far, len(ring)}
    spans = [(0, far), (far, len(ring))]
    while spans:
        first, last = spans.pop()
        if last - first < 2:
            continue
        between, (dx, dy) = closed[first + 1 : last] - closed[first], closed[last] - closed[first]
        length = np.hypot(dx, dy)
        away = (
            np.abs(between[:, 0] * dy - between[:, 1] * dx) / length
            if length
            else np.hypot(*between.T)
        )
        middle = first + 1 + int(away.argmax())
        if away.max() > tolerance:
            keep.add(middle)
            spans += [(first, middle), (middle, last)]
    return ring[sorted(keep)[:-1]] if len(keep) > 3 else ring
