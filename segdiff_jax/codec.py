"""Labels -> gray image -> ranks; which class has which gray level in the context; pixels.

K classes are cut into groups of G = `classes_per_pass`; one network pass paints one group. In a
pass, gray level -1 is "none of these" and class j = 1 ... G of the group is at -1 + 2j/G.
G = 1 is per-class prompting, G = K is the paper's one gray image.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from segdiff_jax.errors import UserError
from segdiff_jax.shapes import (
    Array,
    ClassIds,
    GrayMap,
    GroupIds,
    Labels,
    Levels,
    PixelMask,
    Pixels,
)

IGNORE = 255  # in labels of 8 bits: not annotated; in predictions: *other*
IGNORE_16 = 65535  # the same in labels of 16 bits, where 255 is a class
PAD = -1  # in class_ids: an empty slot of the group
LEAST_SHARE = 1e-4  # of the labelled pixels: rarer classes are adjusted as much as this one
MAX_GROUP = 255  # more gray levels than 8 bits hold cannot be told apart


def ignore_label(num_classes: int) -> int:
    """What *not annotated* and *other* are among K classes: 255, or 65535 where 255 is a class."""
    return IGNORE if num_classes <= IGNORE else IGNORE_16


def label_type(num_classes: int) -> type[np.unsignedinteger]:
    """The type of the labels of K classes; its largest value is their `ignore_label`."""
    return np.uint8 if num_classes <= IGNORE else np.uint16


def _ignored_in(labels: Labels) -> int:
    return IGNORE_16 if labels.dtype == np.uint16 else IGNORE


def group_size(num_classes: int, classes_per_pass: int) -> int:
    """G for a config value, where 0 means all K classes. Raises `UserError` beyond 255."""
    size = classes_per_pass or num_classes
    if size > MAX_GROUP:
        raise UserError(
            f"config.codec.classes_per_pass={classes_per_pass}: {size} classes do not fit into one "
            f"gray image, {MAX_GROUP} do: set config.codec.classes_per_pass to 1 ... {MAX_GROUP}"
        )
    return size


def num_groups(num_classes: int, size: int) -> int:
    """Passes that K classes need: ceil(K / G)."""
    return -(-num_classes // size)


def groups(num_classes: int, size: int) -> np.ndarray:
    """The class ids of every pass in order, int32 [ceil(K / G), G], padded with -1."""
    ids = np.full(num_groups(num_classes, size) * size, PAD, np.int32)
    ids[:num_classes] = np.arange(num_classes)
    return ids.reshape(-1, size)


def levels(size: int) -> Levels:
    """The gray levels of classes 1 ... G, float32 [G] in (-1, 1]."""
    return jnp.asarray(_levels(size), jnp.float32)


def _levels(size: int) -> np.ndarray:
    return -1.0 + 2.0 * np.arange(1, size + 1) / size


def encode(labels: Labels, class_ids: ClassIds) -> GrayMap:
    """Paints a group: labels int [..., H, W] -> gray float32 [..., H, W] in [-1, 1].

    class_ids int [G] in level order; -1 marks an empty slot. Other classes and *ignore*, 65535 in
    uint16 and else 255, become -1 (`valid_mask` says where the latter is).
    """
    ignored = _ignored_in(labels)
    labels = labels.astype(jnp.int32)[..., None]  # unsigned on disk; -1 must not wrap around
    match = (labels == class_ids) & (class_ids != PAD) & (labels != ignored)
    return jnp.max(jnp.where(match, levels(class_ids.shape[0]), -1.0), axis=-1)


def to_pixels(image: jax.Array | np.ndarray) -> jax.Array:
    """uint8 [0, 255] → float32 [-1, 1], the VAE's range."""
    return jnp.asarray(image, jnp.float32) / 127.5 - 1.0


def mask_images(labels: Labels, class_ids: GroupIds) -> Pixels:
    """labels [B, H, W], class_ids [B, G] → the gray mask as three equal channels [B, H, W, 3]."""
    gray = jax.vmap(encode)(labels, class_ids)
    return jnp.broadcast_to(gray[..., None], (*gray.shape, 3))


def to_gray(pixels: Any) -> jax.Array:
    """Decoded [..., H, W, 3] → gray maps [..., H, W], beyond [-1, 1] where the decoder is."""
    return pixels.mean(-1)


def valid_mask(labels: Labels) -> PixelMask:
    """Where the annotation says something: bool, the shape of `labels`."""
    return labels != _ignored_in(labels)


def latent_valid(labels: Labels, factor: int) -> jax.Array:
    """Latent pixels none of whose pixels is *ignore*: [..., H, W] -> bool [..., H/f, W/f].

    The max-pool of the ignore mask. Raises `ValueError` if `factor` does not divide H and W.
    """
    return jnp.all(_blocks(valid_mask(labels), factor), axis=(-3, -1))


def latent_shown(labels: Labels, class_ids: ClassIds, factor: int) -> jax.Array:
    """Latent pixels with some pixel of the group: [..., H, W], [G] -> bool [..., H/f, W/f].

    Raises `ValueError` if `factor` does not divide H and W.
    """
    return jnp.any(_blocks(encode(labels, class_ids) > -1.0, factor), axis=(-3, -1))


def _blocks(pixels: PixelMask, factor: int) -> Array:
    """[..., H, W] -> [..., H/f, f, W/f, f]"""
    *lead, height, width = pixels.shape
    if height % factor or width % factor:
        raise ValueError(f"{height}x{width} labels do not divide by {factor}")
    return pixels.reshape(*lead, height // factor, factor, width // factor, factor)


def ranks(gray: np.ndarray, size: int) -> np.ndarray:
    """1 - |m - l_j| / (2/G): gray [..., H, W] -> [..., H, W, G], by which classes are ordered.

    Of a pass the nearest level wins. Ranks rise on beyond the top level, so that of several passes
    the brighter map wins; for G = 1 they are (m + 1) / 2 throughout. Cut to [0, 1] they are scores.
    """
    above = gray[..., None] - _levels(size).astype(np.float32)
    top = np.arange(size) == size - 1
    return 1.0 + np.where(top & (above > 0), above, -np.abs(above)) * (size / 2.0)


def adjusted(ranks: np.ndarray, share: float, tau: float) -> np.ndarray:
    """Raise the ranks [...] of a class that has the part `share` of the labelled pixels.

    The odds of a score s in [0, 1], s / (1 - s), grow by ((1 - share) / share)^tau (logit
    adjustment, arXiv 2007.07314): certain scores stay, a doubt about a rare class counts for more
    than one about a common class. What lies beyond [0, 1] is left as it is.
    """
    odds = odds_factor(share, tau)
    inside = ranks.clip(0.0, 1.0)
    return ranks + (inside * odds / (inside * odds + (1.0 - inside)) - inside)


def odds_factor(share: float, tau: float) -> float:
    """By what `adjusted` multiplies the odds of a class; shares near 0 and 1 are less extreme."""
    share = min(max(share, LEAST_SHARE), 1.0 - LEAST_SHARE)
    return ((1.0 - share) / share) ** tau


def join_passes(of_passes: np.ndarray, num_classes: int) -> np.ndarray:
    """Ranks of the passes of `groups`, [P, ..., H, W, G] -> [..., H, W, K], padding dropped."""
    joined = np.moveaxis(of_passes, 0, -2)  # [..., H, W, P, G]
    return joined.reshape(*joined.shape[:-2], -1)[..., :num_classes]


def level_code(size: int, dim: int) -> np.ndarray:
    """Fixed sinusoidal codes of the G levels, float32 [G, D] in [-1, 1].

    The transformer's position code (arXiv 1706.03762) at position 1000 (l + 1) / 2, so that a
    level has the same code whatever G is, and 1/255 of the range is four radians.
    """
    position = 500.0 * (_levels(size) + 1.0)
    frequency = 10_000.0 ** (-np.arange((dim + 1) // 2) / max(1, (dim + 1) // 2))
    angle = position[:, None] * frequency  # [G, ceil(D / 2)]
    code = np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)[:, :dim]
    return code.astype(np.float32)
