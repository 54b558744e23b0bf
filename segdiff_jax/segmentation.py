"""What the gray maps of an image say at its own size: scores, labels, uncertainty."""

import functools
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from segdiff_jax import codec


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

    Scores are enlarged before the argmax, a band of rows at a time: memory stays flat. `threshold`
    and `closed` as of `decode`.
    """
    scores = scores_of(gray, len(classes), group)
    labels = np.empty(size, np.int32)
    uncertainty = None if spread is None else np.empty(size, np.float32)
    for rows in _bands(size, len(classes)):
        band = resize(scores, size, rows)  # [b, W, K]
        labels[rows] = decode(band, threshold, closed)
        if spread is not None and uncertainty is not None:
            passes = resize(np.moveaxis(spread, 0, -1), size, rows)  # [b, W, P]
            winner = np.argmax(band, -1)[..., None] // group
            uncertainty[rows] = np.take_along_axis(passes, winner, -1)[..., 0]
    return Segmentation(labels, uncertainty, classes, scores)


def scores_of(gray: np.ndarray, num_classes: int, group: int) -> np.ndarray:
    """Gray maps of the passes [P, H, W] → class scores [H, W, K]."""
    per_pass = codec.scores(jnp.asarray(gray), group)  # [P, H, W, G]
    return np.asarray(codec.join_passes(per_pass, num_classes))


def other_label(num_classes: int) -> int:
    """The label of *other*: 255, or 65535 where 255 is a class."""
    return codec.IGNORE if num_classes <= codec.IGNORE else 65535


def decode(scores: np.ndarray, threshold: float, closed: bool) -> np.ndarray:
    """Scores [H, W, K] → labels int32 [H, W]: `codec.decode` on the host, without a copy."""
    labels = np.argmax(scores, -1).astype(np.int32)
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
