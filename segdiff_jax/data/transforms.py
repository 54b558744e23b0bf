"""Geometry and colour of image/label pairs, in numpy and PIL. Sizes are (height, width)."""

import numpy as np
from PIL import Image

from segdiff_jax.config import AugmentConfig

IGNORE = 255
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
Box = tuple[float, float, float, float]


def resize_image(image: np.ndarray, size: tuple[int, int], box: Box | None = None) -> np.ndarray:
    """Resizes uint8 [h, w, 3], or its `box`, to `size`, bilinear and antialiased."""
    if box is None and image.shape[:2] == tuple(size):
        return image
    target = (size[1], size[0])
    return np.asarray(Image.fromarray(image).resize(target, Image.Resampling.BILINEAR, box))


def resize_labels(labels: np.ndarray, size: tuple[int, int], box: Box | None = None) -> np.ndarray:
    """Resizes uint8 [h, w], or its `box`, to `size`, nearest."""
    if box is None and labels.shape == tuple(size):
        return labels
    target = (size[1], size[0])
    return np.asarray(Image.fromarray(labels).resize(target, Image.Resampling.NEAREST, box))


def resize_pair(
    image: np.ndarray, labels: np.ndarray, size: tuple[int, int], box: Box | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Resizes uint8 [h, w, 3] (bilinear, antialiased) and [h, w] (nearest) to `size`.

    `box` = (left, top, right, bottom) in pixels of the input, fractions allowed, crops first.
    """
    return resize_image(image, size, box), resize_labels(labels, size, box)


def fit(
    image: np.ndarray, labels: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """What evaluation sees: the whole image at `size`, whatever its aspect ratio."""
    return resize_pair(image, labels, size)


def augment(
    image: np.ndarray,
    labels: np.ndarray,
    rng: np.random.Generator,
    config: AugmentConfig,
    size: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """A random training view at `size`. Where the view leaves the image, labels are 255.

    With min_scale = max_scale = 1 the view is the one of `fit`. Otherwise the image is scaled, at
    its own aspect ratio, to cover `size` times a factor from [min_scale, max_scale], and cropped.
    """
    if (config.min_scale, config.max_scale) == (1.0, 1.0):
        image, labels = resize_pair(image, labels, size)
    else:
        image, labels = _scale_crop(image, labels, rng, config, size)
    if draw_flip(rng, config):
        image, labels = image[:, ::-1], labels[:, ::-1]
    if config.color_jitter > 0:
        image = _color_jitter(image, rng, config.color_jitter)
    return np.ascontiguousarray(image), np.ascontiguousarray(labels)


def draw_flip(rng: np.random.Generator, config: AugmentConfig) -> bool:
    """Whether a view is mirrored. Without scale-crop it is the first draw from `rng`."""
    return config.flip and rng.random() < 0.5


def _scale_crop(
    image: np.ndarray,
    labels: np.ndarray,
    rng: np.random.Generator,
    config: AugmentConfig,
    size: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    native = image.shape[:2]
    cover = max(size[0] / native[0], size[1] / native[1])
    scale = cover * rng.uniform(config.min_scale, config.max_scale)
    (top, bottom), rows = _span(native[0], size[0], scale, rng)
    (left, right), columns = _span(native[1], size[1], scale, rng)
    inner = (rows.stop - rows.start, columns.stop - columns.start)
    image, labels = resize_pair(image, labels, inner, (left, top, right, bottom))
    if inner == tuple(size):
        return image, labels
    padded_image = np.full((*size, 3), 127, np.uint8)
    padded_labels = np.full(size, IGNORE, labels.dtype)
    padded_image[rows, columns], padded_labels[rows, columns] = image, labels
    return padded_image, padded_labels


def _span(
    native: int, target: int, scale: float, rng: np.random.Generator
) -> tuple[tuple[float, float], slice]:
    """Along one axis: which part of the input is seen, and where it lands in the output."""
    scaled = native * scale
    if scaled >= target:
        start = rng.uniform(0, scaled - target) / scale
        # PIL refuses boxes that leave the image by a rounding error.
        return (max(start, 0.0), min(start + target / scale, float(native))), slice(0, target)
    length = max(1, round(scaled))
    start = int(rng.integers(0, target - length + 1))
    return (0.0, float(native)), slice(start, start + length)


def _color_jitter(image: np.ndarray, rng: np.random.Generator, amount: float) -> np.ndarray:
    """Brightness, contrast and saturation in 1 ± amount, as one affine map of the colour."""
    brightness, contrast, saturation = rng.uniform(1 - amount, 1 + amount, 3).astype(np.float32)
    flat = image.reshape(-1, 3).astype(np.float32)
    gray = flat.mean(axis=0) @ _LUMA
    mix = saturation * np.eye(3, dtype=np.float32) + (1 - saturation) * _LUMA[:, None]
    flat = flat @ (brightness * contrast * mix) + brightness * (1 - contrast) * gray
    return np.clip(flat + 0.5, 0, 255).astype(np.uint8).reshape(image.shape)
