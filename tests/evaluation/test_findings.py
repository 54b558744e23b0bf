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

CLAIM = Claim("A beats B", "miou_present", "kind", "a", "b")
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
    columns, cells = table([a, b], "kind", ["miou_present", "agreement"])
    assert columns == ["figure", "kind a", "kind b"]
    assert cells == [["mIoU", "0.600 ± 0.100", "0.400"]], "no row has an agreement"
    assert estimate([1.0, 2.0, 4.0]).spread == pytest.approx(statistics.stdev([1, 2, 4]))


def test_the_table_has_a_row_for_each_figure_and_other_setting():
    data = measured({1: [0.3], 10: [0.5]}, "steps", kind="a")
    data += [Measurement({"kind": "b", "steps": 10}, 0, {"miou_present": 0.4, "agreement": 0.9})]
    columns, cells = table(rows(data), "steps", ["miou_present", "agreement"])
    assert columns == ["figure", "kind", "steps 1", "steps 10"]
    assert cells[:2] == [["mIoU", "a", "0.300", "0.500"], ["mIoU", "b", "", "0.400"]]
    assert cells[2:] == [["agreement", "b", "", "0.900"]]


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ([0.5, 0.6], [0.4, 0.5], "1 for (+0.100)."),
        ([0.4, 0.5], [0.5, 0.6], "1 against (-0.100)."),
        ([0.5, 0.6], [0.6, 0.48], "1 equal (+0.010)."),
        ([0.5], [0.499], "1 equal (+0.001)."),
        ([0.5], [0.4], "1 for (+0.100)."),
    ],
)
def test_a_claim_is_held_against_the_spread_of_paired_seeds(a, b, words):
    judged, equal = verdict([CLAIM], measured({"a": a, "b": b}))
    assert judged == f"A beats B: {words}"
    assert ("over 2 seeds" if len(a) == 2 else "0.01, of one seed") in equal


def test_a_claim_is_judged_in_every_other_setting():
    data = measured({"a": [0.5], "b": [0.4]}, steps=1) + measured({"a": [0.3], "b": [0.4]}, steps=9)
    assert verdict([CLAIM], data)[0] == "A beats B: 1 for, 1 against (-0.100 to +0.100)."
    same = CLAIM._replace(same={"steps": 9})
    assert verdict([same], data)[0] == "A beats B: 1 for (+0.100).", "at 9 both are one program"
    assert len(verdict([CLAIM], measured({"a": [0.5]}))) == 1, "nothing to compare"


@pytest.mark.parametrize(
    ("curve", "words"),
    [
        ({1: [0.3], 4: [0.5], 50: [0.504]}, "1 for (+0.204)."),
        ({1: [0.3], 4: [0.4], 50: [0.5]}, "1 against (+0.200)."),  # it rises beyond 10
        ({1: [0.5], 4: [0.4], 50: [0.3]}, "1 against (-0.200)."),
        ({1: [0.5], 4: [0.5], 50: [0.501]}, "1 equal (+0.001)."),
    ],
)
def test_an_elbow(curve, words):
    said = verdict([ELBOW], measured(curve, "steps"))[0]
    assert said == f"More is better, not beyond 10: {words}"


def test_the_plot_is_a_picture_whatever_is_missing():
    data = measured({1: [0.3, 0.4], 10: [0.5]}, "steps", kind="a")
    data += [Measurement({"kind": "b", "steps": 1}, 0, {"agreement": 0.9})]
    drawn = plot(rows(data), "steps", ["miou_present", "agreement"], "title")
    width, height = Image.open(io.BytesIO(drawn)).size
    assert width > 2 * height
