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

from segdiff_jax.models import named_mesh

SHORTEST = 512  # queries; below, the weights are small and the kernel's blocks would not fill
_LANES, _LARGEST_BLOCK = 128, 1024
_SMALLER_BLOCK = 768  # the largest that leaves room in VMEM for a mask, or for gradients
_WIDE, _WIDE_BLOCK = 128, 512  # heads wider than this (the VAE's one of 512) leave room for less
_MOST_TOGETHER = 2304  # keys that the kernel of all gradients holds in the VMEM of every chip
_RESIDUALS = "attention"  # the kernel's name for its result and each row's log of the sum
# A policy for `jax.checkpoint`: that is kept, all else is made again.
KEPT = jax.checkpoint_policies.save_only_these_names(_RESIDUALS)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    width: int,
    mask: jax.Array | None = None,
) -> jax.Array:
    """softmax(q kᵀ / √D) v (arXiv 1706.03762, eq. 1) in N heads of D = `width`, softmax in float32.

    query [B, S, N · D], key and value [B, L, N · D], mask broadcastable to [B, N, S, L] and True
    where attention is allowed. Returns [B, N, S, D], as the kernel does, which keeps its result for
    the backward pass: `joined` lays it out anew. Of more than S rows the first S are meant.
    """
    if mask is None and _kernel_pays(query, width):
        return _on_mesh(query, key, value, width)
    by_heads = lambda q, k, v: plain(q, k, v, width, mask)  # noqa: E731
    if query.dtype != jnp.float32:
        by_heads = jax.checkpoint(by_heads)  # else the weights would be kept, in float32
    return by_heads(query, key, value)


def plain(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    width: int,
    mask: jax.Array | None = None,
) -> jax.Array:
    """`attention` as matrix products and a softmax."""
    query, key, value = (x.reshape(*x.shape[:2], -1, width) for x in (query, key, value))
    scale = 1.0 / math.sqrt(width)
    logits = jnp.einsum("bsnd,blnd->bnsl", query * scale, key, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bnsl,blnd->bnsd", weights, value)


def joined(out: jax.Array, length: int) -> jax.Array:
    """What `attention` returns of `length` queries, [B, N, ≥ S, D], as [B, S, N · D]."""
    batch, heads, _, width = out.shape
    return out[:, :, :length].swapaxes(1, 2).reshape(batch, length, heads * width)


def fused(
    query: jax.Array, key: jax.Array, value: jax.Array, width: int, *, interpret: bool = False
) -> jax.Array:
    """`plain` without a mask as one kernel; S and L, and the result, are filled to whole blocks.

    The backward pass keeps the arguments, the result and a number per row: not what the kernel
    takes, in whose layout D = 64 fills half of the memory.

    interpret: run on any device, slowly, for tests.
    """
    _, length, channels = query.shape
    kernel = _kernel(channels // width, length, key.shape[1], width > _WIDE, interpret)

    def by_head(x: jax.Array) -> jax.Array:  # [B, S, N · D] -> [B, N, filled S, D]
        x = jnp.pad(x, ((0, 0), (0, _filled(x.shape[1]) - x.shape[1]), (0, 0)))
        return x.reshape(*x.shape[:2], -1, width).swapaxes(1, 2)

    @functools.partial(jax.checkpoint, policy=KEPT)
    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        scaled = query * jnp.asarray(1.0 / math.sqrt(width), query.dtype)
        return jax.vmap(kernel)(by_head(scaled), by_head(key), by_head(value))

    return attend(query, key, value)


def _kernel(heads: int, length: int, others: int, wide: bool, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = _filled(length), _filled(others)
    exact = shape[1] == others
    largest = _WIDE_BLOCK if wide else _LARGEST_BLOCK if exact else _SMALLER_BLOCK
    rows, columns = (_block(n, largest) for n in shape)
    back_rows, back_columns = (_block(n, min(largest, _SMALLER_BLOCK)) for n in shape)
    # One kernel for all three gradients needs 5 products, two need 7. But it returns what each
    # block of keys adds to the gradient of the queries, so all keys should be one block, for which
    # VMEM is too small where there are many, or several blocks with a mask.
    together = not wide and shape[1] <= (_MOST_TOGETHER if exact else _SMALLER_BLOCK)
    blocks = splash.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_kv_compute=columns,
        block_q_dkv=back_rows,
        block_kv_dkv=shape[1] if together else back_columns,
        block_kv_dkv_compute=back_columns,
        block_q_dq=None if together else back_rows,
        block_kv_dq=None if together else back_columns,
        use_fused_bwd_kernel=together,
    )
    # Not the keys that fill up. Of the queries that do, no one reads the result.
    real = np.broadcast_to(np.arange(shape[1]) < others, shape)
    mask = splash.FullMask(shape) if exact else splash.NumpyMask(real)
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


def _block(length: int, largest: int = _LARGEST_BLOCK) -> int:
    """The largest multiple of 128 up to `largest` that divides `length`."""
    sizes = range(largest, 0, -_LANES)
    return next(size for size in sizes if length % size == 0)


def _kernel_pays(query: jax.Array, width: int) -> bool:
    mesh = named_mesh.of_tpus()
    batch, length, channels = query.shape
    if mesh is None or query.dtype != jnp.bfloat16 or length < SHORTEST:
        return False
    if mesh.are_all_axes_manual:  # in a `shard_map`: this is one device's part
        return True
    sizes = mesh.shape
    if batch % (sizes["data"] * sizes["fsdp"]):
        return False
    if channels // width % sizes["tensor"] == 0:
        return True
    each, rest = divmod(length, sizes["tensor"])
    return rest == 0 and each >= SHORTEST and _filled(each) == each


def _on_mesh(
    query: jax.Array, key: jax.Array, value: jax.Array, width: int, *, interpret: bool = False
) -> jax.Array:
    """The kernel on each device's part of the batch, and of the heads, or of the queries where
    `tensor` does not divide the heads: Stable Diffusion 2 has five at first."""
    attend = functools.partial(fused, width=width, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.are_all_axes_manual:
        return attend(query, key, value)
    rows = ("data", "fsdp")
    if query.shape[2] // width % mesh.shape["tensor"] == 0:
        given, found = (P(rows, None, "tensor"),) * 3, P(rows, "tensor", None, None)
    else:
        given = P(rows, "tensor", None), P(rows), P(rows)
        found = P(rows, None, "tensor", None)
    return jax.shard_map(attend, in_specs=given, out_specs=found, check_vma=False)(
        query, key, value
    )
