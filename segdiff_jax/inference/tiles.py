"""A large photo in windows as large as the networks' view, and one map made of what they show.

layout    photo [H, W] → a canvas, its smaller copy, and windows on it that overlap by a quarter
blended   maps of the windows and of the photo as a whole → their mean at the canvas' size
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from segdiff_jax.data import geometry

OVERLAP = 0.25  # of a window, between neighbours


class Layout(NamedTuple):
    """Where the windows are, in pixels of the canvas."""

    canvas: geometry.Size  # (height, width)
    window: geometry.Size  # of the networks' view, or less where the canvas is smaller
    corners: list[tuple[int, int]]  # of the windows, top left, (y, x)


def layout(native: geometry.Size, view: geometry.Size, count: int) -> Layout:
    """Lay at most `count` windows of size `view` along each side of a photo, never enlarged."""
    reach = 1 + (count - 1) * (1 - OVERLAP)  # of all windows of a side, in windows
    scale = max(1.0, *(length / (side * reach) for length, side in zip(native, view, strict=True)))
    canvas = tuple(max(1, round(length / scale)) for length in native)
    window = tuple(map(min, canvas, view))
    rows, columns = (_starts(*sides) for sides in zip(canvas, window, strict=True))
    return Layout(canvas, window, [(y, x) for y in rows for x in columns])  # type: ignore[arg-type]


def _starts(length: int, window: int) -> list[int]:
    step = max(1.0, window * (1 - OVERLAP))
    count = 1 + int(np.ceil((length - window) / step - 1e-9))
    return np.linspace(0, length - window, count).round().astype(int).tolist()


def blended(
    canvas: np.ndarray,
    plan: Layout,
    whole: np.ndarray,
    maps_of: Callable[[list[np.ndarray]], Sequence[np.ndarray]],
    at_once: int,
) -> np.ndarray:
    """Return maps float32 [C, h, w] at the size of `canvas`: the mean of the windows' and `whole`.

    Windows weigh by the distance to their edges: what a network sees near one lacks context.

    Args:
      canvas: the photo, uint8 [h, w, 3].
      whole: the maps [C, ...] of the photo as a whole, at any size.
      maps_of: at most `at_once` windows, uint8 → the maps [C, ...] of each, at any size.
    """
    height, width = plan.window
    total = np.zeros((len(whole), *plan.canvas), np.float32)
    weights = np.zeros(plan.canvas, np.float32)
    down, across = (np.minimum(np.arange(n) + 1, n - np.arange(n)) for n in plan.window)
    weight = np.outer(down, across).astype(np.float32)
    places = [(slice(y, y + height), slice(x, x + width)) for y, x in plan.corners]
    for start in range(0, len(places), at_once):
        part = places[start : start + at_once]
        for place, maps in zip(part, maps_of([canvas[place] for place in part]), strict=True):
            weights[place] += weight
            for channel, one in zip(total, maps, strict=True):
                channel[place] += geometry.enlarge(one, plan.window) * weight
    weights *= 2
    for channel, one in zip(total, whole, strict=True):
        channel /= weights
        channel += geometry.enlarge(one, plan.canvas) / 2
    return total
