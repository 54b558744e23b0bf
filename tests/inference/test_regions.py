"""Masks as run lengths and polygons, read back by COCO's own API and by the even-odd rule."""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as coco_masks
from scipy import ndimage

from segdiff_jax.inference import regions

MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=9))
LONG = np.zeros((300, 400), bool)  # runs that take several letters
LONG[50:250, 100:103] = LONG[10:12, 390:] = True


def filled(rings, shape):
    """Whether a ray from each pixel's centre crosses the rings an odd number of times."""
    y, x = np.indices(shape) + 0.5
    odd = np.zeros(shape, bool)
    for ring in rings:
        for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            if y0 != y1:
                odd ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return odd


@given(MASKS)
@example(LONG)
@settings(deadline=None)
def test_a_mask_survives_run_lengths_and_polygons(mask):
    assert (coco_masks.decode(regions.rle(mask)) == mask).all()
    rings = regions.polygons(mask)
    assert (filled(rings, mask.shape) == mask).all()
    for ring in rings:
        steps = np.roll(ring, -1, axis=0) - ring
        assert ((steps == 0).sum(1) == 1).all(), "along the edges of pixels, and corners only"


def test_outer_rings_run_clockwise_and_holes_back():
    mask = np.ones((5, 6), bool)
    mask[2, 2:4] = False

    def area(ring):  # positive: clockwise where y points down
        x, y = ring.T
        return (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2

    assert sorted(area(ring) for ring in regions.polygons(mask)) == [-2.0, 30.0]
    outer = max(regions.polygons(mask), key=area)
    assert len(outer) == 4, "corners only"


@given(MASKS)
@settings(deadline=None)
def test_parts_with_their_holes_are_one_ring_each(mask):
    rings = regions.parts(mask, 0.0)
    assert len(rings) == ndimage.label(mask)[1]
    each = [filled([ring], mask.shape) for ring in rings]
    np.testing.assert_array_equal(np.sum([*each, np.zeros(mask.shape)], 0), mask)


@given(seed=st.integers(0, 20), tolerance=st.sampled_from([0.5, 1.0, 3.0]))
@settings(deadline=None, max_examples=20)
def test_simplified_rings_stay_near(seed, tolerance):
    rng = np.random.default_rng(seed)
    mask = ndimage.gaussian_filter(rng.normal(size=(40, 50)), 4) > 0
    for ring in regions.polygons(mask):
        fewer = regions.simplified(ring, tolerance)
        assert 3 <= len(fewer) <= len(ring)
        if len(fewer) == len(ring):
            continue
        starts, ends = fewer.astype(float), np.roll(fewer, -1, axis=0).astype(float)
        for point in ring:
            sides = ends - starts
            along = ((point - starts) * sides).sum(1) / (sides**2).sum(1)
            nearest = starts + along.clip(0, 1)[:, None] * sides
            assert np.hypot(*(nearest - point).T).min() <= tolerance + 1e-9
