import pickle
import time

import numpy as np
import pytest

from segdiff_jax.config import DataConfig, ScenesConfig
from segdiff_jax.data.sources import scenes
from segdiff_jax.data.sources.source import open_source

CONFIG = DataConfig(source="scenes", image_size=(64, 64), scenes=ScenesConfig(400, 200, 4))


@pytest.fixture(scope="module")
def train():
    return open_source(CONFIG, "train", seed=0)


@pytest.fixture(scope="module")
def validation():
    return open_source(CONFIG, "val", seed=0)


def occurring(source):
    counts = np.zeros(256, int)
    for i in range(len(source)):
        counts[np.unique(source[i]["labels"])] += 1
    return counts


def test_a_scene_depends_on_seed_split_and_index_only(train, validation):
    again = pickle.loads(pickle.dumps(train))
    for i in (0, 7, 399):
        assert (train[i]["image"] == again[i]["image"]).all()
        assert (train[i]["labels"] == again[i]["labels"]).all()
        assert train[i]["name"] == f"train_{i:06d}"
    others = [train[1], validation[0], open_source(CONFIG, "train", seed=1)[0]]
    assert all((train[0]["image"] != other["image"]).any() for other in others)
    with pytest.raises(IndexError):
        train[400]


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (128, 96)])
def test_scenes_have_the_asked_size(size):
    config = DataConfig(source="scenes", image_size=size, scenes=ScenesConfig(4, 4, 3))
    record = open_source(config, "train", 0)[3]
    assert record["image"].shape == (*size, 3) and record["image"].dtype == np.uint8
    assert record["labels"].shape == size and record["labels"].dtype == np.uint8


def test_training_never_shows_a_novel_class_and_validation_shows_every_class(train, validation):
    assert len(train.vocabulary) == 25 and len(train.novel) == 6
    in_training, in_validation = occurring(train), occurring(validation)
    trained = np.setdiff1d(range(25), train.novel)
    assert (in_training[trained] >= 10).all() and in_training.sum() == in_training[trained].sum()
    assert (in_validation[:25] >= 3).all(), "an IoU needs a few examples of every class"
    assert not in_validation[25:].any()


def test_every_pair_of_words_of_a_novel_phrase_is_trained_on():
    names = scenes.vocabulary().names
    novel = {names[i] for i in scenes.novel_classes()}
    trained = [name.split() for name in names[1:] if name not in novel]
    for phrase in novel:
        words = phrase.split()
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert sum(t[a] == words[a] and t[b] == words[b] for t in trained) >= 1, phrase


def test_class_ids_and_phrases_agree():
    names = scenes.vocabulary().names
    assert names[scenes.BACKGROUND] == "background"
    for class_id in range(1, len(names)):
        texture, color, shape = scenes.class_parts(class_id)
        phrase = (scenes.TEXTURES[texture], list(scenes.COLORS)[color], scenes.SHAPES[shape])
        assert names[class_id] == " ".join(phrase)


def test_pixels_show_what_the_phrase_says():
    """Colour from the hue of the vivid pixels, texture from the pale ones, per shape."""
    order = {"red": (0, 1, 2), "green": (1, 0, 2), "blue": (2, 0, 1)}
    for class_id in range(1, 25):
        texture, color, _ = scenes.class_parts(class_id)
        image, labels = scenes.render(np.random.default_rng(class_id), [class_id], (64, 64))
        inside = image[labels == class_id].astype(float)  # [n, 3]
        assert 200 < len(inside) < 1300
        saturation = np.ptp(inside, axis=-1) / inside.max(-1)
        vivid = inside[saturation >= np.quantile(saturation, 0.6)].mean(0)
        name = list(scenes.COLORS)[color]
        if name == "yellow":
            assert min(vivid[:2]) > 1.6 * vivid[2]
        else:
            assert vivid[order[name][0]] > 1.4 * max(vivid[list(order[name][1:])])
        pale = np.quantile(saturation, 0.2) / np.quantile(saturation, 0.8)
        assert pale > 0.65 if scenes.TEXTURES[texture] == "plain" else pale < 0.5


def test_background_is_muted_and_mostly_visible(train):
    scenes = [train[i] for i in range(40)]
    assert 0.35 < np.mean([scene["labels"] == 0 for scene in scenes]) < 0.85
    pixels = [scene["image"][scene["labels"] == 0].astype(int) for scene in scenes]
    assert np.mean([np.ptp(muted, axis=-1).mean() for muted in pixels]) < 60


def test_generation_is_fast(train):
    train[0]
    start = time.process_time()
    for i in range(100):
        train[i]
    assert (time.process_time() - start) / 100 < 0.006, "1 ms measured; a loaded machine gets slack"
