"""Tables and verdicts of studies, from made-up measurements whose answer is known."""

import io
import statistics

import pytest
from PIL import Image

from segdiff_jax.evaluation.findings import (
    Claim,
    Elbow,
    Measurement,
    estimate,
    plot,
    rows,
    table,
    verdict,
)

CLAIM = Claim("A beats B", "miou_present", {"kind": "a"}, {"kind": "b"})
ELBOW = Elbow("More is better, not beyond 10", "miou_present", "steps", 10)


def measured(values, key="kind", **rest):
    """{value of `key`: a figure for each seed} as measurements."""
    return [
        Measurement({**rest, key: name}, seed, {"miou_present": figure})
        for name, figures in values.items()
        for seed, figure in enumerate(figures)
    ]


def test_rows_have_mean_and_spread_over_seeds():
    a, b = rows(measured({"a": [0.5, 0.7, 0.6], "b": [0.4]}))
    assert a.figures["miou_present"] == (pytest.approx(0.6), pytest.approx(0.1))
    assert b.figures["miou_present"] == (0.4, None)
    columns, cells = table([a, b], ["miou_present", "agreement"])
    assert columns == ["kind", "mIoU"], "no row has an agreement"
    assert cells == [["a", "0.600 ± 0.100"], ["b", "0.400"]]
    assert estimate([1.0, 2.0, 4.0]).spread == pytest.approx(statistics.stdev([1, 2, 4]))


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ([0.5, 0.6], [0.4, 0.5], "seen here (+0.100 ± 0.000)"),
        ([0.4, 0.5], [0.5, 0.6], "the opposite is seen (-0.100 ± 0.000)"),
        ([0.5, 0.6], [0.6, 0.48], "no difference beyond the spread (+0.010"),
        ([0.5], [0.499], "no difference beyond the spread (+0.001)"),
        ([0.5], [0.4], "seen here (+0.100). One seed: no spread is known"),
    ],
)
def test_a_claim_is_held_against_the_spread_of_paired_seeds(a, b, words):
    assert f"A beats B: {words}" in verdict([CLAIM], measured({"a": a, "b": b}))


def test_a_claim_is_judged_in_every_other_setting():
    data = measured({"a": [0.5], "b": [0.4]}, steps=1) + measured({"a": [0.3], "b": [0.4]}, steps=9)
    said = verdict([CLAIM], data)
    assert "mixed, 1 for it, 1 against (steps 1: +0.100; steps 9: -0.100)" in said
    assert "A beats B" not in verdict([CLAIM], measured({"a": [0.5]})), "nothing to compare"


@pytest.mark.parametrize(
    ("curve", "words"),
    [
        ({1: [0.3], 4: [0.5], 50: [0.504]}, "seen here"),
        ({1: [0.3], 4: [0.4], 50: [0.5]}, "the opposite"),  # it rises beyond 10
        ({1: [0.5], 4: [0.4], 50: [0.3]}, "the opposite"),
        ({1: [0.5], 4: [0.5], 50: [0.501]}, "no difference"),
    ],
)
def test_an_elbow(curve, words):
    said = verdict([ELBOW], measured(curve, "steps"))
    assert f"not beyond 10: {words}" in said
    assert "of the best from 4 on" in said or curve[4] != [0.5] or curve[1] == [0.5]


def test_the_plot_is_a_picture_whatever_is_missing():
    data = measured({1: [0.3, 0.4], 10: [0.5]}, "steps", kind="a")
    data += [Measurement({"kind": "b", "steps": 1}, 0, {"agreement": 0.9})]
    drawn = plot(rows(data), "steps", ["miou_present", "agreement"], "title")
    width, height = Image.open(io.BytesIO(drawn)).size
    assert width > 2 * height
