"""What the gray maps of an image say at its own size: scores, labels, uncertainty."""

import functools
from dataclasses import dataclass

import numpy as np

from segdiff_jax import codec

_EQUAL = 1e-6  # what resizing leaves between scores that are equal


@dataclass(frozen=True)
class Segmentation:
    """What one image gave.

    labels: int32 [H, W] at the image's own size; index into `classes`, or `other_label(K)`.
    scores: float32 [H, W, K] in [0, 1].
    uncertainty: float32 [H, W], spread of the ensemble for the winning class, in units of the gray
      map's range (0 = unanimous); None for N = 1.
    """

    labels: np.ndarray
    uncertainty: np.ndarray | None
    classes: tuple[str, ...]
    network_scores: np.ndarray  # [h, w, K], at the network's size

    @functools.cached_property
    def scores(self) -> np.ndarray:
        # Made when asked for: 150 classes of a 12-megapixel photo take 7 GB.
        return resize(self.network_scores, self.labels.shape)


def from_maps(
    gray: np.ndarray,
    spread: np.ndarray | None,
    classes: tuple[str, ...],
    group: int,
    size: tuple[int, int],
    threshold: float,
    closed: bool,
) -> Segmentation:
    """The maps and spread [P, h, w] of passes of `group` classes each, at `size` = (H, W).

    Scores are enlarged before the argmax, a band of rows at a time: memory stays flat. Where the
    best are equal, most often at 0 because every map is dark, the maps decide by what lies beyond
    [-1, 1] or beneath the levels (`codec.ranks`): in a closed vocabulary the class that is the
    nearest wins, not the first. `threshold` and `closed` as of `decode`.
    """
    ranks = codec.ranks(np.asarray(gray), group)  # [P, h, w, G]
    ranks = codec.join_passes(ranks, len(classes))  # [h, w, K]
    scores = ranks.clip(0.0, 1.0)
    labels = np.empty(size, np.int32)
    uncertainty = None if spread is None else np.empty(size, np.float32)
    for rows in _bands(size, len(classes)):
        band = resize(scores, size, rows)  # [b, W, K]
        winner = _winners(band, ranks, size, rows)
        labels[rows] = _or_other(winner, band, threshold, closed)
        if spread is not None and uncertainty is not None:
            passes = resize(np.moveaxis(spread, 0, -1), size, rows)  # [b, W, P]
            chosen = winner[..., None] // group
            uncertainty[rows] = np.take_along_axis(passes, chosen, -1)[..., 0]
    return Segmentation(labels, uncertainty, classes, scores)


def _winners(band: np.ndarray, ranks: np.ndarray, size: tuple[int, int], rows: slice) -> np.ndarray:
    """The best class of each pixel: scores [b, W, K] and, between equals, ranks [h, w, K]."""
    winner = np.argmax(band, -1)
    equal = band >= band.max(-1, keepdims=True) - _EQUAL
    if (equal.sum(-1) > 1).any():
        winner = np.argmax(np.where(equal, resize(ranks, size, rows), -np.inf), -1)
    return winner.astype(np.int32)


def other_label(num_classes: int) -> int:
    """The label of *other*: 255, or 65535 where 255 is a class."""
    return codec.IGNORE if num_classes <= codec.IGNORE else 65535


def decode(scores: np.ndarray, threshold: float, closed: bool) -> np.ndarray:
    """Scores [H, W, K] → labels int32 [H, W]: `codec.decode` on the host, without a copy."""
    return _or_other(np.argmax(scores, -1).astype(np.int32), scores, threshold, closed)


def _or_other(labels: np.ndarray, scores: np.ndarray, threshold: float, closed: bool) -> np.ndarray:
    if closed:
        return labels
    best = np.take_along_axis(scores, labels[..., None], -1)[..., 0]
    return np.where(best < threshold, np.int32(other_label(scores.shape[-1])), labels)


def _bands(size: tuple[int, int], channels: int) -> list[slice]:
    """Slices of rows that together cover `size`, each of at most 64 MB in float32 (or one row)."""
    height = max(1, 16_000_000 // (size[1] * channels))
    return [slice(top, min(top + height, size[0])) for top in range(0, size[0], height)]


def resize(maps: np.ndarray, size: tuple[int, ...], rows: slice = slice(None)) -> np.ndarray:
    """Bilinear resize of [h, w, C] to [H, W, C], half-pixel centres; only `rows` of it."""
    vertical, horizontal = _bilinear(maps.shape[0], size[0]), _bilinear(maps.shape[1], size[1])
    tall = np.tensordot(vertical[rows], maps, axes=(1, 0))  # [H, w, C]
    return horizontal @ tall  # [H, W, C]


def _bilinear(length: int, target: int) -> np.ndarray:
    """Weights [target, length]; widened to a triangle of the source step when shrinking."""
    scale = max(1.0, length / target)
    centres = (np.arange(target) + 0.5) * length / target - 0.5
    distance = np.abs(np.clip(centres, 0, length - 1)[:, None] - np.arange(length)) / scale
    weights = np.maximum(0.0, 1.0 - distance)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
