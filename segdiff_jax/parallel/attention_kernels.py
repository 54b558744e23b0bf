"""The attention that suits the devices of a mesh: a function for networks to be built with.

TPUs: splash attention (jax.experimental.pallas.ops.tpu.splash_attention), which holds a block of
the weights on the chip at a time. NVIDIA: cuDNN's, in half precision. CPUs: a block of
queries at a time. All are for attention without a mask; what they do not take is left to
`models.attention.plain`.
"""

import functools
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from segdiff_jax.models.attention import AttentionFn, plain
from segdiff_jax.models.layers import PRODUCT, Attention

N = TypeVar("N", bound=nnx.Module)
_QUERIES = 256  # in a block of `in_blocks`


def with_attention(network: N, attention: AttentionFn) -> N:
    """Return `network`, with the same arrays, as if built with another attention function."""
    graph, params = nnx.split(network)
    network = nnx.merge(graph, params)
    for _, layer in nnx.iter_modules(network):
        if isinstance(layer, Attention):
            layer.attention = attention
    return network


@functools.cache
def on_mesh(mesh: Mesh) -> AttentionFn:
    """Return the attention function for arrays sharded over `mesh`, as in a training step."""
    platform = mesh.devices.flat[0].platform
    # XLA cannot partition a TPU kernel by itself.
    return in_parts(splash, mesh) if platform == "tpu" else on_device(platform)


def in_parts(attention: AttentionFn, mesh: Mesh) -> AttentionFn:
    """Apply `attention` to each device's shard: batch over data × fsdp, heads over `tensor`.

    `tensor` peers whose number does not divide the heads compute all of them. With a mask, and for
    a batch that does not divide, this is `plain`.
    """

    def attend(
        query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        if mask is not None or len(query) % (mesh.shape["data"] * mesh.shape["fsdp"]):
            return plain(query, key, value, mask)
        heads = None if query.shape[2] % mesh.shape["tensor"] else "tensor"
        part = P(("data", "fsdp"), None, heads)
        on_each = jax.shard_map(
            lambda query, key, value: attention(query, key, value, None),
            mesh=mesh,
            in_specs=(part,) * 3,
            out_specs=part,
            check_vma=False,
        )
        return on_each(query, key, value)

    return attend


def on_device(platform: str) -> AttentionFn:
    """Return the attention function for one device of `platform` ("tpu", "gpu" or "cpu")."""
    return {"tpu": splash, "gpu": cudnn}.get(platform, in_blocks)


def in_blocks(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Attend from a block of positions of one head at a time: its weights stay in a CPU's cache.

    Gradients recompute the weights. With a mask, and up to one block of positions, this is `plain`.
    """
    batch, length, heads, width = query.shape
    if mask is not None or length <= _QUERIES:
        return plain(query, key, value, mask)

    def of_head(arrays: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        query, key, value = arrays  # [S, D], [L, D], [L, D]

        # As `plain`, whose swaps of axes would cost half as much again with gradients.
        @jax.checkpoint
        def of_position(query: jax.Array) -> jax.Array:  # [D] -> [D]
            logits = jnp.matmul(query, key.T, preferred_element_type=jnp.float32)
            return jax.nn.softmax(logits).astype(value.dtype) @ value

        return jax.lax.map(of_position, query / math.sqrt(width), batch_size=_QUERIES)

    by_head = (x.swapaxes(1, 2).reshape(-1, x.shape[1], width) for x in (query, key, value))
    out = jax.lax.map(of_head, tuple(by_head))  # [B · N, S, D]
    return out.reshape(batch, heads, length, width).swapaxes(1, 2)


def cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Attend with cuDNN's flash attention, which XLA partitions; heads are at most 128 wide."""
    width = query.shape[-1]
    if mask is not None or query.dtype == jnp.float32 or width > 128 or width % 8:
        return plain(query, key, value, mask)
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attend with the TPU's splash kernel: positions to each other.

    With a mask, and for another sequence (a text, which is short), this is `plain`. Arrays are as
    of `AttentionFn`. `interpret` runs the kernel on any device, slowly.
    """
    if mask is not None or query.shape != key.shape:
        return plain(query, key, value, mask)
    _, length, heads, width = query.shape
    block = _block(length, width)
    kernel = _kernel(heads, length, block, interpret)

    def by_head(x: jax.Array) -> jax.Array:  # [B, S, N, D] -> [B, N, filled S, D]
        return jnp.pad(x, ((0, 0), (0, -length % block), (0, 0), (0, 0))).swapaxes(1, 2)

    scaled = query / math.sqrt(width)
    out = jax.vmap(kernel)(by_head(scaled), by_head(key), by_head(value))
    return out.swapaxes(1, 2)[:, :length]


def _kernel(heads: int, length: int, block: int, interpret: bool) -> Any:
    """Build the kernel for positions padded to whole blocks; no query sees the padding."""
    filled = length + -length % block
    shape = filled, filled
    seen = np.broadcast_to(np.arange(filled) < length, shape)
    mask = kernels.FullMask(shape) if filled == length else kernels.NumpyMask(seen)
    blocks = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    return kernels.make_splash_mha(
        kernels.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        residual_checkpoint_name=PRODUCT,
    )


def _block(length: int, width: int) -> int:
    """Choose the block length, a multiple of 128, that leaves least to pad.

    768 fit into a chip's VMEM with the gradients, and 512 where heads are wide.
    """
    sizes = range(512, 769, 128) if width <= 128 else range(256, 513, 128)
    if length <= sizes[-1]:
        return length + -length % 128
    return min(reversed(sizes), key=lambda block: -length % block)
