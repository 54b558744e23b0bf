"""Building blocks shared by the UNet and the VAE, channel-last.

Products (convolutions, linear layers, attention) take and give the network's `dtype`, and so do
blocks. Norms, and the sums within a transformer, are float32; layers cast what they are given.
Constructors take `dtype` and `rngs` last, and hand them on as `kw`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from segdiff_jax.models.attention import AttentionFn

Dtype = jax.typing.DTypeLike
Policy = Callable[..., bool]

# It keeps the variance of a signal. Torch's default, a third of it, lets a signal that crosses the
# dozen convolutions of the VAE fade until a new network sees little but its biases.
_kernel_init = nnx.initializers.variance_scaling(1.0, "fan_in", "uniform")

PRODUCT = "product"  # the name of a result that a block may keep
# Remat policies: what a block saves for its backward pass, which recomputes the rest. Either the
# results of products, from which norms and activations are cheap, or nothing but its inputs.
KEEP_PRODUCTS = jax.checkpoint_policies.save_only_these_names(PRODUCT)
KEEP_INPUTS = jax.checkpoint_policies.nothing_saveable


def keeping(
    policy: Policy | None, block: Callable[..., jax.Array], module: nnx.Module, *inputs: Any
) -> jax.Array:
    """Call `block(module, *inputs)` under `jax.checkpoint` with `policy`, if there is one."""
    if policy is None:
        return block(module, *inputs)
    # Not `nnx.remat`, which writes to the module: samplers call networks inside `vmap` and `scan`.
    graph, params = nnx.split(module)
    pure = lambda params, *inputs: block(nnx.merge(graph, params), *inputs)  # noqa: E731
    return jax.checkpoint(pure, policy=policy)(params, *inputs)


class Linear(nnx.Linear):
    """nnx.Linear whose result can be kept by its name."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        return checkpoint_name(super().__call__(inputs, out_sharding), PRODUCT)


class Conv(nnx.Conv):
    """nnx.Conv whose result can be kept by its name."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        return checkpoint_name(super().__call__(inputs, out_sharding), PRODUCT)


def linear(
    features_in: int, features_out: int, *, bias: bool = True, zero: bool = False, **kw
) -> Linear:
    """Build a linear layer; with `zero` it starts as the map to zero."""
    init = nnx.initializers.zeros if zero else _kernel_init
    return Linear(features_in, features_out, use_bias=bias, kernel_init=init, **kw)


def conv(
    features_in: int,
    features_out: int,
    size: int = 3,
    *,
    stride: int = 1,
    padding: tuple[int, int] | None = None,
    zero: bool = False,
    **kw,
) -> Conv:
    """Build a square convolution; `padding` is (before, after) on both axes, by default same."""
    kw["kernel_init"] = nnx.initializers.zeros if zero else _kernel_init
    kw["padding"] = (padding or (size // 2, size // 2),) * 2  # of tuples: a list has no hash
    return Conv(features_in, features_out, (size, size), (stride, stride), **kw)


def kernels_as_multiplied(network: nnx.GraphDef, params: Any) -> Any:
    """Return `params` of `network` with each kernel in the dtype in which its layer multiplies.

    Layers round their kernels at each call. Rounded once for many calls, kernels take half the
    memory and traffic in bfloat16, and the results are the same to the last bit. Leaves may be
    `ShapeDtypeStruct`s; those that keep their dtype are not copied.
    """
    own = jax.tree.map(lambda leaf: leaf, params)  # variables of our own, for the same arrays
    module = nnx.merge(network, own)
    for _, layer in nnx.iter_modules(module):
        if isinstance(layer, nnx.Linear | nnx.Conv) and layer.dtype is not None:
            kernel = layer.kernel.get_value()
            abstract = isinstance(kernel, jax.ShapeDtypeStruct)
            change = kernel.update if abstract else kernel.astype
            layer.kernel.set_value(change(dtype=layer.dtype))
    return nnx.state(module)


class GroupNorm(nnx.Module):
    """Group normalisation (arXiv 1803.08494), in float32."""

    def __init__(self, channels: int, groups: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))
        self.groups, self.epsilon = groups, epsilon

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, H, W, C] -> float32 [B, H, W, C]
        x = x.astype(jnp.float32)
        centred = x - self._group_mean(x)
        scale = jax.lax.rsqrt(self._group_mean(jnp.square(centred)) + self.epsilon)
        return centred * (scale * self.scale[...]) + self.bias[...]

    def _group_mean(self, x: jax.Array) -> jax.Array:
        """Average over positions and the channels of a group: [B, H, W, C] -> [B, 1, 1, C]."""
        batch, *_, channels = x.shape
        of_groups = x.mean((1, 2)).reshape(batch, self.groups, -1).mean(-1)
        return jnp.repeat(of_groups, channels // self.groups, axis=-1)[:, None, None]


class Attention(nnx.Module):
    """Multi-head attention from `x` to `context` (to itself when `context` is None)."""

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        attention: AttentionFn,
        context_dim: int | None = None,
        qkv_bias: bool = False,
        **kw: Any,
    ):
        source = context_dim or channels
        # Plain layers, whose results no policy saves: they are large for the work they cost.
        project: Any = functools.partial(nnx.Linear, kernel_init=_kernel_init, **kw)
        self.to_q = project(channels, channels, use_bias=qkv_bias)
        self.to_k = project(source, channels, use_bias=qkv_bias)
        self.to_v = project(source, channels, use_bias=qkv_bias)
        self.to_out = project(channels, channels)
        self.heads, self.attention = heads, attention

    def __call__(
        self, x: jax.Array, context: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        """x [B, S, C], context [B, L, D], mask as of `AttentionFn` -> [B, S, C]."""
        source = x if context is None else context
        projected = self.to_q(x), self.to_k(source), self.to_v(source)
        query, key, value = (y.reshape(*y.shape[:2], self.heads, -1) for y in projected)
        out = self.attention(query, key, value, mask).reshape(x.shape)
        return self.to_out(out)


class ResnetBlock(nnx.Module):
    """norm → silu → conv → (+ time) → norm → silu → conv, plus the skip."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        groups: int,
        epsilon: float,
        time_dim: int | None = None,
        zero: bool = False,
        **kw: Any,
    ):
        self.norm1 = GroupNorm(channels_in, groups, epsilon)
        self.conv1 = conv(channels_in, channels_out, **kw)
        exact = kw | {"dtype": jnp.float32}  # small, and added at every position
        self.time_emb_proj = linear(time_dim, channels_out, **exact) if time_dim else None
        self.norm2 = GroupNorm(channels_out, groups, epsilon)
        self.conv2 = conv(channels_out, channels_out, zero=zero, **kw)
        changes_width = channels_in != channels_out
        self.conv_shortcut = conv(channels_in, channels_out, 1, **kw) if changes_width else None

    def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
        """x [B, H, W, C_in], time float32 [B, T] -> [B, H, W, C_out]."""
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        if self.time_emb_proj is not None and time is not None:
            h = h + self.time_emb_proj(jax.nn.silu(time))[:, None, None, :]
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nnx.Module):
    """Stride-2 convolution. The UNet pads (1, 1), the VAE encoder (0, 1)."""

    def __init__(self, channels: int, *, padding: tuple[int, int], **kw: Any):
        self.conv = conv(channels, channels, stride=2, padding=padding, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, H, W, C] -> [B, ⌈H/2⌉, ⌈W/2⌉, C]
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour upsampling, then a convolution."""

    def __init__(self, channels: int, **kw: Any):
        self.conv = conv(channels, channels, **kw)

    def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        """x [B, H, W, C] -> [B, *size, C], by default of twice the height and width."""
        return self.conv(upsample_nearest(x, size or (2 * x.shape[1], 2 * x.shape[2])))


def upsample_nearest(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Resize to `size` by nearest neighbour; source index ⌊i · in / out⌋, as torch does."""
    _, height, width, _ = x.shape
    if size == (2 * height, 2 * width):  # a broadcast, which XLA fuses, unlike a gather
        return x.repeat(2, axis=1).repeat(2, axis=2)
    rows = jnp.arange(size[0]) * height // size[0]
    columns = jnp.arange(size[1]) * width // size[1]
    return x[:, rows][:, :, columns]


def sinusoidal_embedding(
    positions: jax.Array, dim: int, flip_sin_to_cos: bool = True, freq_shift: float = 0.0
) -> jax.Array:
    """Embed positions [B] as sines and cosines, float32 [B, dim] (arXiv 1706.03762 §3.5)."""
    half = dim // 2
    exponent = -math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = positions.astype(jnp.float32)[:, None] * jnp.exp(exponent)  # [B, dim / 2]
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    parts = (cosine, sine) if flip_sin_to_cos else (sine, cosine)
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, dim % 2)))
