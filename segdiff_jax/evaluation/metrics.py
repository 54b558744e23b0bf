"""Segmentation metrics from one confusion matrix.

Mean IoU has two conventions, which differ when a vocabulary is larger than what the images show:
detectron2 averages over the classes present in the ground truth, mmsegmentation over the classes
that occur in the ground truth or in the predictions. Both are reported.
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

IGNORE = 255


def confusion(
    labels: np.ndarray, predictions: np.ndarray, num_classes: int, ignore_label: int = IGNORE
) -> np.ndarray:
    """Counts pixels by true class and predicted class. Matrices of several images add up.

    Args:
      labels: integers of any shape, 0…num_classes-1 or `ignore_label`, which is not counted.
      predictions: integers of the same shape. Anything outside 0…num_classes-1 means *other*.
      num_classes: K.

    Returns:
      int64 [K, K+1]: row = true class, column = predicted class, the last column = *other*.

    Raises:
      ValueError: the shapes differ, or a label is neither a class nor `ignore_label`.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape:
        raise ValueError(f"labels {labels.shape} and predictions {predictions.shape} differ")
    valid = labels != ignore_label
    truth = labels[valid].astype(np.int64)  # [N]
    guess = predictions[valid].astype(np.int64)
    if truth.size and not (truth.min() >= 0 and truth.max() < num_classes):
        raise ValueError(f"labels must be below {num_classes} or {ignore_label}")
    guess = np.where((guess >= 0) & (guess < num_classes), guess, num_classes)
    cells = num_classes * (num_classes + 1)
    counts = np.bincount(truth * (num_classes + 1) + guess, minlength=cells)
    return counts.reshape(num_classes, num_classes + 1)


def class_iou(matrix: np.ndarray) -> np.ndarray:
    """Intersection over union of every class: float64 [K]; NaN where the union is empty.

    A pixel of class i predicted as *other* is in the union of i: a miss, and nobody's false alarm.
    """
    hits = np.diagonal(matrix).astype(np.float64)  # [K]
    union = matrix.sum(axis=1) + matrix[:, :-1].sum(axis=0) - hits
    return np.divide(hits, union, out=np.full_like(hits, np.nan), where=union > 0)


def summarize(
    matrix: np.ndarray,
    names: Sequence[str],
    trained: Collection[int] | None = None,
    novel: Collection[int] | None = None,
) -> dict[str, Any]:
    """The figures of `metrics.json`, as plain Python numbers in [0, 1].

    Args:
      matrix: [K, K+1] from `confusion`.
      names: K class names, all different.
      trained: ids of the classes seen in training; with `novel`, adds the split's figures.
      novel: ids of the classes never trained on.

    Returns:
      `miou_present` (mean over classes present in the ground truth: detectron2), `miou_union` (mean
      over classes with a non-empty union: mmsegmentation), `pixel_accuracy`, `mean_accuracy` (over
      present classes), `per_class` {name: IoU}; with a split `miou_trained` and `miou_novel` (both
      over present classes) and `miou_harmonic`, their harmonic mean. None where a figure has
      nothing to average.
    """
    matrix = np.asarray(matrix, np.int64)
    if matrix.shape != (len(names), len(names) + 1):
        raise ValueError(f"{len(names)} names for a confusion matrix of shape {matrix.shape}")
    if len(set(names)) != len(names):
        raise ValueError("class names repeat")
    iou = class_iou(matrix)  # [K]
    pixels = matrix.sum(axis=1)
    present = pixels > 0
    hits = np.diagonal(matrix)
    result: dict[str, Any] = {
        "miou_present": _mean(iou[present]),
        "miou_union": _mean(iou[~np.isnan(iou)]),
        "pixel_accuracy": float(hits.sum() / pixels.sum()) if pixels.any() else None,
        "mean_accuracy": _mean(hits[present] / pixels[present]),
        "per_class": {n: _number(value) for n, value in zip(names, iou, strict=True)},
    }
    if trained is not None and novel is not None:
        low, high = (_mean(iou[[i for i in ids if present[i]]]) for ids in (novel, trained))
        result |= {"miou_trained": high, "miou_novel": low, "miou_harmonic": _harmonic(high, low)}
    return result


def undefined(figures: dict[str, Any]) -> dict[str, str]:
    """Why figures of `summarize`, or IoUs of classes in it, are None: name → reason."""
    reasons = {
        name: "no class of these is in the labels"
        for name, value in figures.items()
        if value is None
    }
    absent = [name for name, value in figures["per_class"].items() if value is None]
    return reasons | {f"per_class.{n}": "neither in the labels nor predicted" for n in absent}


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _harmonic(a: float | None, b: float | None) -> float | None:
    if a is None or b is None:
        return None
    return 2 * a * b / (a + b) if a + b > 0 else 0.0
