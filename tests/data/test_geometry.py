"""The one rule of what the networks see of a photo, and its inverse."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from segdiff_jax import config
from segdiff_jax.config import AugmentConfig, Config, DataConfig
from segdiff_jax.data import geometry, transforms
from segdiff_jax.errors import UserError

LENGTH = st.integers(1, 200)
SIZES = st.sampled_from([(64, 64), (48, 64), (64, 48), (16, 128)])
RULES = st.sampled_from(["pad", "stretch"])


@given(native=st.tuples(LENGTH, LENGTH), size=SIZES, rule=RULES)
@settings(deadline=None)
def test_a_photo_is_whole_in_its_corner_and_the_rest_is_padding(native, size, rule):
    photo = np.full((*native, 3), 200, np.uint8)
    shown, labels = (geometry.fit(a, size, rule) for a in (photo, photo[..., 0] // 200))
    height, width = geometry.filled(native, size, rule)
    assert shown.shape == (*size, 3) and labels.shape == size
    assert (shown[:height, :width] == 200).all() and (labels[:height, :width] == 1).all()
    for pixels, padding in ((shown, 127), (labels, 255)):
        outside = np.ones(size, bool)
        outside[:height, :width] = False
        assert (pixels[outside] == padding).all()
    if rule == "stretch":
        assert (height, width) == size
    else:
        assert height == size[0] or width == size[1], "as large as it fits"
        scale = min(size[0] / native[0], size[1] / native[1])
        assert abs(height - native[0] * scale) <= 1 and abs(width - native[1] * scale) <= 1


@given(native=st.tuples(st.integers(24, 200), st.integers(24, 200)), size=SIZES, rule=RULES)
@settings(deadline=None)
def test_what_fit_has_shown_is_brought_back(native, size, rule):
    """Of a smooth photo, whose values survive resizing: the same within what a pixel spans."""
    y, x = np.mgrid[0 : native[0], 0 : native[1]]
    photo = np.stack([250 * y / native[0], 250 * x / native[1], 0 * y], -1).astype(np.uint8)
    shown = geometry.fit(photo, size, rule)
    filled = geometry.filled(native, size, rule)
    part = shown[: filled[0], : filled[1]].astype(np.float32)
    back = geometry.enlarge(part, native)
    assert back.shape == photo.shape and back.dtype == np.float32
    # A pixel of the view, at whose edge a value is held, spans so much of the ramp.
    for axis in (0, 1):
        off = np.abs(back[..., axis] - photo[..., axis].astype(float))
        assert off.max() <= 250 / min(filled[axis], native[axis]) + 2
    assert np.allclose(geometry.enlarge(part[..., 1], native), back[..., 1])


@given(native=st.tuples(LENGTH, LENGTH), size=SIZES, rule=RULES, seed=st.integers(0, 9))
@settings(deadline=None)
def test_training_without_crops_sees_what_evaluation_sees(native, size, rule, seed):
    rng = np.random.default_rng(seed)
    photo = rng.integers(0, 256, (*native, 3), dtype=np.uint8)
    labels = rng.integers(0, 9, native).astype(np.uint8)
    data = DataConfig(image_size=size, fit=rule, augment=AugmentConfig(flip=False))
    shown = transforms.augment(photo, labels, rng, data)
    for seen, pixels in zip(shown, (photo, labels), strict=True):
        assert (seen == geometry.fit(pixels, size, rule)).all()
    flipped = DataConfig(image_size=size, fit=rule)
    views = [transforms.augment(photo, labels, rng, flipped)[0].tobytes() for _ in range(20)]
    turned = geometry.fit(photo[:, ::-1], size, rule).tobytes()
    assert set(views) <= {shown[0].tobytes(), turned}, "mirrored before it is padded"


def test_photos_of_the_views_aspect_ratio_are_the_same_by_both_rules():
    photo = np.random.default_rng(0).integers(0, 256, (360, 480, 3), dtype=np.uint8)
    padded, stretched = (geometry.fit(photo, (96, 128), rule) for rule in ("pad", "stretch"))
    assert (padded == stretched).all()


@pytest.mark.parametrize("size", [(40, 56), (9, 200), (16, 24), (5, 6)])
def test_maps_are_resized_bilinearly(size):
    maps = np.random.default_rng(1).random((16, 24, 2), np.float32)
    ours = geometry.enlarge(maps, size)
    theirs = jax.image.resize(maps, (*size, 2), "linear")
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("size", [(24, 32), (48, 64), (96, 128)])
def test_resizing_invents_no_label_and_averages_photos(size):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    labels = rng.choice(np.array([0, 7, 200, 255], np.uint8), (48, 64))
    assert set(np.unique(geometry.fit(labels, size, "pad"))) <= {0, 7, 200, 255}
    small = geometry.fit(image, size, "pad")
    if size == (24, 32):
        assert small.std() < 0.7 * image.std(), "shrinking must average, not pick pixels"


def test_labels_of_16_bits_are_resized_as_those_of_8():
    small = np.random.default_rng(0).integers(0, 256, (37, 50), np.uint8)
    wide = small.astype(np.uint16) * 256 + 255  # 65535 where the others have 255
    for size in ((24, 24), (80, 96)):
        expected = geometry.fit(small, size, "pad").astype(int) * 256 + 255
        assert (geometry.fit(wide, size, "pad") == expected).all()
    data = DataConfig(image_size=(24, 24), augment=AugmentConfig(min_scale=0.5, max_scale=2.0))
    photo = np.zeros((37, 50, 3), np.uint8)
    for seed in range(5):
        one, other = (
            transforms.augment(photo, labels, np.random.default_rng(seed), data)[1]
            for labels in (small, wide)
        )
        # Pillow rounds the middle between two pixels either way.
        assert np.mean(other == one.astype(int) * 256 + 255) > 0.9


def test_a_large_photo_shrinks_as_by_pillow_alone():
    photo = np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), dtype=np.uint8)
    photo = np.asarray(Image.fromarray(photo).resize((800, 600)).resize((1600, 1200)))
    exact = Image.fromarray(photo).resize((64, 48), Image.Resampling.BILINEAR)
    off = np.abs(geometry.fit(photo, (48, 64), "pad") - np.asarray(exact).astype(int))
    assert off.max() <= 3 and off.mean() < 0.7


def test_a_config_remembers_its_rule_and_one_without_it_is_of_the_time_of_stretching():
    stored = config.stored(Config())
    assert stored["data"]["fit"] == "pad" and config.from_dict(stored).data.fit == "pad"
    del stored["data"]["fit"]
    assert config.from_dict(stored).data.fit == "stretch"
    with pytest.raises(UserError, match="config.data.fit='crop'"):
        config.validate(Config(data=DataConfig(source="scenes", fit="crop")))
