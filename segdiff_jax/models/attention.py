"""Scaled dot-product attention: as written, or on TPUs one kernel that keeps the weights on chip.

The weights of 2,304 positions are 21 MB per head in float32 and cross the memory bus several times.
The kernel (jax.experimental.pallas.ops.tpu.splash_attention) holds a block of them at a time. It is
used where it pays and can be placed: many unmasked queries in bfloat16, on a TPU mesh that
`training.loop.compile_step` or a `shard_map` has named, since XLA cannot cut up a kernel by itself.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

SHORTEST = 512  # queries; below, the weights are small and the kernel's blocks would not fill
_LANES, _LARGEST_BLOCK = 128, 1024
_RESIDUALS = "attention"  # the kernel's name for its result and each row's log of the sum
_KEPT = jax.checkpoint_policies.save_only_these_names(_RESIDUALS)


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """softmax(q kᵀ / √D) v (arXiv 1706.03762, eq. 1), softmax in float32.

    query [B, S, N, D], key and value [B, L, N, D], mask broadcastable to [B, N, S, L] and True
    where attention is allowed. Returns [B, S, N, D].
    """
    if mask is None and _kernel_pays(query):
        return _on_mesh(query, key, value)
    return plain(query, key, value, mask)


def plain(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """`attention` as matrix products and a softmax."""
    scale = 1.0 / math.sqrt(query.shape[-1])
    logits = jnp.einsum("bsnd,blnd->bnsl", query * scale, key, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bnsl,blnd->bsnd", weights, value)


def fused(
    query: jax.Array, key: jax.Array, value: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """`plain` without a mask as one kernel; S and L are filled up to whole blocks.

    The backward pass keeps the arguments, the result and a number per row: not what the kernel
    takes and gives, in whose layout D = 64 fills half of the memory.

    interpret: run on any device, slowly, for tests.
    """
    _, length, heads, width = query.shape
    kernel = _kernel(heads, length, key.shape[1], interpret)

    def by_head(x: jax.Array) -> jax.Array:  # [B, S, N, D] -> [B, N, filled S, D]
        rest = _filled(x.shape[1]) - x.shape[1]
        return jnp.pad(x, ((0, 0), (0, rest), (0, 0), (0, 0))).swapaxes(1, 2)

    @functools.partial(jax.checkpoint, policy=_KEPT)
    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        scaled = query * jnp.asarray(1.0 / math.sqrt(width), query.dtype)
        out = jax.vmap(kernel)(by_head(scaled), by_head(key), by_head(value))
        return out.swapaxes(1, 2)[:, :length]

    return attend(query, key, value)


def _kernel(heads: int, length: int, others: int, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = _filled(length), _filled(others)
    rows, columns = map(_block, shape)
    blocks = splash.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_kv_compute=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_kv_dkv_compute=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )
    # Not the keys that fill up. Of the queries that do, no one reads the result.
    real = np.broadcast_to(np.arange(shape[1]) < others, shape)
    mask = splash.FullMask(shape) if shape[1] == others else splash.NumpyMask(real)
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        residual_checkpoint_name=_RESIDUALS,
    )


def _filled(length: int) -> int:
    """The next multiple of 128 that is one block, or several of at least 512."""
    sizes = itertools.count(length + -length % _LANES, _LANES)
    return next(size for size in sizes if _block(size) >= min(size, 512))


def _block(length: int) -> int:
    """The largest multiple of 128 up to 1,024 that divides `length`."""
    sizes = range(_LARGEST_BLOCK, 0, -_LANES)
    return next(size for size in sizes if length % size == 0)


def _kernel_pays(query: jax.Array) -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    batch, length, heads, _ = query.shape
    if mesh.empty or query.dtype != jnp.bfloat16 or length < SHORTEST:
        return False
    device = mesh.abstract_device
    if device is None or not device.device_kind.startswith("TPU"):
        return False
    if mesh.are_all_axes_manual:  # in a `shard_map`: this is one device's part
        return True
    sizes = mesh.shape
    return batch % (sizes["data"] * sizes["fsdp"]) == heads % sizes["tensor"] == 0


def _on_mesh(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """The kernel on each device's part of batch and heads."""
    if jax.sharding.get_abstract_mesh().are_all_axes_manual:
        return fused(query, key, value)
    spec = P(("data", "fsdp"), None, "tensor", None)
    return jax.shard_map(fused, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(
        query, key, value
    )
