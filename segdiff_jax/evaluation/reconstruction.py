"""What is left of photos and masks behind the VAE: no UNet can do better than its latents hold."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from segdiff_jax import codec
from segdiff_jax.data import geometry
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.parallel.placement import equal_parts


class Sums(NamedTuple):
    """Totals over the pixels of some images.

    Brightness is the mean of R, G and B; colour is what R, G and B differ from it by.
    """

    pixels: int
    absolute: float  # |error| over the three channels
    brightness: np.ndarray  # [3]: Σx, Σx², Σ error²
    colour: np.ndarray  # [3, 3]: the same of each channel


def compare(photos: np.ndarray, decoded: np.ndarray) -> Sums:
    """Total up photos and what is decoded of them, float [..., H, W, 3] in [-1, 1]."""
    photos, decoded = photos.astype(np.float64), decoded.astype(np.float64)
    error = decoded - photos
    value, value_error = photos.mean(-1), error.mean(-1)
    tint, tint_error = photos - value[..., None], error - value_error[..., None]
    brightness = np.stack([value.sum(), (value**2).sum(), (value_error**2).sum()])
    every = tuple(range(photos.ndim - 1))
    colour = np.stack([tint.sum(every), (tint**2).sum(every), (tint_error**2).sum(every)])
    return Sums(value.size, np.abs(error).sum(), brightness, colour)


def summarize(parts: Sequence[Sums]) -> dict[str, float | None]:
    """Return the mean absolute error of all images, in gray values of 255, and explained shares.

    A share R² = 1 - Σ error² / Σ (x - mean)²: 1 is perfect, 0 is no better than one gray for all.
    None where the photos have nothing to explain.
    """
    totals: Any = [sum(column) for column in zip(*parts, strict=True)]
    sums = Sums(*totals)
    return {
        "photo_absolute_error": 127.5 * sums.absolute / (3 * sums.pixels),
        "photo_brightness_r2": _explained(sums.brightness, sums.pixels),
        "photo_colour_r2": _explained(sums.colour, sums.pixels),
    }


def _explained(moments: np.ndarray, count: int) -> float | None:
    total, squares, error = moments
    variance = float(np.sum(squares - total**2 / count))
    # Sums of squares leave a rest where there is no variance.
    return None if variance < 1e-9 * count else 1.0 - float(np.sum(error)) / variance


def photos(segmenter: Segmenter, images: np.ndarray, natives: np.ndarray) -> list[Sums]:
    """Compare the first of `images` uint8 [I, h, w, 3] with themselves through the VAE.

    natives: int [n, 2], the sizes of the photos they are made from; padding does not count.
    """
    pixels, data = np.asarray(codec.to_pixels(images)), segmenter.config.data
    decoded = segmenter.networks.reconstruct(pixels)
    sums = []
    for native, before, after in zip(natives.tolist(), pixels, decoded, strict=False):
        height, width = geometry.filled((native[0], native[1]), data.image_size, data.fit)
        shown = slice(height), slice(width)
        sums.append(compare(before[shown], after[shown]))
    return sums


def masks(segmenter: Segmenter, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Paint labels [I, h, w] and take them through the VAE: unclipped maps [I, P, h, w]."""
    networks = segmenter.networks
    size = codec.group_size(num_classes, segmenter.config.codec.classes_per_pass)
    groups = codec.groups(num_classes, size)
    painted = np.stack(
        [np.asarray(codec.encode(jnp.asarray(labels), jnp.asarray(ids))) for ids in groups], axis=1
    )
    jobs = painted.reshape(-1, *labels.shape[1:], 1)  # [I * P, h, w, 1]
    each = equal_parts(jobs, networks.mesh.size)  # in three channels, all would be gigabytes
    pixels = (np.broadcast_to(part, (*part.shape[:3], 3)) for part in each)
    back = [np.asarray(codec.to_gray(jnp.asarray(networks.reconstruct(part)))) for part in pixels]
    return np.concatenate(back)[: len(jobs)].reshape(painted.shape)
