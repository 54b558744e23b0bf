"""Metrics against a pixel-by-pixel count in plain Python."""

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from segdiff_jax.evaluation.metrics import class_iou, confusion, summarize

K = 4
NAMES = ["sky", "road", "tree", "car"]
LABELS = st.sampled_from([0, 1, 2, 3, 255])


@st.composite
def pairs(draw, label=LABELS):
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=6))
    truth = draw(hnp.arrays(np.uint8, shape, elements=label))
    return truth, draw(hnp.arrays(np.int32, shape, elements=LABELS))


def _oracle(truth, guess, trained=(), novel=()):
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
        "pixel_accuracy": mean(Fraction(int(t == g)) for t, g in pixels),
        "mean_accuracy": mean(accuracy.values()),
        "per_class": {n: float(iou[k]) if k in iou else None for k, n in enumerate(NAMES)},
        "miou_trained": mean(iou[k] for k in trained if k in present),
        "miou_novel": mean(iou[k] for k in novel if k in present),
    }
    a, b = result["miou_trained"], result["miou_novel"]
    both = (
        None
        if a is None or b is None
        else 0.0
        if a + b == 0
        else 2 / (1 / a + 1 / b)
        if a * b
        else 0.0
    )
    return result | {"miou_harmonic": both}


def _close(got, expected):
    assert got.keys() == expected.keys()
    assert got.pop("per_class") == pytest.approx(expected.pop("per_class"), abs=1e-12)
    assert got == pytest.approx(expected, abs=1e-12)


@given(pairs())
def test_every_figure_equals_the_pixel_count(pair):
    truth, guess = pair
    got = summarize(confusion(truth, guess, K), NAMES, trained=[0, 2], novel=[1, 3])
    _close(got, _oracle(truth, guess, trained=[0, 2], novel=[1, 3]))


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


@given(pairs(), pairs())
def test_images_add_up(one, two):
    total = confusion(*one, K) + confusion(*two, K)
    together = [np.concatenate([a.ravel(), b.ravel()]) for a, b in zip(one, two, strict=True)]
    np.testing.assert_array_equal(total, confusion(*together, K))


@given(pairs(label=st.sampled_from([0, 1, 2, 3])))
def test_perfect_prediction(pair):
    truth, _ = pair
    got = summarize(confusion(truth, truth, K), NAMES)
    figures = [got[k] for k in ("miou_present", "miou_union", "pixel_accuracy", "mean_accuracy")]
    assert figures == [1.0] * 4
    assert "miou_trained" not in got and "miou_harmonic" not in got


@given(pairs(), st.permutations(range(K)))
def test_renaming_classes_changes_nothing(pair, order):
    lookup = np.full(256, 255)
    lookup[:K] = order
    before, after = (
        summarize(confusion(t, g, K), NAMES) for t, g in (pair, [lookup[x] for x in pair])
    )
    for key in ("miou_present", "miou_union", "pixel_accuracy", "mean_accuracy"):
        assert before[key] == pytest.approx(after[key])


def test_golden_numbers():
    truth = np.array([[0, 0, 0, 1], [1, 1, 255, 255]])
    guess = np.array([[0, 0, 1, 1], [255, 2, 0, 1]])
    got = summarize(confusion(truth, guess, K), NAMES, trained=[0], novel=[1, 2])
    # sky 2/3; road 1 hit, union {2,3,4,5}: 1/4; tree 0 of 1 false alarm; car occurs nowhere.
    assert got["per_class"] == pytest.approx(
        {"sky": 2 / 3, "road": 1 / 4, "tree": 0.0, "car": None}
    )
    assert got["miou_present"] == pytest.approx(11 / 24)
    assert got["miou_union"] == pytest.approx(11 / 36)
    assert got["pixel_accuracy"] == pytest.approx(1 / 2)
    assert got["mean_accuracy"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert got["miou_trained"] == pytest.approx(2 / 3)
    assert got["miou_novel"] == pytest.approx(1 / 4)  # tree is not in the ground truth
    assert got["miou_harmonic"] == pytest.approx(4 / 11)
    assert json.loads(json.dumps(got, allow_nan=False)) == got


def test_ignored_pixels_may_hold_any_prediction():
    truth = np.array([0, 255, 255])
    for guess in ([0, 1, 2], [0, 255, 0]):
        assert summarize(confusion(truth, guess, K), NAMES)["miou_union"] == 1.0


def test_nothing_to_measure():
    got = summarize(confusion(np.full(3, 255), np.zeros(3), K), NAMES, trained=[0], novel=[1])
    assert set(got.pop("per_class").values()) == {None}
    assert set(got.values()) == {None}


def test_one_half_of_the_split_missed_completely():
    matrix = confusion(np.array([0, 1]), np.array([0, 255]), K)
    got = summarize(matrix, NAMES, trained=[0], novel=[1])
    assert (got["miou_trained"], got["miou_novel"], got["miou_harmonic"]) == (1.0, 0.0, 0.0)


def test_other_ignore_label():
    matrix = confusion(np.array([0, 1, 0]), np.array([1, 1, 1]), 2, ignore_label=0)
    assert matrix.tolist() == [[0, 0, 0], [0, 1, 0]]
    assert np.isnan(class_iou(matrix)[0])


def test_mistakes_of_the_caller():
    with pytest.raises(ValueError, match="differ"):
        confusion(np.zeros((2, 2)), np.zeros(4), K)
    with pytest.raises(ValueError, match="below 4"):
        confusion(np.array([4]), np.array([0]), K)
    with pytest.raises(ValueError, match="names"):
        summarize(np.zeros((3, 4)), NAMES)
    with pytest.raises(ValueError, match="repeat"):
        summarize(np.zeros((2, 3)), ["a", "a"])
