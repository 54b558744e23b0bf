"""Rare and easily confused classes are asked for more often, by the numbers that say so."""

import numpy as np
import pytest

from segdiff_jax.config import CodecConfig, Config, DataConfig, ScenesConfig, TrainConfig
from segdiff_jax.data import pipeline
from segdiff_jax.data.preference import Preference, likeness, rarity
from segdiff_jax.data.sources.source import open_source

# Five classes as directions: 0 and 1 nearly alike, 3 and 4 too.
POOLED = np.array([[1, 0.1, 0], [1, -0.1, 0], [0, 0, 1], [-1, 0.1, -0.5], [-1, -0.1, -0.5]]) + 7.0
TRAINED = np.arange(5)


def _shares(labels, preference, negatives, count=1, draws=4000):
    rng = np.random.default_rng(0)
    drawn = [
        pipeline.draw_classes(np.array(labels), TRAINED, count, negatives, rng, preference)
        for _ in range(draws)
    ]
    found = np.concatenate(drawn)
    return np.bincount(found[found >= 0], minlength=5) / draws


def test_what_reads_alike_is_alike_whatever_all_texts_share():
    found = likeness(POOLED)
    np.testing.assert_allclose(np.diag(found), 1.0)
    assert (found[0].argsort()[::-1][:2] == [0, 1]).all() and found[0, 1] > 0.9
    assert (found[4].argsort()[::-1][:2] == [4, 3]).all() and found[0, 3] < 0


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_share_of_hard_negatives_resembles_what_is_present(share):
    preference = Preference(likeness=likeness(POOLED), hard=share)
    found = _shares([0], preference, negatives=1.0)
    assert found[0] == 0, "it is present"
    assert found[1] == pytest.approx(share + (1 - share) / 4, abs=0.03)
    np.testing.assert_allclose(found[2:], (1 - share) / 4, atol=0.03)


def test_one_of_several_present_classes_is_enough_to_be_alike():
    found = _shares([0, 4], Preference(None, likeness(POOLED), 1.0), negatives=1.0)
    assert found[1] + found[3] > 0.95 and min(found[1], found[3]) > 0.3


def test_absent_classes_are_different_ones_and_all_of_them_where_asked():
    found = _shares([0], Preference(None, likeness(POOLED), 0.7), negatives=1.0, count=4)
    np.testing.assert_array_equal(found[1:], 1.0)


def test_without_a_present_class_all_are_equal():
    found = _shares([255], Preference(None, likeness(POOLED), 1.0), negatives=0.0)
    np.testing.assert_allclose(found, 0.2, atol=0.03)


def test_present_classes_by_inverse_frequency():
    preference = Preference(rarity=np.array([1.0, 1.0, 3.0, 1.0, 1.0]))
    found = _shares([0, 2], preference, negatives=0.0)
    np.testing.assert_allclose(found, [0.25, 0, 0.75, 0, 0], atol=0.03)


def _config():
    scenes = DataConfig(
        source="scenes", image_size=(16, 16), scenes=ScenesConfig(train_examples=40)
    )
    codec = CodecConfig(classes_per_pass=2, negatives=0.5)
    return Config(data=scenes, codec=codec, train=TrainConfig(batch_size=4))


def test_rarity_is_the_inverse_of_how_many_pairs_show_a_class():
    config = _config()
    source = open_source(config.data, "train", 0)
    count = len(source.vocabulary)
    shown = [np.isin(range(count), source[i]["labels"]) for i in range(len(source))]
    np.testing.assert_allclose(rarity(source, 5), 40 / np.maximum(np.sum(shown, 0), 0.5))


def test_examples_with_a_preference_are_the_same_from_wherever_one_starts():
    config = _config()
    source = open_source(config.data, "train", 0)
    pooled = np.random.default_rng(0).normal(size=(len(source.vocabulary), 6))
    preference = Preference(rarity(source, 0), likeness(pooled), 0.5)

    def ids(start, rows=None):
        batches = pipeline.train_batches(source, config, 0, start, rows, preference=preference)
        found = np.concatenate([next(batches)["class_ids"] for _ in range(2)])
        batches.close()
        return found

    whole = ids(0)
    np.testing.assert_array_equal(ids(4)[:4], whole[4:])
    np.testing.assert_array_equal(ids(0, [1, 3]), whole[[1, 3, 5, 7]])
    uniform = next(pipeline.train_batches(source, config, 0))["class_ids"]
    assert (uniform != whole[:4]).any()
