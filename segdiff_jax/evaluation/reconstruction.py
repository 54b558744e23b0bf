"""What is left of a photo behind the VAE: what its latents do not hold, no UNet can segment by."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Sums(NamedTuple):
    """Totals over the pixels of some images.

    Brightness is the mean of R, G and B; colour is what R, G and B differ from it by.
    """

    pixels: int
    absolute: float  # |error| over the three channels
    brightness: np.ndarray  # [3]: Σx, Σx², Σ error²
    colour: np.ndarray  # [3, 3]: the same of each channel


def compare(photos: np.ndarray, decoded: np.ndarray) -> Sums:
    """photos and decoded float [..., H, W, 3] in [-1, 1], of the same images."""
    photos, decoded = photos.astype(np.float64), decoded.astype(np.float64)
    error = decoded - photos
    value, value_error = photos.mean(-1), error.mean(-1)
    tint, tint_error = photos - value[..., None], error - value_error[..., None]
    brightness = np.stack([value.sum(), (value**2).sum(), (value_error**2).sum()])
    every = tuple(range(photos.ndim - 1))
    colour = np.stack([tint.sum(every), (tint**2).sum(every), (tint_error**2).sum(every)])
    return Sums(value.size, np.abs(error).sum(), brightness, colour)


def summarize(parts: Sequence[Sums]) -> dict[str, float | None]:
    """Of all images of `parts`: mean absolute error in gray values of 255, and explained shares.

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
