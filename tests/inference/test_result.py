"""From maps at the network's size to labels at the image's."""

import jax
import numpy as np
import pytest
from PIL import Image

from segdiff_jax.inference import result as segmentation


def test_other_is_no_class():
    scores = np.zeros((1, 2, 300), np.float32)
    scores[0, 0, 255] = 1.0
    assert segmentation.decode(scores, 0.5, closed=False).tolist() == [[255, 65535]]
    assert segmentation.decode(scores[..., :200], 0.5, closed=False).tolist() == [[255, 255]]
    assert segmentation.decode(scores, 0.5, closed=True).tolist() == [[255, 0]]


def test_bands_cover_the_image_and_bound_memory():
    for size, channels in (((2000, 3000), 150), ((5, 7), 3), ((3, 4_000_000), 150)):
        bands = segmentation._bands(size, channels)
        rows = np.concatenate([np.arange(size[0])[band] for band in bands])
        assert rows.tolist() == list(range(size[0]))
        highest = max(band.stop - band.start for band in bands)
        assert highest == 1 or highest * size[1] * channels * 4 <= 64e6


@pytest.mark.parametrize("size", [(40, 56), (9, 200), (16, 24), (5, 6)])
def test_resize_is_bilinear(size):
    maps = np.random.default_rng(1).random((16, 24, 2), np.float32)
    ours = segmentation.resize(maps, size)
    theirs = jax.image.resize(maps, (*size, 2), "linear")
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    pil = Image.fromarray(maps[..., 0]).resize(size[::-1], Image.Resampling.BILINEAR)
    np.testing.assert_allclose(ours[..., 0], np.asarray(pil), atol=1e-5)
