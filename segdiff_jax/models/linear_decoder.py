"""Gray maps from mask latents by a linear map: what a VAE does to masks is nearly linear.

Every position's f × f pixels are a linear function of the 3 × 3 latents around it. The map is
fitted in closed form, in seconds, and costs next to nothing where the VAE's decoder costs more
than a step of the UNet. It knows masks alone: photos it cannot decode.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from segdiff_jax.shapes import GrayMap, Latents

_EXACT = jax.lax.Precision.HIGHEST  # sums over a hundred thousand positions


class LinearDecoder(NamedTuple):
    """A convolution whose f² channels are the pixels of a block, row by row."""

    kernel: jax.Array  # [3, 3, c, f²]
    bias: jax.Array  # [f²]


def fit(batches: Iterable[tuple[Latents, GrayMap]], ridge: float = 1e-4) -> LinearDecoder:
    """Fit a linear map from latents to masks by ridge regression (normal equations).

    Batches are summed up one by one, so memory does not grow with their number.

    Args:
      batches: (latents [B, h, w, c], gray masks [B, h·f, w·f] in [-1, 1]) of any size B.
      ridge: added to the diagonal of the mean of xᵀx; latents are about 1.

    Raises `ValueError` if there is no batch.
    """
    total = None
    for latents, masks in batches:
        found = _moments(latents, masks)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        channels, pixels = latents.shape[-1], total[1].shape[-1]
    if total is None:
        raise ValueError("no masks to fit a linear decoder to")
    gram, cross, count = total
    # The last input is the constant 1, whose weight (the bias) is not shrunk.
    penalty = ridge * jnp.diag(jnp.ones(len(gram)).at[-1].set(0.0))
    weights = jnp.linalg.solve(gram / count + penalty, cross / count)  # [9c + 1, f²]
    return LinearDecoder(weights[:-1].reshape(3, 3, channels, pixels), weights[-1])


def decode(decoder: LinearDecoder, latents: Latents) -> GrayMap:
    """Decode latents [B, h, w, c] to gray maps float32 [B, h·f, w·f], nominally in [-1, 1]."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    blocks = jax.lax.conv_general_dilated(
        _padded(latents), decoder.kernel, (1, 1), "VALID", dimension_numbers=dimensions
    )
    batch, height, width, pixels = blocks.shape
    size = math.isqrt(pixels)
    blocks = (blocks + decoder.bias).reshape(batch, height, width, size, size)
    return blocks.swapaxes(2, 3).reshape(batch, height * size, width * size)


@jax.jit
def _moments(latents: Latents, masks: GrayMap) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sum xᵀx [9c + 1, 9c + 1] and xᵀy [9c + 1, f²] over positions, and count the positions."""
    batch, height, width, _ = latents.shape
    padded = _padded(latents)
    around = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    x = jnp.concatenate([*around, jnp.ones((batch, height, width, 1))], axis=-1)
    x = x.reshape(batch * height * width, -1)
    size = masks.shape[1] // height
    y = masks.astype(jnp.float32).reshape(batch, height, size, width, size).swapaxes(2, 3)
    y = y.reshape(len(x), size * size)
    product = lambda a, b: jnp.matmul(a.T, b, precision=_EXACT)  # noqa: E731
    return product(x, x), product(x, y), jnp.float32(len(x))


def _padded(latents: Latents) -> jax.Array:
    """Pad by one position on every side, repeating the edge: a mask goes on beyond the border."""
    return jnp.pad(latents.astype(jnp.float32), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
