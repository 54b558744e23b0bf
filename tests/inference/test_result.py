"""A result in the forms that are asked of it, read back by other code."""

import dataclasses
import io
import re

import numpy as np
import pytest
from PIL import Image

from segdiff_jax.config import CodecConfig
from segdiff_jax.errors import UserError
from segdiff_jax.inference import formats, regions
from segdiff_jax.inference.result import from_maps
from segdiff_jax.text.vocabulary import ClassEntry, Vocabulary

CLASSES = Vocabulary(
    "test", (ClassEntry("sky", ("heaven",), (10, 20, 30)), ClassEntry("road"), ClassEntry("car"))
)


def result(size=(40, 56), seed=0, classes=CLASSES, spread=True, **codec):
    rng = np.random.default_rng(seed)
    gray = rng.uniform(-1.2, 1.2, (len(classes), 8, 8)).astype(np.float32)
    photo = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    noise = rng.random(gray.shape, np.float32) if spread else None
    return from_maps(gray, noise, photo, classes, CodecConfig(**codec), "pad")


def test_results_are_compared_as_objects():
    found = result()
    other = dataclasses.replace(found)
    assert found == found and found != other and len({found, other}) == 2


def test_masks_by_name_cover_what_is_labelled():
    found = result(threshold=0.6)
    masks = [found.mask(name) for name in ("heaven", "Road", "car")]
    assert (np.sum(masks, 0) == (found.labels != 255)).all() and found.labels.max() == 255
    with pytest.raises(UserError, match="'tree': is none of the classes sky, road, car"):
        found.mask("tree")
    assert list(found.rle()) == list(found.polygons()) == list(found.legend())
    for name, rle in found.rle().items():
        assert rle == regions.rle(found.mask(name))
        for ring, same in zip(
            found.polygons()[name], regions.polygons(found.mask(name)), strict=True
        ):
            np.testing.assert_array_equal(ring, same)


def test_the_best_score_wins_at_the_photos_own_size():
    """By a plain argmax over all classes at once."""
    for size, classes_per_pass in (((40, 56), 1), ((30, 30), 2), ((5, 7), 0)):
        found = result(size, spread=False, classes_per_pass=classes_per_pass, threshold=0.5)
        assert found.scores.shape == (*size, 3)
        best = found.scores.max(-1)
        expected = np.where(best < 0.5, 255, found.scores.argmax(-1))
        clear = np.sort(found.scores, -1)[..., -1] - np.sort(found.scores, -1)[..., -2] > 1e-3
        assert clear.mean() > 0.3 and (found.labels == expected)[clear].mean() > 0.999


def test_uncertainty_is_of_the_pass_that_asked_for_the_winner():
    rng = np.random.default_rng(0)
    gray = rng.uniform(-1, 1, (2, 8, 8)).astype(np.float32)  # three classes, two a pass
    spread = np.stack([np.full((8, 8), 0.1), np.full((8, 8), 0.3)]).astype(np.float32)
    photo = np.zeros((20, 20, 3), np.uint8)
    codec = CodecConfig(classes_per_pass=2, closed=True)
    found = from_maps(gray, spread, photo, CLASSES, codec, "pad")
    np.testing.assert_allclose(found.uncertainty, np.where(found.labels < 2, 0.1, 0.3), atol=1e-6)


def test_padding_is_in_no_result():
    gray = np.full((3, 8, 8), -1.0, np.float32)
    gray[0, :4], gray[1, 4:] = 1.0, 1.0  # below the photo, where there is padding
    found = from_maps(gray, None, np.zeros((20, 40, 3), np.uint8), CLASSES, CodecConfig(), "pad")
    assert (found.labels == 0).all() and found.network_scores.shape == (4, 8, 3)


def test_other_is_no_class_of_a_large_vocabulary():
    names = tuple(ClassEntry(f"class {i}") for i in range(300))
    gray = np.full((300, 2, 2), -1.0, np.float32)
    gray[255, :, 0] = 1.0
    photo = np.zeros((2, 2, 3), np.uint8)
    found = from_maps(gray, None, photo, Vocabulary("many", names), CodecConfig(), "pad")
    assert found.labels.tolist() == [[255, 65535]] * 2


def test_what_a_notebook_and_a_prompt_show():
    found = result()
    assert re.fullmatch(r"Segmentation\(40 × 56, 3 classes: (\w+ [\d.]+%(, )?)+\)", repr(found))
    shown = sum(float(share) for share in re.findall(r"([\d.]+)%", repr(found)))
    assert shown == pytest.approx(100 * (found.labels != 255).mean(), abs=0.2)
    page = found._repr_html_()
    assert page.count("background:rgb(") == len(found.legend()) and "rgb(10,20,30)" in page
    assert found.legend()["sky"] == (10, 20, 30)
    evil = result(classes=Vocabulary("evil", (ClassEntry("<b>&"),)))._repr_html_()
    assert "&lt;b&gt;" in evil and "<b>" not in evil


def test_one_class_of_a_very_long_name_is_one_line_of_a_terminal():
    found = result(classes=Vocabulary("test", (ClassEntry("a" * 10_000),)))
    assert repr(found).startswith("Segmentation(40 × 56, 1 class: aaaa") and len(repr(found)) < 100


def test_the_overlay_is_the_photo_where_nothing_is_painted():
    found = result(threshold=0.6)
    painted = np.asarray(found.overlay(alpha=1.0, legend=False))
    palette = CLASSES.palette()
    other = found.labels == 255
    assert (painted[other] == found.photo[other]).all()
    assert (painted[~other] == palette[found.labels[~other]]).all()
    with_legend = np.asarray(found.overlay(alpha=1.0))
    assert len(with_legend) > 40 and (with_legend[:40] == painted).all()


def test_files_are_read_back(tmp_path):
    found = result(threshold=0.6)
    for name in ("a.png", "b.npz", "c.json"):
        found.save(tmp_path / name)
    assert (np.asarray(Image.open(tmp_path / "a.png")) == found.labels).all()
    stored = np.load(io.BytesIO((tmp_path / "b.npz").read_bytes()))
    assert stored["classes"].tolist() == list(found.classes)
    np.testing.assert_allclose(stored["scores"], np.moveaxis(found.scores, -1, 0), atol=1e-3)
    np.testing.assert_allclose(stored["uncertainty"], found.uncertainty)
    assert (tmp_path / "c.json").read_bytes() == formats.coco_json(found)
    with pytest.raises(UserError, match=r"d.tif: end the name with one of \.png, \.npz, \.json"):
        found.save(tmp_path / "d.tif")


def test_a_rare_class_wins_by_the_adjustment_that_its_share_asks_for():
    gray = np.broadcast_to(np.float32([0.4, -0.4, -1.0])[:, None, None], (3, 8, 8))  # 0.7, 0.3, 0
    photo, classes = np.zeros((16, 16, 3), np.uint8), dataclasses.replace(CLASSES)
    shares = dataclasses.replace(CLASSES, shares=(0.8, 0.1, 0.1))

    def found(vocabulary, tau):
        settings = CodecConfig(logit_adjustment=tau)
        return from_maps(gray, None, photo, vocabulary, settings, "pad")

    assert (found(classes, 0.0).labels == 0).all()
    adjusted = found(shares, 1.0)
    assert (adjusted.labels == 1).all()
    # Odds of 7/3 times 1/4, and of 3/7 times 9.
    np.testing.assert_allclose(adjusted.scores[0, 0], [7 / 19, 27 / 34, 0], atol=1e-5)
