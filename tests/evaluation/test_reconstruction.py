import numpy as np
import pytest

from segdiff_jax.evaluation import reconstruction


@pytest.fixture
def photos():
    return np.random.default_rng(0).uniform(-1, 1, (4, 6, 5, 3))


def _figures(photos, decoded):
    return reconstruction.summarize([reconstruction.compare(photos, decoded)])


def test_a_grey_copy_keeps_brightness_and_no_colour(photos):
    tints = photos - photos.mean((0, 1, 2))  # no cast: one grey is then as good as none
    found = _figures(tints, np.broadcast_to(tints.mean(-1, keepdims=True), tints.shape))
    assert found["photo_brightness_r2"] == pytest.approx(1.0)
    assert found["photo_colour_r2"] == pytest.approx(0.0)


def test_the_mean_picture_explains_nothing(photos):
    found = _figures(photos, np.broadcast_to(photos.mean((0, 1, 2)), photos.shape))
    assert found["photo_brightness_r2"] == pytest.approx(0.0)
    assert found["photo_colour_r2"] == pytest.approx(0.0)


def test_brightness_against_numpy_and_error_in_gray_values(photos):
    decoded = photos + np.random.default_rng(1).normal(0, 0.1, photos.shape)
    found = _figures(photos, decoded)
    value, back = photos.mean(-1).ravel(), decoded.mean(-1).ravel()
    expected = 1 - np.var(back - value) / np.var(value) - np.mean(back - value) ** 2 / np.var(value)
    assert found["photo_brightness_r2"] == pytest.approx(expected)
    assert found["photo_absolute_error"] == pytest.approx(np.abs(decoded - photos).mean() * 127.5)


def test_adding_up_parts_gives_the_whole(photos):
    decoded = photos * 0.9
    pieces = slice(0, 1), slice(1, None)
    parts = [reconstruction.compare(photos[piece], decoded[piece]) for piece in pieces]
    assert reconstruction.summarize(parts) == pytest.approx(_figures(photos, decoded))


def test_photos_without_colour_have_none_to_keep(photos):
    grey = np.broadcast_to(photos[..., :1], photos.shape)
    assert _figures(grey, photos)["photo_colour_r2"] is None
