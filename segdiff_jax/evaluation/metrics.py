"""Segmentation metrics from counts that add up over images and processes.

    labels, prediction [H, W] → count → Sums → + over images, processes → summarize → metrics.json

Mean IoU has two conventions, which differ when a vocabulary is larger than what the images show:
detectron2 averages over the classes present in the ground truth, mmsegmentation over the classes
that occur in the ground truth or in the predictions. Both are reported, of whole masks and of
their boundaries.

Presence asks whether a class is in an image at all, for every image with labels and every class.
The answer's score is the highest of the class's score map: a quantile would miss objects smaller
than the share that it cuts off; maps are decoded from latents, so that no single pixel is noise.
"""

import statistics
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from segdiff_jax import codec
from segdiff_jax.evaluation import tally

_BOUNDARY = 0.02  # the boundary's width, of the image's diagonal


class Sums(NamedTuple):
    """What was counted over some images. Pixels that are not annotated count nowhere."""

    confusion: np.ndarray  # int64 [K, K+1] as of `confusion`
    boundary: np.ndarray  # int64 [K, 3] as of `boundary`
    alarms: np.ndarray  # int64 [2]: pixels given to a class that the image does not have; all
    presence: np.ndarray  # tally: is the class in the image, by the highest of its scores
    confidence: np.ndarray  # tally of pixels: is the label right, by the score of its class
    uncertainty: np.ndarray  # tally of pixels: is the label wrong, by the ensemble's spread
    held_out: np.ndarray  # tally as `confidence`, of the images that a temperature is fitted on


def nothing(num_classes: int) -> Sums:
    """Return the sums of no image."""
    matrix = np.zeros((num_classes, num_classes + 1), np.int64)
    edges = np.zeros((num_classes, 3), np.int64)
    return Sums(matrix, edges, np.zeros(2, np.int64), *(tally.nothing() for _ in range(4)))


def added(one: Sums, other: Sums) -> Sums:
    """Add the sums of other images."""
    return Sums(*map(np.add, one, other))


def count(
    labels: np.ndarray,
    prediction: np.ndarray,
    highest: np.ndarray,
    confidence: np.ndarray,
    uncertainty: np.ndarray | None,
    held_out: bool = False,
) -> Sums:
    """Return the sums of one image.

    Args:
      labels, prediction: integers [H, W] as `confusion` takes them.
      highest: [K], the highest score of each class in the image.
      confidence: [H, W], the score of the predicted class, in [0, 1].
      uncertainty: [H, W], 0 or more; None for an ensemble of one.
      held_out: whether a temperature is fitted on this image, and judged on the others.
    """
    num_classes = len(highest)
    matrix = confusion(labels, prediction, num_classes)
    shown = np.asarray(matrix.any(axis=1))  # [K]
    valid = labels != codec.ignore_label(num_classes)
    right = labels[valid] == prediction[valid]
    spread = tally.nothing() if uncertainty is None else tally.count(uncertainty[valid], ~right)
    certain = tally.count(confidence[valid], right)
    given = matrix[:, :-1].sum(axis=0)  # [K], pixels
    return Sums(
        matrix,
        boundary(labels, prediction, num_classes),
        np.array([given[~shown].sum(), matrix.sum()]),
        tally.count(highest, shown) if shown.any() else tally.nothing(),
        certain,
        spread,
        certain if held_out else tally.nothing(),
    )


class OfImage(NamedTuple):
    """What one image shows of one class: pixels, of the whole masks and of their boundaries.

    These, added up over images, give both conventions of IoU again, and many other figures.
    """

    image: str
    name: str  # of the class
    truth: int
    prediction: int
    both: int
    boundary_truth: int
    boundary_prediction: int
    boundary_both: int
    score: float  # the highest in the image


def of_image(image: str, part: Sums, highest: np.ndarray, names: Sequence[str]) -> list[OfImage]:
    """List the classes in labels or prediction of the image that `part` counts, by their ids."""
    truth, prediction = part.confusion.sum(1), part.confusion[:, :-1].sum(0)  # [K] each
    both = part.confusion.diagonal()
    pixels = np.column_stack([truth, prediction, both, part.boundary])  # [K, 6]
    return [
        OfImage._make([image, names[i], *pixels[i].tolist(), float(highest[i])])
        for i in np.flatnonzero(truth + prediction).tolist()
    ]


def confusion(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Count pixels by true class and predicted class. Matrices of several images add up.

    Args:
      labels: integers of any shape, 0…num_classes-1 or `codec.ignore_label`, which is not counted.
      predictions: integers of the same shape. Anything outside 0…num_classes-1 means *other*.
      num_classes: K.

    Returns:
      int64 [K, K+1]: row = true class, column = predicted class, the last column = *other*.

    Raises:
      ValueError: the shapes differ, or a label is neither a class nor to be ignored.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape:
        raise ValueError(f"labels {labels.shape} and predictions {predictions.shape} differ")
    ignored = codec.ignore_label(num_classes)
    valid = labels != ignored
    truth = labels[valid].astype(np.int64)  # [N]
    guess = predictions[valid].astype(np.int64)
    if truth.size and not (truth.min() >= 0 and truth.max() < num_classes):
        raise ValueError(f"labels must be below {num_classes} or {ignored}")
    guess = np.where((guess >= 0) & (guess < num_classes), guess, num_classes)
    cells = num_classes * (num_classes + 1)
    counts = np.bincount(truth * (num_classes + 1) + guess, minlength=cells)
    return counts.reshape(num_classes, num_classes + 1)


def boundary(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Count pixels at the boundaries of the classes' masks. Counts of several images add up.

    A mask's boundary is what its erosion by a square takes away: by 3 x 3, once for each pixel in
    2 % of the image's diagonal (arXiv 2103.16562). Outside the image there is no mask. A prediction
    is cut to the annotated pixels, as the truth is.

    Args: as of `confusion`, of one image [H, W].

    Returns:
      int64 [K, 3]: pixels at the boundary of the truth, of the prediction, and of both.
    """
    valid = labels != codec.ignore_label(num_classes)
    truth = np.where(valid, labels, num_classes).astype(np.int32)
    known = (predictions >= 0) & (predictions < num_classes) & valid
    guess = np.where(known, predictions, num_classes).astype(np.int32)
    width = max(1, round(_BOUNDARY * float(np.hypot(*labels.shape))))
    edges = [~_uniform(ids, width) for ids in (truth, guess)]
    both = edges[0] & edges[1] & (truth == guess)
    shown = (truth[edges[0]], guess[edges[1]], truth[both])
    counts = [np.bincount(ids, minlength=num_classes + 1) for ids in shown]
    return np.stack(counts, axis=1)[:num_classes]


def _uniform(ids: np.ndarray, width: int) -> np.ndarray:
    """Find where the square of 2 width + 1 pixels is inside the image and of one id: bool [H, W].

    That is what all masks keep when each is eroded by that square. Its pixels are equal if each
    equals its neighbours on the right and below, which a summed-area table counts for all squares
    at once, and the last corner, which is no one's neighbour there, equals the centre.
    """
    uniform = np.zeros(ids.shape, bool)
    rows, columns = (length - 2 * width for length in ids.shape)
    if rows <= 0 or columns <= 0:
        return uniform
    inside = ids[:-1, :-1]
    differs = (inside != ids[:-1, 1:]) | (inside != ids[1:, :-1])  # [H-1, W-1]
    sums = np.zeros(ids.shape, np.int32)
    np.cumsum(np.cumsum(differs, axis=0, dtype=np.int32), axis=1, out=sums[1:, 1:])
    side = 2 * width
    count = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    centre = slice(width, width + rows), slice(width, width + columns)
    uniform[centre] = (count == 0) & (ids[side:, side:] == ids[centre])
    return uniform


def class_iou(matrix: np.ndarray) -> np.ndarray:
    """Return the intersection over union of every class: float64 [K]; NaN where that is empty.

    A pixel of class i predicted as *other* is in the union of i: a miss, and nobody's false alarm.
    """
    return _iou(matrix.sum(axis=1), matrix[:, :-1].sum(axis=0), np.diagonal(matrix))


def _iou(truth: np.ndarray, guess: np.ndarray, both: np.ndarray) -> np.ndarray:
    union = truth + guess - both
    return np.divide(both, union, out=np.full(union.shape, np.nan), where=union > 0)


def summarize(
    matrix: np.ndarray,
    names: Sequence[str],
    novel: Collection[int] = (),
) -> dict[str, Any]:
    """Return the figures of `metrics.json`, as plain Python numbers in [0, 1].

    Args:
      matrix: [K, K+1] from `confusion`.
      names: K class names, all different.
      novel: ids of the classes never trained on; with some, adds the split's figures.

    Returns:
      `miou_present` (mean over classes present in the ground truth: detectron2), `miou_union` (mean
      over classes with a non-empty union: mmsegmentation), `frequency_weighted_iou` (mean over the
      pixels of the ground truth), `pixel_accuracy`, `mean_accuracy` (over present classes),
      `per_class` {name: IoU}; with a split `miou_trained` and `miou_novel` (both over present
      classes) and `miou_harmonic`, their harmonic mean. None where a figure has nothing to average.
    """
    iou = class_iou(matrix)  # [K]
    pixels = matrix.sum(axis=1)
    present = pixels > 0
    hits = np.diagonal(matrix)
    result: dict[str, Any] = {
        "miou_present": _mean(iou[present]),
        "miou_union": _mean(iou[~np.isnan(iou)]),
        "frequency_weighted_iou": (
            float(np.average(iou[present], weights=pixels[present])) if present.any() else None
        ),
        "pixel_accuracy": float(hits.sum() / pixels.sum()) if pixels.any() else None,
        "mean_accuracy": _mean(hits[present] / pixels[present]),
        "per_class": {n: _number(value) for n, value in zip(names, iou, strict=True)},
    }
    if novel:
        never = np.isin(np.arange(len(names)), list(novel))
        low, high = (_mean(iou[present & ids]) for ids in (never, ~never))
        result |= {"miou_trained": high, "miou_novel": low, "miou_harmonic": _harmonic(high, low)}
    return result


def summarize_rest(sums: Sums, names: Sequence[str]) -> dict[str, Any]:
    """Return the figures of `metrics.json` that no confusion matrix tells.

    Returns:
      `boundary_miou_present`, `boundary_miou_union` and `per_class_boundary` {name: IoU}: as of
      whole masks. `false_alarms`: the share of pixels given to classes that their image does not
      have. `presence_auroc` and `presence_mcc` (at its best threshold).
      `calibration_error` of the winning score; `temperature`, fitted on the held-out images, and
      the error on the other ones before and after it, `calibration_error_before` and
      `calibration_error_after`. `error_auroc` and `error_aurc`: how well the
      uncertainty tells what is wrong. None where there is nothing to tell apart.
    """
    iou = _iou(*sums.boundary.T)  # [K]
    false, pixels = sums.alarms
    rest = sums.confidence - sums.held_out
    temperature = tally.temperature(sums.held_out) if rest.any() else None
    after = None
    if temperature is not None:
        after = tally.calibration_error(rest, tally.tempered(temperature))
    return {
        "boundary_miou_present": _mean(iou[sums.boundary[:, 0] > 0]),
        "boundary_miou_union": _mean(iou[~np.isnan(iou)]),
        "per_class_boundary": {n: _number(value) for n, value in zip(names, iou, strict=True)},
        "false_alarms": float(false / pixels) if pixels else None,
        "presence_auroc": tally.auroc(sums.presence),
        "presence_mcc": tally.best_mcc(sums.presence),
        "calibration_error": tally.calibration_error(sums.confidence),
        "temperature": temperature,
        "calibration_error_before": tally.calibration_error(rest),
        "calibration_error_after": after,
        "error_auroc": tally.auroc(sums.uncertainty),
        "error_aurc": tally.aurc(sums.uncertainty),
    }


def undefined(figures: dict[str, Any], ensemble: bool = True) -> dict[str, str]:
    """Say why figures, or those of classes in them, are None: name → reason."""
    certain = "an ensemble of one has no uncertainty"
    reasons = {
        "false_alarms": "no pixel is annotated",
        "presence_auroc": "no class is in one image and not in another",
        "presence_mcc": "no class is in one image and not in another",
        "calibration_error": "no pixel is annotated",
        "temperature": "it takes two images with labels: one to fit it on, one to judge it by",
        "calibration_error_before": "there is only one image",
        "calibration_error_after": "there is no temperature",
        "error_auroc": "all pixels are right, or all are wrong" if ensemble else certain,
        "error_aurc": "no pixel is annotated" if ensemble else certain,
    }
    missing = {
        name: reasons.get(name, "no class of these is in the labels")
        for name, value in figures.items()
        if value is None
    }
    for table in ("per_class", "per_class_boundary"):
        for name, value in figures.get(table, {}).items():
            if value is None:
                missing[f"{table}.{name}"] = "neither in the labels nor predicted"
    return missing


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _harmonic(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else float(statistics.harmonic_mean((a, b)))
