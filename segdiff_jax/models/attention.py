"""Scaled dot-product attention as the paper writes it.

Networks are given their attention function when they are built: this one, or one of the same form
that suits the devices better (`parallel/attention_kernels.py`).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from segdiff_jax.shapes import HeadKeys, HeadQueries

# (query [B, S, N, D], key [B, L, N, D], value [B, L, N, D], mask) -> [B, S, N, D]. The mask is
# broadcastable to [B, N, S, L] and True where a query may attend to a key; None allows all.
AttentionFn = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


def plain(
    query: HeadQueries, key: HeadKeys, value: HeadKeys, mask: jax.Array | None = None
) -> HeadQueries:
    """Compute softmax(q kᵀ / √D) v (arXiv 1706.03762, eq. 1), the softmax in float32."""
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))  # [B, N, S or L, D]
    scaled = query / math.sqrt(query.shape[-1])
    logits = jnp.matmul(scaled, key.mT, preferred_element_type=jnp.float32)  # [B, N, S, L]
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return (weights @ value).swapaxes(1, 2)
