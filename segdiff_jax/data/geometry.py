"""What the networks see of a photo of any size, and the way back to its own pixels.

Training (where it draws no random crop), evaluation and prediction show the same view of a photo:

    fit      photo [H, W, 3] or labels [H, W]  →  the same at `size`, the networks' resolution
    filled   the part of `size` that the photo fills, from the top left corner on
    enlarge  this part of maps, [h, w] or [h, w, C]  →  the same at (H, W)

`config.data.fit` chooses the rule. "pad" keeps the aspect ratio: the photo is as large as `size`
holds it, in the top left corner, where it lies on the grid of the latents, and padding follows on
its right or below. "stretch" gives each axis a scale of its own.

Padding of photos is mid-gray: it is 0 in the VAE's range, what the edge of an image is to a
convolution, and what random crops that leave the photo show. Colour jitter, which comes last,
changes it with the photo. Padding of labels is *ignore*.
"""

import numpy as np
from PIL import Image

GRAY = 127
# Shrinking by more than this averages whole pixels first: a sixth of the time, gray values ± 1.
_REDUCING_GAP = 3.0

Size = tuple[int, int]  # (height, width)
Box = tuple[float, float, float, float]  # (left, top, right, bottom) in pixels, fractions allowed


def scales(native: Size, size: Size, rule: str) -> tuple[float, float]:
    """Return how much larger a photo of `native` size is shown at `size`: (down, across)."""
    down, across = size[0] / native[0], size[1] / native[1]
    return (down, across) if rule == "stretch" else (min(down, across),) * 2


def filled(native: Size, size: Size, rule: str) -> Size:
    """Return the part of `size`, from its top left corner on, that the photo fills."""
    return tuple(
        min(whole, max(1, round(length * scale)))
        for whole, length, scale in zip(size, native, scales(native, size, rule), strict=True)
    )  # type: ignore[return-value]


def fit(pixels: np.ndarray, size: Size, rule: str) -> np.ndarray:
    """Fit a photo uint8 [H, W, 3] or labels uint8 or uint16 [H, W] to `size`."""
    height, width = filled(pixels.shape[:2], size, rule)
    resized = resize(pixels, (height, width))
    if (height, width) == tuple(size):
        return resized
    shown = np.full((*size, *pixels.shape[2:]), padding_of(pixels), pixels.dtype)
    shown[:height, :width] = resized
    return shown


def enlarge(maps: np.ndarray, size: Size) -> np.ndarray:
    """Resize float32 [h, w] or [h, w, C] bilinearly to `size`, with half-pixel centres."""
    if maps.ndim == 2:
        picture = Image.fromarray(np.ascontiguousarray(maps, np.float32))
        return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    resized = np.empty((*size, maps.shape[2]), np.float32)
    for channel in range(maps.shape[2]):
        resized[..., channel] = enlarge(maps[..., channel], size)
    return resized


def resize(pixels: np.ndarray, size: Size, box: Box | None = None) -> np.ndarray:
    """Resize a photo (bilinear, antialiased) or labels (nearest), or their `box`, to `size`."""
    if box is None and pixels.shape[:2] == tuple(size):
        return pixels
    nearest = pixels.ndim == 2
    method = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
    picture = Image.fromarray(pixels)
    return np.asarray(picture.resize((size[1], size[0]), method, box, _REDUCING_GAP))


def padding_of(pixels: np.ndarray) -> int:
    """Return the padding of a photo [H, W, 3] or labels [H, W]: gray, or *ignore*."""
    return np.iinfo(pixels.dtype).max if pixels.ndim == 2 else GRAY
