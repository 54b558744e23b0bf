"""Merging the members of an ensemble, with or without affine alignment.

Affine alignment (Marigold, arXiv 2312.02145, section 3.3 and supplement) treats every map as
known up to a scale and a shift: right for depth, and for gray maps whose members agree up to
contrast. It destroys absolute gray levels, which is why `align="none"` exists.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from segdiff_jax.shapes import Members, MergedMap, PerMember

REGULARIZER = 0.02
# Tiny against the objective, large against float32: keeps sqrt and 1/x differentiable at 0.
TINY = 1e-12
SHRINK = 1e-6  # stands in for scale 0 where that is the optimum: see `alignment`
RATES, ITERATIONS = (0.03, 0.003, 0.0003), 100  # first rate of each round; its iterations
EXTREMES = 64  # darkest pixels, and as many brightest, on which a round measures the extent
MOST_COMPARED = 24  # members up to which `median` compares them one by one, N²/2 times


def merge(
    maps: jax.Array, reduce: str = "median", uncertainty: str = "mad"
) -> tuple[jax.Array, jax.Array]:
    """Merge members [N, ...] into (merged [...], uncertainty [...]), pixel by pixel.

    reduce "median" | "mean". uncertainty "mad" (median absolute deviation from the merged map)
    | "std" (population standard deviation), in the units of `maps`; zero for N = 1.
    """
    merged = median(maps) if reduce == "median" else jnp.mean(maps, axis=0)
    if uncertainty == "mad":
        return merged, median(jnp.abs(maps - merged))
    return merged, jnp.std(maps, axis=0)


def median(members: jax.Array) -> jax.Array:
    """Compute the median of members [N, ...] by odd-even transposition, as [...].

    A sorting network is minima and maxima of whole maps. XLA's sort, which `jnp.median` calls, goes
    from pixel to pixel: 180 times as slow for 10 maps of 96 × 128 on a CPU.
    """
    count = members.shape[0]
    if count > MOST_COMPARED:
        return jnp.median(members, axis=0)
    rows = list(members)
    for turn in range(count):
        for i in range(turn % 2, count - 1, 2):
            rows[i : i + 2] = jnp.minimum(*rows[i : i + 2]), jnp.maximum(*rows[i : i + 2])
    return (rows[(count - 1) // 2] + rows[count // 2]) / 2.0


def ensemble(
    maps: Members, align: str = "none", reduce: str = "median", uncertainty: str = "mad"
) -> tuple[MergedMap, MergedMap]:
    """Merge members [N, H, W] in [0, 1] into (merged [H, W], uncertainty [H, W]).

    align "none": `merge` as it is. "affine": aligned first, and the result stretched to fill
    [0, 1] (uncertainty in the same units), as Marigold does.
    """
    if align == "none":
        return merge(maps, reduce, uncertainty)
    scale, shift = alignment(maps, reduce)
    aligned = maps * scale[:, None, None] + shift[:, None, None]
    merged, spread = merge(aligned, reduce, uncertainty)
    extent = jnp.maximum(jnp.max(merged) - jnp.min(merged), TINY)
    return (merged - jnp.min(merged)) / extent, spread / extent


@functools.partial(jax.jit, static_argnames="reduce")
def alignment(maps: Members, reduce: str = "median") -> tuple[PerMember, PerMember]:
    """Find (scale [N], shift [N]) that align maps [N, H, W] in [0, 1], by Marigold's objective.

    That is the mean pairwise RMS of the aligned maps + 0.02 (|min| + |1 - max|) of the merged one.
    Starts where Marigold does, every map stretched to [0, 1]. The objective as written is hard on
    an optimiser: its optimum lies on the kinks of |min| and |1 - max|. But shrinking aligned maps
    whose merged map spans [0, 1] by a factor a makes it a R + 0.02 (1 - a), R being their mean
    pairwise RMS. So Adam minimises the gauge-free R = disagreement / extent, and a follows: 1 if
    R < 0.02. Otherwise, which is the rule for noisy members, the infimum is at a = 0, where the
    maps are gone (Marigold stops after two iterations, before it gets there). There a = 1e-6:
    within 1e-6 of the infimum, and nothing is lost, since `ensemble` stretches the result. A value
    of the objective near 0.02 therefore says nothing about how well maps agree.

    The extent of a few pixels is at most that of all, so R of them is at least R of all: each round
    descends on the pixels that are the darkest and the brightest where it begins, and what it finds
    is better by at least as much on all (majorise, then minimise).
    """
    count = maps.shape[0]
    low, high = jnp.min(maps, axis=(1, 2)), jnp.max(maps, axis=(1, 2))
    scale0 = 1.0 / jnp.maximum(high - low, 1e-6)
    shift0 = -scale0 * low
    flat = (maps * scale0[:, None, None] + shift0[:, None, None]).reshape(count, -1)
    disagreement = _pairwise_rms(flat)
    few = min(EXTREMES, flat.shape[1])

    def merged(pixels: jax.Array, parameters: jax.Array) -> jax.Array:  # [N, P] → [P]
        return merge(pixels * parameters[:count, None] + parameters[count:, None], reduce)[0]

    def gauge_free(parameters: jax.Array, ends: jax.Array) -> jax.Array:
        values = merged(ends, parameters)
        # The gradient is that of one darkest and one brightest pixel, where several are equal.
        two = jnp.stack([jnp.argmin(values), jnp.argmax(values)])
        bottom, top = merged(ends[:, two], parameters)
        return disagreement(parameters) / jnp.maximum(top - bottom, 1e-6)

    best = jnp.concatenate([jnp.ones(count), jnp.zeros(count)])
    for rate in RATES:
        values = merged(flat, best)
        ends = jnp.concatenate([jax.lax.top_k(v, few)[1] for v in (-values, values)])
        best = _descend(functools.partial(gauge_free, ends=flat[:, ends]), best, rate)

    values = merged(flat, best)
    bottom, top = jnp.min(values), jnp.max(values)
    extent = jnp.maximum(top - bottom, 1e-6)
    size = jnp.where(disagreement(best) / extent < REGULARIZER, 1.0, SHRINK) / extent
    scale = best[:count] * size
    shift = (best[count:] - bottom) * size
    return scale * scale0, scale * shift0 + shift


def _descend(
    function: Callable[[jax.Array], jax.Array], start: jax.Array, first: float
) -> jax.Array:
    """Return the best point on an Adam path from `start`, whose step shrinks from `first`.

    Median, min and max make kinks at which a line search finds no descent; the moving average of
    Adam mixes the gradients of both sides and slides along them.
    """
    optimizer = optax.adam(optax.exponential_decay(first, ITERATIONS, 0.1), b1=0.9, b2=0.99)

    def step(carry, _):
        point, state, best, lowest = carry
        value, gradient = jax.value_and_grad(function)(point)
        best = jnp.where(value < lowest, point, best)
        updates, state = optimizer.update(gradient, state)
        return (point + updates, state, best, jnp.minimum(value, lowest)), None

    carry = (start, optimizer.init(start), start, jnp.asarray(jnp.inf, start.dtype))
    (_, _, best, _), _ = jax.lax.scan(step, carry, length=ITERATIONS)
    return best


def _pairwise_rms(flat: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Return a function of [scale, shift] [2N]: mean pairwise RMS of the aligned `flat` [N, P].

    The maps are replaced by their coordinates in the N-dimensional space they span (QR), where
    distances are the same: an evaluation costs N^3 instead of N^2 P, and nothing cancels as it
    would in a Gram matrix.
    """
    count, pixels = flat.shape
    mean = jnp.mean(flat, axis=1)
    coordinates = jnp.linalg.qr((flat - mean[:, None]).T, mode="r").T / jnp.sqrt(pixels)
    coordinates = jnp.concatenate([coordinates, mean[:, None]], axis=1)  # last: along ones
    first, second = jnp.triu_indices(count, 1)

    def disagreement(parameters: jax.Array) -> jax.Array:
        aligned = coordinates * parameters[:count, None]
        aligned = aligned.at[:, -1].add(parameters[count:])
        squares = jnp.sum((aligned[first] - aligned[second]) ** 2, axis=1)
        return jnp.sum(jnp.sqrt(squares + TINY)) / max(1, squares.size)

    return disagreement
