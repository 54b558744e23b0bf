"""The evaluator against a plain loop over images, and the ceiling against its definition."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from segdiff_jax.errors import UserError
from segdiff_jax.evaluation import metrics
from segdiff_jax.evaluation.evaluator import evaluate
from segdiff_jax.evaluation.plan import Plan
from segdiff_jax.inference.networks import Networks
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.parallel import processes
from segdiff_jax.text import vocabulary


class MemorySource:
    """Random photos of several sizes; labels with some 255."""

    def __init__(self, count=5, novel=(), sizes=((20, 28), (24, 16))):
        self.vocabulary = vocabulary.from_names(["sky", "building, edifice", "road"])
        self.novel = novel
        rng = np.random.default_rng(0)
        self.records = []
        for i in range(count):
            size = sizes[i % len(sizes)]
            labels = rng.choice(np.array([0, 1, 2, 255], np.uint8), size)
            image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            self.records.append({"image": image, "labels": labels, "name": f"photo_{i}"})

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]


@pytest.fixture(scope="module")
def model(make_segmenter):
    return make_segmenter()


def test_same_counts_as_one_image_at_a_time(model, tmp_path):
    source, predictions = MemorySource(), tmp_path / "predictions"
    sampler = dataclasses.replace(model.config.sampler, batch_size=6)  # two images a call
    calls = []
    result = evaluate(
        Plan(model, source, seed=2, sampler=sampler, examples=2, predictions=str(predictions)),
        progress=lambda *a: calls.append(a),
    )
    expected, written = np.zeros((2, 3, 4), np.int64)
    for record in source.records:
        found = model(record["image"], source.vocabulary.classes, seed=2, closed=True)
        expected += metrics.confusion(record["labels"], found.labels, 3)
        with Image.open(predictions / f"{record['name']}.png") as picture:
            written += metrics.confusion(record["labels"], np.array(picture), 3)
    np.testing.assert_array_equal(written, result.confusion)
    # Batches change the last bits of the maps: a pixel or two may be a tie.
    assert np.abs(result.confusion - expected).sum() <= 6
    assert result.confusion.sum() == sum((r["labels"] != 255).sum() for r in source.records)
    assert not result.confusion[:, 3].any(), "closed: nothing is *other*"
    assert calls == [(0, 5), (2, 5), (4, 5), (5, 5)]
    assert [e.name for e in result.examples] == ["photo_0", "photo_2"]
    example, record = result.examples[1], source.records[2]
    assert (example.image == record["image"]).all() and (example.labels == record["labels"]).all()
    assert example.prediction.shape == record["labels"].shape and example.uncertainty is None
    assert "miou_novel" not in result.summary


def test_summary(model):
    result = evaluate(Plan(model, MemorySource(novel=(1,)), limit=2, seed=7))
    summary, iou = result.summary, metrics.class_iou(result.confusion)
    assert summary["images"] == 2 and summary["settings"]["seed"] == 7
    assert summary["settings"]["steps"] == 1 and summary["settings"]["ensemble"] == 1
    assert summary["miou_novel"] == pytest.approx(iou[1])
    assert summary["miou_trained"] == pytest.approx((iou[0] + iou[2]) / 2)
    assert summary["per_class"]["building"] == pytest.approx(iou[1])


def test_limit_spreads_over_the_source(model):
    assert Plan(model, MemorySource(count=10), limit=4).images == [0, 2, 5, 7]
    assert Plan(model, MemorySource(count=3), limit=99).images == [0, 1, 2]


def test_windows_count_as_photos_that_are_segmented_in_windows(model, monkeypatch):
    source = MemorySource(3, sizes=((40, 56), (48, 32)))
    sampler = dataclasses.replace(model.config.sampler, tiles=2, ensemble=2)
    result = evaluate(Plan(model, source, seed=1, sampler=sampler, examples=1))
    expected = np.zeros((3, 4), np.int64)
    for record in source.records:
        found = model(record["image"], source.vocabulary, seed=1, closed=True, tiles=2, ensemble=2)
        expected += metrics.confusion(record["labels"], found.labels, 3)
    np.testing.assert_array_equal(result.confusion, expected)
    assert result.examples[0].uncertainty.shape == (40, 56)
    assert result.examples[0].uncertainty.max() > 0
    undefined = set(result.summary["undefined"])
    assert undefined == {"presence_auroc", "presence_mcc"}, "all are in each image"
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(UserError, match=r"config\.sampler\.tiles=2: .* one process"):
        evaluate(Plan(model, source, sampler=sampler))


@pytest.mark.parametrize("group", [1, 2, 0])
def test_ceiling_of_a_perfect_vae_is_one(make_segmenter, tiny_config, monkeypatch, group):
    model = make_segmenter(tiny_config(classes_per_pass=group))
    monkeypatch.setattr(Networks, "reconstruct", lambda self, pixels: np.asarray(pixels))
    source = MemorySource(sizes=((16, 16),))  # the networks' own size: nothing to resize
    summary = evaluate(Plan(model, source, ceiling=True)).summary
    assert summary["miou_present"] == summary["pixel_accuracy"] == 1.0
    assert summary["settings"]["ceiling"]
    assert summary["photo_absolute_error"] == 0.0
    assert summary["photo_brightness_r2"] == summary["photo_colour_r2"] == 1.0


def test_ceiling_goes_through_the_vae_and_not_the_unet(model, monkeypatch):
    monkeypatch.setattr(
        Segmenter, "unclipped_maps", lambda *a: pytest.fail("the ceiling needs no UNet")
    )
    summary = evaluate(Plan(model, MemorySource(), ceiling=True)).summary
    assert summary["miou_present"] < 0.9, "a random VAE keeps little"


@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_padding_is_not_scored(make_segmenter, tiny_config, monkeypatch, fit):
    """A VAE that spoils all but the photos: with nothing else in the figures, they stay perfect."""
    config = tiny_config()
    config.data.fit = fit
    model = make_segmenter(config)

    def spoils_padding(self, pixels):
        return np.where(pixels == np.float32(127 / 127.5 - 1), -0.5, pixels)

    monkeypatch.setattr(Networks, "reconstruct", spoils_padding)
    source = MemorySource(2, sizes=((8, 32),))
    for record in source.records:
        record["image"] = np.where(record["image"] == 127, 128, record["image"])
        record["labels"][:] = 1
    summary = evaluate(Plan(model, source, ceiling=True)).summary
    assert summary["pixel_accuracy"] == 1.0 and summary["settings"]["fit"] == fit
    assert summary["photo_absolute_error"] < 1e-4 or fit == "stretch"


def test_a_figure_without_a_number_has_a_reason(model):
    source = MemorySource(2, novel=(1,))
    for record in source.records:
        record["labels"] = np.where(record["labels"] == 1, 255, record["labels"])
    summary = evaluate(Plan(model, source)).summary
    assert summary["miou_novel"] is summary["miou_harmonic"] is None
    assert summary["undefined"]["miou_novel"] == "no class of these is in the labels"
    assert set(summary["undefined"]) >= {"miou_novel", "miou_harmonic"}


def test_labels_of_16_bits_come_back_from_the_ceiling(make_segmenter, monkeypatch):
    model = make_segmenter()
    monkeypatch.setattr(Networks, "reconstruct", lambda self, pixels: np.asarray(pixels))
    source = MemorySource(2, sizes=((16, 16),))
    source.vocabulary = vocabulary.from_names([f"class {i}" for i in range(300)])
    for record in source.records:
        ids = np.random.default_rng(1).choice([0, 254, 255, 299, 65535], (16, 16))
        record["labels"] = ids.astype(np.uint16)
    result = evaluate(Plan(model, source, ceiling=True))
    assert result.summary["pixel_accuracy"] == 1.0
    assert np.flatnonzero(result.confusion.sum(1)).tolist() == [0, 254, 255, 299]


def test_what_is_asked_beyond_the_classes_is_the_last_of_them(model):
    """As VOC with background is scored: "road" and "tree" both mean background."""
    source = MemorySource(3)
    source.asked = vocabulary.from_names(["sky", "building, edifice", "road", "tree"])
    result = evaluate(Plan(model, source, seed=2, examples=3))
    expected = np.zeros((3, 4), np.int64)
    for record, example in zip(source.records, result.examples, strict=True):
        assert example.prediction.max() <= 2
        found = model(record["image"], source.asked.classes, seed=2, closed=True)
        expected += metrics.confusion(record["labels"], np.minimum(found.labels, 2), 3)
    assert np.abs(result.confusion - expected).sum() <= 6
    assert result.summary["settings"]["classes_asked"] == 4
    assert list(result.summary["per_class"]) == ["sky", "building", "road"]
