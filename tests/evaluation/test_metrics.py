"""Metrics against a pixel-by-pixel count in plain Python."""

import json
from fractions import Fraction

import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from segdiff_jax.evaluation.metrics import (
    Sums,
    boundary,
    confusion,
    count,
    nothing,
    summarize,
    summarize_rest,
    undefined,
)

K = 4
NAMES = ["sky", "road", "tree", "car"]
LABELS = st.sampled_from([0, 1, 2, 3, 255])


@st.composite
def pairs(draw, label=LABELS):
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=6))
    truth = draw(hnp.arrays(np.uint8, shape, elements=label))
    return truth, draw(hnp.arrays(np.int32, shape, elements=LABELS))


def _oracle(truth, guess):
    """Every figure from sets of pixel positions: no confusion matrix."""
    pixels = [(t, g) for t, g in zip(truth.ravel(), guess.ravel(), strict=True) if t != 255]
    iou, accuracy, present = {}, {}, set()
    for k in range(K):
        is_true = {i for i, (t, _) in enumerate(pixels) if t == k}
        is_guess = {i for i, (_, g) in enumerate(pixels) if g == k}
        if is_true | is_guess:
            iou[k] = Fraction(len(is_true & is_guess), len(is_true | is_guess))
        if is_true:
            present.add(k)
            accuracy[k] = Fraction(len(is_true & is_guess), len(is_true))

    def mean(values):
        values = list(values)
        return float(sum(values) / len(values)) if values else None

    result = {
        "miou_present": mean(iou[k] for k in present),
        "miou_union": mean(iou.values()),
        "frequency_weighted_iou": mean(iou[t] for t, _ in pixels),
        "pixel_accuracy": mean(Fraction(int(t == g)) for t, g in pixels),
        "mean_accuracy": mean(accuracy.values()),
        "per_class": {n: float(iou[k]) if k in iou else None for k, n in enumerate(NAMES)},
        "miou_trained": mean(iou[k] for k in (0, 2) if k in present),
        "miou_novel": mean(iou[k] for k in (1, 3) if k in present),
    }
    a, b = result["miou_trained"], result["miou_novel"]
    both = None if a is None or b is None else 2 / (1 / a + 1 / b) if a and b else 0.0
    return result | {"miou_harmonic": both}


def _close(got, expected):
    assert got.keys() == expected.keys()
    assert got.pop("per_class") == pytest.approx(expected.pop("per_class"), abs=1e-12)
    assert got == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(pairs())
def test_every_figure_equals_the_pixel_count(pair):
    truth, guess = pair
    got = summarize(confusion(truth, guess, K), NAMES, novel=[1, 3])
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    _close(got, _oracle(truth, guess))


@settings(deadline=None, max_examples=50)
@given(pairs())
def test_matrix_cells(pair):
    truth, guess = pair
    matrix = confusion(truth, guess, K)
    assert matrix.shape == (K, K + 1) and matrix.dtype == np.int64
    for i in range(K):
        for j in range(K):
            assert matrix[i, j] == ((truth == i) & (guess == j)).sum()
        assert matrix[i, K] == ((truth == i) & (guess == 255)).sum()
    assert matrix.sum() == (truth != 255).sum()


def _mask_to_boundary(mask, ratio=0.02):
    """The paper's: pad with 0, erode by 3 x 3 as often as 2 % of the diagonal has pixels."""
    times = max(1, round(ratio * np.sqrt(mask.shape[0] ** 2 + mask.shape[1] ** 2)))
    padded = np.pad(mask, 1)
    eroded = scipy.ndimage.binary_erosion(padded, np.ones((3, 3)), iterations=int(times))
    return mask & ~eroded[1:-1, 1:-1]


@st.composite
def blocks(draw, num_classes=4, ignore=255):
    """Truth and prediction of an image: random rectangles, some of them not annotated."""
    height, width = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def painted():
        ids = np.full((height, width), rng.integers(0, num_classes))
        for _ in range(draw(st.integers(0, 5))):
            top, left = rng.integers(0, height), rng.integers(0, width)
            value = rng.choice([ignore, *rng.integers(0, num_classes, 3)])
            ids[top : top + rng.integers(1, 60), left : left + rng.integers(1, 60)] = value
        return ids

    return painted(), painted()


@pytest.mark.parametrize("num_classes", [255, 256, 847])
def test_what_is_ignored_has_8_bits_where_no_class_needs_its_number(num_classes):
    ignored = 255 if num_classes == 255 else 65535
    truth = np.array([num_classes - 1, 254, ignored, ignored])
    matrix = confusion(truth, np.array([num_classes - 1, ignored, 0, 1]), num_classes)
    assert matrix.sum() == 2 and matrix[num_classes - 1, num_classes - 1] == 1
    assert matrix[254, num_classes] == 1


@settings(deadline=None, max_examples=5)
@given(blocks(num_classes=847, ignore=65535))
def test_boundaries_of_many_classes(pair):
    truth, guess = (ids.astype(np.uint16) for ids in pair)
    valid, got = truth != 65535, boundary(truth, guess, 847)
    shown = np.union1d(truth[valid], guess[guess != 65535])
    assert not np.delete(got, shown, axis=0).any()
    for k in shown:
        one, other = _mask_to_boundary(truth == k), _mask_to_boundary((guess == k) & valid)
        assert got[k].tolist() == [one.sum(), other.sum(), (one & other).sum()]


def test_mistakes_of_the_caller():
    with pytest.raises(ValueError, match="differ"):
        confusion(np.zeros((2, 2)), np.zeros(4), K)
    with pytest.raises(ValueError, match="below 4"):
        confusion(np.array([4]), np.array([0]), K)


@settings(deadline=None, max_examples=50)
@given(blocks())
def test_boundaries_are_those_of_the_paper_class_by_class(pair):
    truth, guess = pair
    valid = truth != 255
    expected = []
    for k in range(K):
        one, other = _mask_to_boundary(truth == k), _mask_to_boundary((guess == k) & valid)
        expected.append([one.sum(), other.sum(), (one & other).sum()])
    np.testing.assert_array_equal(boundary(truth, guess, K), expected)


def _counted(truth, guess, rng, num_classes=K, uncertain=True):
    spread = rng.random(truth.shape) if uncertain else None
    return count(truth, guess, rng.random(num_classes), rng.random(truth.shape), spread)


@settings(deadline=None, max_examples=50)
@given(blocks(), st.integers(0, 9))
def test_what_is_not_annotated_counts_nowhere(pair, seed):
    truth, guess = pair
    spoilt = np.where(truth == 255, np.random.default_rng(seed).integers(0, K, truth.shape), guess)
    one, other = (_counted(truth, g, np.random.default_rng(seed)) for g in (guess, spoilt))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)
    pixels = (truth != 255).sum()
    assert one.confidence.sum() == one.uncertainty.sum() == pixels
    assert one.presence.sum() == (K if pixels else 0)


def test_a_perfect_prediction_has_perfect_boundaries_and_no_errors():
    rng = np.random.default_rng(0)
    truth = np.kron(rng.integers(0, K - 1, (4, 5)), np.ones((9, 7), int))
    truth[:9] = 255
    got = summarize_rest(_counted(truth, truth, rng), NAMES)
    assert got["boundary_miou_present"] == got["boundary_miou_union"] == 1.0
    assert got["per_class_boundary"]["car"] is None and got["error_aurc"] == 0.0
    assert got["error_auroc"] is None
    assert undefined(got)["error_auroc"] == "all pixels are right, or all are wrong"
    assert undefined(got)["per_class_boundary.car"] == "neither in the labels nor predicted"


def test_presence_is_asked_of_every_image_with_labels_and_every_class():
    truth, flat = np.array([[0, 1], [0, 255]]), np.zeros((2, 2))
    highest = np.array([0.75, 0.25, 0.5, 0.0])
    one = count(truth, truth, highest, flat, None)
    none = count(np.full((2, 2), 255), truth, highest, flat, None)
    sums = Sums(*map(np.add, one, none))
    got = summarize_rest(sums, NAMES)
    assert got["presence_auroc"] == pytest.approx(3 / 4)  # of four pairs, road < tree is wrong
    assert got["presence_mcc"] == pytest.approx((1 * 2 - 0) / np.sqrt(1 * 3 * 2 * 2))
    assert got["error_auroc"] is None
    assert undefined(got, ensemble=False)["error_auroc"] == "an ensemble of one has no uncertainty"


@settings(deadline=None, max_examples=30)
@given(st.lists(blocks(), min_size=1, max_size=3))
def test_false_alarms_are_pixels_of_classes_that_the_image_lacks(pairs):
    rng = np.random.default_rng(0)
    sums, false, pixels = nothing(K), 0, 0
    for truth, guess in pairs:
        sums = Sums(*map(np.add, sums, _counted(truth, guess, rng)))
        given_to = guess[truth != 255]
        pixels += given_to.size
        false += (~np.isin(given_to, [*truth[truth != 255], 255])).sum()
    expected = false / pixels if pixels else None
    assert summarize_rest(sums, NAMES)["false_alarms"] == expected


def test_no_image_leaves_no_figure():
    got = summarize_rest(nothing(K), NAMES)
    assert set(got.pop("per_class_boundary").values()) == set(got.values()) == {None}
    assert set(got) == set(undefined(got))
