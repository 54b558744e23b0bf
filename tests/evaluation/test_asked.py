"""Synonyms: asked for together, each by itself, or not at all."""

import numpy as np
from test_evaluator import MemorySource

from segdiff_jax.evaluation import asked, metrics
from segdiff_jax.evaluation.evaluator import evaluate
from segdiff_jax.evaluation.plan import Plan
from segdiff_jax.text import vocabulary


class Named:
    def __init__(self, names, wanted=None):
        self.vocabulary = vocabulary.from_names(names)
        if wanted:
            self.asked = vocabulary.from_names(wanted)


def test_what_is_asked_for():
    source = Named(["sky", "building, edifice, Sky", "edifice"])
    mean = asked.of(source)
    assert mean.vocabulary is source.vocabulary and mean.owner.tolist() == [0, 1, 2]
    first = asked.of(source, "first")
    assert [e.names for e in first.vocabulary.classes] == [("sky",), ("building",), ("edifice",)]
    source = Named(["sky", "building, edifice, Sky"])
    most = asked.of(source, "max")
    assert most.vocabulary.names == ("sky", "building", "edifice"), "Sky is a class of its own"
    assert most.owner.tolist() == [0, 1, 1]
    assert most.highest(np.array([0.1, 0.2, 0.9]), 2).tolist() == [0.1, 0.9]
    found = most.labels(np.array([[0, 1, 2, 255]], np.int32))
    assert found[0, :3].tolist() == [0, 1, 1] and found[0, 3] >= 2, "*other* stays *other*"


def test_what_is_beyond_the_last_class_is_background():
    source = Named(["cat", "dog, hound", "background"], ["cat", "dog, hound", "sofa", "tree, oak"])
    for synonyms, owner in (("mean", [0, 1, 2, 2]), ("max", [0, 1, 2, 2, 1, 2])):
        found = asked.of(source, synonyms)
        assert found.owner.tolist() == owner
        assert found.labels(np.array([[3, 255]], np.int32)).tolist() == [[2, 2]]


def test_the_highest_score_of_all_names_wins(make_segmenter):
    model, source = make_segmenter(), MemorySource(count=2)  # "building, edifice" among them
    result = evaluate(Plan(model, source, synonyms="max"))
    assert result.summary["settings"]["classes_asked"] == 4
    names, expected = ["sky", "building", "road", "edifice"], np.zeros((3, 4), np.int64)
    for record in source.records:
        found = model(record["image"], names, closed=True).labels
        expected += metrics.confusion(record["labels"], np.where(found == 3, 1, found), 3)
    assert np.abs(result.confusion - expected).sum() <= 6  # ties, as batches change the last bits
