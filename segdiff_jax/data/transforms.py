"""Random training views of image/label pairs: scale, crop, mirror, colour. Sizes are (h, w)."""

import numpy as np

from segdiff_jax.config import AugmentConfig, DataConfig
from segdiff_jax.data import geometry

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def augment(
    image: np.ndarray, labels: np.ndarray, rng: np.random.Generator, data: DataConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a view, at data.image_size, of a photo and its labels. What is not photo is ignored.

    With min_scale = max_scale = 1 it is the view of `geometry.fit`. Otherwise the photo is scaled,
    at its own aspect ratio, by a factor from [min_scale, max_scale] of what fits it (by the rule
    "stretch": of what covers `size`), and cropped or padded at random.
    """
    config, size = data.augment, data.image_size
    if (config.min_scale, config.max_scale) == (1.0, 1.0):
        step = -1 if draw_flip(rng, config) else 1  # before it is padded, which is on the right
        image, labels = (geometry.fit(a[:, ::step], size, data.fit) for a in (image, labels))
    else:
        image, labels = _scale_crop(image, labels, rng, data)
        if draw_flip(rng, config):
            image, labels = image[:, ::-1], labels[:, ::-1]
    if config.color_jitter > 0:
        image = _color_jitter(image, rng, config.color_jitter)
    return np.ascontiguousarray(image), np.ascontiguousarray(labels)


def draw_flip(rng: np.random.Generator, config: AugmentConfig) -> bool:
    """Draw whether a view is mirrored. Without scale-crop it is the first draw from `rng`."""
    return config.flip and rng.random() < 0.5


def _scale_crop(
    image: np.ndarray, labels: np.ndarray, rng: np.random.Generator, data: DataConfig
) -> tuple[np.ndarray, np.ndarray]:
    config, size, native = data.augment, data.image_size, image.shape[:2]
    scale = max(geometry.scales(native, size, data.fit))
    scale *= rng.uniform(config.min_scale, config.max_scale)
    (top, bottom), rows = _span(native[0], size[0], scale, rng)
    (left, right), columns = _span(native[1], size[1], scale, rng)
    inner, box = (rows.stop - rows.start, columns.stop - columns.start), (left, top, right, bottom)

    def view(pixels: np.ndarray) -> np.ndarray:
        shown = np.full((*size, *pixels.shape[2:]), geometry.padding_of(pixels), pixels.dtype)
        shown[rows, columns] = geometry.resize(pixels, inner, box)
        return shown

    return view(image), view(labels)


def _span(
    native: int, target: int, scale: float, rng: np.random.Generator
) -> tuple[tuple[float, float], slice]:
    """Return, along one axis, which part of the input is seen, and where it lands in the output."""
    scaled = native * scale
    if scaled >= target:
        start = rng.uniform(0, scaled - target) / scale
        # PIL refuses boxes that leave the image by a rounding error.
        return (max(start, 0.0), min(start + target / scale, float(native))), slice(0, target)
    length = max(1, round(scaled))
    start = int(rng.integers(0, target - length + 1))
    return (0.0, float(native)), slice(start, start + length)


def _color_jitter(image: np.ndarray, rng: np.random.Generator, amount: float) -> np.ndarray:
    """Jitter brightness, contrast and saturation in 1 ± amount, as one affine map of the colour."""
    brightness, contrast, saturation = rng.uniform(1 - amount, 1 + amount, 3).astype(np.float32)
    flat = image.reshape(-1, 3).astype(np.float32)
    gray = flat.mean(axis=0) @ _LUMA
    mix = saturation * np.eye(3, dtype=np.float32) + (1 - saturation) * _LUMA[:, None]
    flat = flat @ (brightness * contrast * mix) + brightness * (1 - contrast) * gray
    return np.clip(flat + 0.5, 0, 255).astype(np.uint8).reshape(image.shape)
