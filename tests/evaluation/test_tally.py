"""Figures of tallies against their definitions, question by question."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from segdiff_jax.evaluation import tally

HALF = st.floats(0, 1, width=16) | st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.0**-24, 65504.0])
QUESTIONS = st.lists(st.tuples(HALF, st.booleans()), max_size=40)


def _counted(questions):
    values, answers = zip(*questions, strict=True) if questions else ((), ())
    return tally.count(np.array(values, np.float32), np.array(answers, bool))


def _approx(value):
    return None if value is None else pytest.approx(value, abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(QUESTIONS, QUESTIONS)
def test_tallies_add_up_and_lose_nothing(some, more):
    np.testing.assert_array_equal(_counted(some) + _counted(more), _counted(some + more))
    rows, answers = np.nonzero(_counted(some))
    found = {(tally.VALUES[r], bool(a)) for r, a in zip(rows, answers, strict=True)}
    assert found == {(abs(v), a) for v, a in some}


def test_values_are_rounded_to_three_digits():
    values = np.random.default_rng(0).random(1000)
    row = np.flatnonzero(tally.count(values, np.ones(1000, bool)).any(1))
    nearest = tally.VALUES[row][np.abs(tally.VALUES[row][None] - values[:, None]).argmin(1)]
    np.testing.assert_allclose(nearest, values, rtol=2**-11, atol=2**-25)
    assert tally.count(np.array([1e9, -1.0]), np.array([True, True]))[[0, -1], 1].tolist() == [1, 1]


@settings(deadline=None, max_examples=50)
@given(QUESTIONS)
def test_auroc_is_the_share_of_pairs_in_order(questions):
    yes, no = ([v for v, a in questions if a is kind] for kind in (True, False))
    pairs = [(v > w) + (v == w) / 2 for v in yes for w in no]
    assert tally.auroc(_counted(questions)) == _approx(np.mean(pairs) if pairs else None)
    if pairs:
        statistic = scipy.stats.mannwhitneyu(yes, no).statistic
        assert tally.auroc(_counted(questions)) == pytest.approx(statistic / len(pairs))


@settings(deadline=None, max_examples=50)
@given(QUESTIONS)
def test_best_mcc_is_the_best_of_all_thresholds(questions):
    answers = np.array([a for _, a in questions], float)
    values = np.array([v for v, _ in questions])
    expected = None
    if len(set(answers)) == 2:
        correlations = [0.0]
        for threshold in values:
            said = (values >= threshold).astype(float)
            if said.min() < said.max():
                correlations.append(np.corrcoef(said, answers)[0, 1])
        expected = max(correlations)
    assert tally.best_mcc(_counted(questions)) == _approx(expected)


@settings(deadline=None, max_examples=50)
@given(QUESTIONS)
def test_aurc_is_the_mean_risk_of_what_is_at_least_as_sure(questions):
    risks = [np.mean([error for w, error in questions if w <= v]) for v, _ in questions]
    assert tally.aurc(_counted(questions)) == _approx(np.mean(risks) if risks else None)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 1, width=16), st.booleans()), max_size=40))
def test_calibration_error_bin_by_bin(questions):
    bins = {}
    for value, right in questions:
        bins.setdefault(min(14, math.floor(value * 15)), []).append((value, right))
    gaps = [
        len(b) * abs(np.mean([a for _, a in b]) - np.mean([v for v, _ in b])) for b in bins.values()
    ]
    expected = sum(gaps) / len(questions) if questions else None
    assert tally.calibration_error(_counted(questions)) == _approx(expected)


def test_huge_counts_do_not_overflow():
    counts = tally.nothing()
    counts[100], counts[200] = (3 * 10**12, 10**12), (10**12, 3 * 10**12)
    assert tally.auroc(counts) == pytest.approx((9 + 3 / 2 + 3 / 2) / 16)
    assert tally.best_mcc(counts) == pytest.approx(0.5)
    assert tally.aurc(counts) == pytest.approx((1 / 4 + 1 / 2) / 2)


def test_the_temperature_undoes_overconfidence():
    """Answers drawn with the chances σ(l / T), scores that claim σ(l): T comes back."""
    rng = np.random.default_rng(0)
    logits = rng.normal(1.0, 2.0, 200_000)
    for true in (0.5, 1.0, 2.5):
        answers = rng.random(logits.size) < scipy.special.expit(logits / true)
        counted = tally.count(scipy.special.expit(logits), answers)
        found = tally.temperature(counted)
        assert found == pytest.approx(true, rel=0.03)
        after = tally.calibration_error(counted, tally.tempered(found))
        assert after < 0.01
        if true != 1.0:
            assert after < tally.calibration_error(counted) / 5
    assert tally.temperature(tally.nothing()) is None


def test_a_temperature_of_one_changes_nothing():
    inside = (tally.VALUES > 0.001) & (tally.VALUES < 0.999)
    np.testing.assert_allclose(tally.tempered(1.0)[inside], tally.VALUES[inside], atol=1e-6)
    counted = tally.count(np.array([0.0, 1.0, 0.5, 0.5]), np.array([True, False, True, False]))
    assert 0.04 < tally.temperature(counted) < 25, "certain and wrong is no infinite surprise"
