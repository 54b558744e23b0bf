"""The model that comes with the package: small, whole, of use on scenes that it has not seen."""

from pathlib import Path

import numpy as np

import segdiff_jax
from segdiff_jax.config import DataConfig, ScenesConfig
from segdiff_jax.data.sources.source import open_source
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.weights import hub


def test_it_is_at_most_ten_megabytes():
    folder = Path(hub.local("demo"))
    assert folder.is_relative_to(Path(segdiff_jax.__file__).parent)
    assert 1e6 < sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 10e6


def test_a_folder_of_that_name_is_the_users(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert hub.local("demo") == "demo"


def test_it_finds_the_shapes_of_a_scene():
    data = DataConfig(source="scenes", image_size=(64, 64), scenes=ScenesConfig(max_shapes=2))
    source, model = open_source(data, "val", seed=0), Segmenter.load("demo")
    right = total = 0
    for index in range(3):
        pair = source[index]
        ids = np.unique(pair["labels"])
        ids = ids[ids < len(source.vocabulary)]
        found = model(pair["image"], [source.vocabulary.names[i] for i in ids], closed=True)
        right += (ids[found.labels] == pair["labels"]).sum()
        total += pair["labels"].size
    assert right / total > 0.85
