import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from segdiff_jax.config import DataConfig
from segdiff_jax.data.sources import tfds as tfds_source
from segdiff_jax.data.sources.source import open_source
from segdiff_jax.errors import UserError
from segdiff_jax.text import vocabulary

SEMANTIC = np.array([[0, 1, 2, 13], [148, 149, 150, 0]], np.uint8)
CATEGORY = np.array([[0, 1, 4, 4], [9, 100, 100, 0]], np.uint8)
INSTANCE = np.array([[0, 1, 2, 3], [4, 5, 6, 0]], np.uint8)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """`scene_parse150` in TFDS's own format; reading goes through the builder TFDS ships."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("files")
    Image.fromarray(np.full((2, 4, 3), 90, np.uint8)).save(folder / "photo.jpg")
    Image.fromarray(SEMANTIC).save(folder / "semantic.png")
    instances = np.dstack([CATEGORY, INSTANCE, np.zeros_like(CATEGORY)])
    Image.fromarray(instances).save(folder / "instances.png")
    image = tfds.features.Image

    class SceneParse150(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": image(encoding_format="jpeg"),
                "annotation": image(encoding_format="png"),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(3), "test": self._generate_examples(1)}

        def _generate_examples(self, count):
            # The default shuffle would hide which record is which: one kind per split.
            annotation = folder / ("instances.png" if count == 3 else "semantic.png")
            for i in range(count):
                yield i, {"image": str(folder / "photo.jpg"), "annotation": str(annotation)}

    data_dir = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    SceneParse150(data_dir=str(data_dir), file_format="array_record").download_and_prepare()
    return data_dir


def config(root):
    return DataConfig(source="tfds", root=str(root))


def test_scene_parsing_ids_are_shifted_as_in_ade20k(root):
    source = open_source(config(root), "val", 0)
    assert len(source) == 1 and source.vocabulary.name == "ade20k_150" and source.novel == ()
    record = source[0]
    assert record["image"].shape == (2, 4, 3) and record["image"].dtype == np.uint8
    assert record["labels"].tolist() == [[255, 0, 1, 12], [147, 148, 149, 255]]
    assert record["labels"].dtype == np.uint8
    assert "tensorflow" not in sys.modules


def test_instance_categories_become_classes_of_the_same_name(root):
    source = open_source(config(root), "train", 0)
    assert len(source) == 3
    names = (*source.vocabulary.names, *["?"] * 105, "-")
    seen = [[names[i] for i in row] for row in source[2]["labels"]]
    assert seen == [["-", "bed", "person", "person"], ["car", "flag", "flag", "-"]]


def test_instance_lookup_names():
    """Spot checks over the published list of the 100 categories."""
    lookup, names = tfds_source.instance_lookup(), vocabulary.load("ade20k_150").names
    published = {1: "bed", 6: "table", 19: "lamp", 38: "toilet", 56: "streetlight", 66: "ship"}
    published |= {75: "oven", 83: "bicycle", 90: "traffic light", 99: "clock", 100: "flag"}
    assert {k: names[lookup[k]] for k in published} == published
    assert len(set(lookup[1:101].tolist())) == 100 and (lookup[101:255] < 0).all()


def test_source_can_be_sent_to_a_worker(root):
    source = open_source(config(root), "train", 0)
    copy = pickle.loads(pickle.dumps(source))
    assert (copy[1]["labels"] == source[1]["labels"]).all() and copy[1]["name"] == "train_000001"


def test_missing_data_is_named(root, tmp_path):
    with pytest.raises(UserError, match="nowhere.*no such folder"):
        open_source(config(tmp_path / "nowhere"), "train", 0)
    with pytest.raises(UserError, match="array_record") as caught:
        open_source(config(tmp_path), "train", 0)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no split 'extra'"):
        open_source(config(root), "extra", 0)
