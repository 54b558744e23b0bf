"""Annealed multi-resolution noise with static shapes.

The reference process (J. Whitaker, 2023; used by Marigold, arXiv 2312.02145) for one sample:
eps ~ N(0, I) at (h, w); for i = 0, 1, ...: r ~ U(2, 4), (h, w) <- max(1, floor((h, w) / r^i)),
eps += s^i * bilinear_up(N(0, I) at the new size); stop after a size with a 1 in it; divide eps by
its standard deviation. Level 0 divides by r^0 = 1, so it is a second full-size Gaussian.

The sizes are random, so it cannot be traced as written. Here each level is drawn on the largest
grid that it can have (r = 2 throughout) and only its traced top-left part is used: bilinear
upsampling is two matmuls whose weights are zero beyond the traced size.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from segdiff_jax.shapes import Latents, NoiseGrid, Timesteps

MIN_RATIO, MAX_RATIO = 2.0, 4.0
STRENGTH = 0.9  # of the reference


def gaussian(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw N(0, I), float32 of `shape`: the values of `jax.random.normal`, bit for bit.

    They are drawn in one row, because XLA needs 0.2 s for that on a CPU, and 3 s to 4 s to compile
    the same draw with four axes.
    """
    return jax.random.normal(key, (math.prod(shape),)).reshape(shape)


def level_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Return the largest (h_i, w_i) of each level, ending at the first that must contain a 1."""
    sizes = []
    level = 0
    while True:
        divisor = int(MIN_RATIO) ** level
        height, width = max(1, height // divisor), max(1, width // divisor)
        sizes.append((height, width))
        if height == 1 or width == 1:
            return sizes
        level += 1


def bilinear_matrix(out_size: int, in_size: ArrayLike, max_in: int) -> jax.Array:
    """Return weights [out_size, max_in] that upsample the first `in_size` (traced) samples.

    Half-pixel centres and clamped edges, as `torch.nn.Upsample(mode="bilinear")`.
    """
    in_size = jnp.asarray(in_size, jnp.float32)
    centres = (jnp.arange(out_size) + 0.5) * (in_size / out_size) - 0.5
    centres = jnp.clip(centres, 0.0, in_size - 1.0)  # [out_size]
    distance = jnp.abs(centres[:, None] - jnp.arange(max_in))
    return jnp.maximum(0.0, 1.0 - distance)  # [out_size, max_in]


def _upsample(
    grid: jax.Array, size: tuple[jax.Array, jax.Array], shape: tuple[int, ...]
) -> jax.Array:
    """Upsample the top-left `size` of grid [max_h, max_w, c] to [h, w, c]."""
    rows = bilinear_matrix(shape[0], size[0], grid.shape[0])
    columns = bilinear_matrix(shape[1], size[1], grid.shape[1])
    return jnp.einsum("hi,ijc,wj->hwc", rows, grid, columns, precision=jax.lax.Precision.HIGHEST)


def pyramid(
    base: NoiseGrid,
    grids: list[jax.Array],
    ratios: jax.Array,
    strength: ArrayLike,
) -> NoiseGrid:
    """Combine given Gaussian draws and ratios into noise: the deterministic part of the process.

    base [h, w, c]; grids, one [max_h, max_w, c] per entry of `level_sizes(h, w)`; ratios [levels]
    in [2, 4); strength in [0, 1]. Returns [h, w, c] of unit sample variance.
    """
    height = jnp.asarray(base.shape[0], jnp.float32)
    width = jnp.asarray(base.shape[1], jnp.float32)
    active = jnp.asarray(True)
    total = base
    for i, grid in enumerate(grids):
        divisor = ratios[i] ** i
        height = jnp.maximum(1.0, jnp.floor(height / divisor))
        width = jnp.maximum(1.0, jnp.floor(width / divisor))
        # Level 0 has the full size whatever r is. `i` is static, so s**0 is 1 even for s = 0.
        upsampled = grid if i == 0 else _upsample(grid, (height, width), base.shape)
        total = total + jnp.where(active, jnp.asarray(strength) ** i, 0.0) * upsampled
        active = active & (height > 1) & (width > 1)
    return total / jnp.std(total, ddof=1)


def multires_noise(key: jax.Array, shape: tuple[int, int, int], strength: ArrayLike) -> NoiseGrid:
    """Draw one sample of multi-resolution noise, [h, w, c] = `shape`, of unit sample variance.

    `strength` may be traced. At 0 the sum is base + level 0, divided by its standard deviation:
    plain Gaussian noise, as in the reference, which normalises there too.
    """
    height, width, channels = shape
    sizes = level_sizes(height, width)
    base_key, ratio_key, grid_key = jax.random.split(key, 3)
    grids = [
        gaussian(jax.random.fold_in(grid_key, i), (h, w, channels))
        for i, (h, w) in enumerate(sizes)
    ]
    ratios = jax.random.uniform(ratio_key, (len(sizes),), minval=MIN_RATIO, maxval=MAX_RATIO)
    return pyramid(gaussian(base_key, shape), grids, ratios, strength)


def training_noise(
    key: jax.Array,
    shape: tuple[int, int, int, int],
    timesteps: Timesteps,
    num_train_timesteps: int,
    kind: str = "annealed",
    strength: ArrayLike = STRENGTH,
) -> Latents:
    """Draw a batch of training noise [B, h, w, c] = `shape`; every sample has its own scales.

    timesteps int [B]. kind "annealed": sample b has strength * t_b / T, so noise is plain Gaussian
    at t = 0; "multires": constant strength; "gaussian": N(0, I) without normalisation.
    """
    if kind == "gaussian":
        return gaussian(key, shape)
    strengths = jnp.full(shape[:1], strength)
    if kind == "annealed":
        strengths = strengths * timesteps / num_train_timesteps
    keys = jax.random.split(key, shape[0])
    return jax.vmap(lambda k, s: multires_noise(k, shape[1:], s))(keys, strengths)
