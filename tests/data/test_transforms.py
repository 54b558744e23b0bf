import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from segdiff_jax.config import AugmentConfig, DataConfig
from segdiff_jax.data import transforms


def augment(image, labels, rng, config, size, fit="pad"):
    data = DataConfig(augment=config, image_size=size, fit=fit)
    return transforms.augment(image, labels, rng, data)


def coordinates(height, width):
    """An image whose pixel says where it is, with labels that say the same, coarsely."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([255 * y / height, 255 * x / width, 0 * y], -1).astype(np.uint8)
    labels = (8 * (y * 8 // height) + x * 8 // width).astype(np.uint8)
    return image, labels


def implied_labels(image):
    """What the labels should be, from the image alone, and whether a pixel is clear of borders."""
    position = image[..., :2].astype(float) / 255 * 8
    clear = (np.abs(position - np.round(position)) > 0.2).all(-1)
    cells = np.clip(position.astype(int), 0, 7)
    return 8 * cells[..., 0] + cells[..., 1], clear


@given(
    seed=st.integers(0, 10**6),
    native=st.tuples(st.integers(80, 160), st.integers(80, 160)),
    size=st.sampled_from([(48, 64), (64, 48), (64, 64)]),
    scales=st.sampled_from([(1.0, 1.0), (0.5, 0.9), (1.0, 2.0), (0.5, 2.0)]),
)
@settings(max_examples=60, deadline=None)
def test_image_and_labels_move_together(seed, native, size, scales):
    config = AugmentConfig(flip=True, min_scale=scales[0], max_scale=scales[1])
    image, labels = augment(*coordinates(*native), np.random.default_rng(seed), config, size)
    assert image.shape == (*size, 3) and labels.shape == size
    assert image.dtype == np.uint8 and labels.dtype == np.uint8
    expected, clear = implied_labels(image)
    seen = (labels != 255) & clear
    assert seen.mean() > 0.02
    assert (labels[seen] == expected[seen]).all()


def test_padding_is_ignored_and_only_appears_when_the_view_leaves_the_image():
    pair = coordinates(96, 96)
    rng = np.random.default_rng(0)
    smaller = AugmentConfig(False, 0.5, 0.5)
    _, labels = augment(*pair, rng, smaller, (64, 64))
    assert (labels == 255).mean() == 0.75
    inside = labels != 255
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    assert inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    larger = AugmentConfig(True, 1.0, 3.0)
    views = [augment(*pair, rng, larger, (64, 48), "stretch")[1] for _ in range(20)]
    assert all((labels != 255).all() for labels in views), "it covers the view"


def test_scale_crop_keeps_the_aspect_ratio():
    """A square must stay a square, whatever the target's shape."""
    image, labels = np.zeros((100, 200, 3), np.uint8), np.zeros((100, 200), np.uint8)
    labels[40:60, 90:110] = 1
    for size in ((64, 64), (32, 96)):
        config = AugmentConfig(False, 1.0, 1.2)
        areas = []
        for seed in range(60):
            rng = np.random.default_rng(seed)
            _, seen = augment(image, labels, rng, config, size, ("pad", "stretch")[seed % 2])
            rows, columns = np.flatnonzero((seen == 1).any(1)), np.flatnonzero((seen == 1).any(0))
            whole = rows.size and columns.size and rows[0] > 0 and rows[-1] < size[0] - 1
            if whole and columns[0] > 0 and columns[-1] < size[1] - 1:
                areas.append(abs(len(rows) - len(columns)))
        assert len(areas) > 10 and max(areas) <= 1


def test_flips_happen_half_the_time():
    pair = coordinates(16, 16)
    config = AugmentConfig()
    flips = [
        (augment(*pair, np.random.default_rng(seed), config, (16, 16))[1] != pair[1]).any()
        for seed in range(400)
    ]
    assert 0.42 < np.mean(flips) < 0.58


def test_colour_jitter_changes_the_image_within_bounds_and_never_the_labels():
    image, labels = coordinates(32, 32)
    image[..., 2] = 60
    config = AugmentConfig(flip=False, color_jitter=0.3)
    seen = [augment(image, labels, np.random.default_rng(i), config, (32, 32)) for i in range(50)]
    assert all((label == labels).all() for _, label in seen)
    brightness = np.array([view.mean() for view, _ in seen]) / image.mean()
    assert brightness.std() > 0.08 and brightness.min() > 0.65 and brightness.max() < 1.35
    still = AugmentConfig(flip=False, color_jitter=0.0)
    assert (augment(image, labels, np.random.default_rng(0), still, (32, 32))[0] == image).all()


def test_gray_stays_gray_under_jitter():
    gray = np.repeat(np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8, 1), 3, axis=-1)
    config = AugmentConfig(flip=False, color_jitter=0.5)
    for seed in range(10):
        view, _ = augment(gray, gray[..., 0], np.random.default_rng(seed), config, (8, 8))
        assert np.ptp(view.astype(int), axis=-1).max() <= 1
