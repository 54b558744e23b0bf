"""Building blocks shared by the UNet and the VAE. Channel-last; float32 where rounding matters."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from segdiff_jax.models import named_mesh, recompute
from segdiff_jax.models.attention import KEPT, attention, joined

Dtype = jnp.dtype | type

# Keeps the variance of what passes through. Torch's default, a third of it, fades a signal that
# crosses the dozen bare convolutions of the VAE until a new network sees little but its biases.
_kernel_init = nnx.initializers.variance_scaling(1.0, "fan_in", "uniform")


def linear(
    features_in: int,
    features_out: int,
    *,
    bias: bool = True,
    zero: bool = False,
    **kw,
) -> "Linear":
    init = nnx.initializers.zeros if zero else _kernel_init
    return Linear(features_in, features_out, use_bias=bias, kernel_init=init, **kw)


class Linear(nnx.Linear):
    """x @ kernel + bias, summed in float32 and rounded once, to `dtype`."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # [..., in] -> [..., out]
        return self.unrounded(x).astype(self.dtype)

    def unrounded(self, x: jax.Array) -> jax.Array:
        """The float32 result, for a caller that adds to it before the one rounding."""
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        if x.dtype == jnp.float32:
            return x @ kernel if self.bias is None else x @ kernel + self.bias[...]
        return _product(x, kernel) if self.bias is None else _affine(x, kernel, self.bias[...])


def unrounded(layer: "Linear | nnx.Conv", x: jax.Array) -> jax.Array:
    """`layer(x)`, in float32 where the layer has it: convolutions round by themselves."""
    return layer.unrounded(x) if isinstance(layer, Linear) else layer(x)


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., in] @ kernel [in, out] in float32, whose gradients are products in x's own dtype."""
    return jax.lax.dot_general(
        x, kernel, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )


def _product_forward(x, kernel):
    return _product(x, kernel), (x, kernel)


def _product_backward(saved, gradient):
    # Without this JAX would multiply float32 by bfloat16, at twice the memory traffic.
    x, kernel = saved
    gradient = gradient.astype(x.dtype)
    rows = tuple(range(x.ndim - 1))
    to_x = jax.lax.dot_general(gradient, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    return to_x, jax.lax.dot_general(x, gradient, ((rows, rows), ((), ())))


_product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def _affine(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """`_product` plus bias [out], whose gradient sums what the kernel's multiplies, in float32.

    XLA puts such sums off until they are exchanged between chips. Until then it would keep the
    gradient in float32 too, for all layers.
    """
    return _product(x, kernel) + bias


def _affine_backward(saved, gradient):
    gradient = gradient.astype(saved[0].dtype)
    rows = tuple(range(gradient.ndim - 1))
    return *_product_backward(saved, gradient), gradient.sum(rows, dtype=jnp.float32)


_affine.defvjp(lambda x, kernel, bias: (_affine(x, kernel, bias), (x, kernel)), _affine_backward)


def conv(
    features_in: int,
    features_out: int,
    size: int = 3,
    *,
    stride: int = 1,
    padding: tuple[int, int] | None = None,
    zero: bool = False,
    **kw,
) -> nnx.Conv:
    """A square convolution. `padding` is (before, after) on both axes; by default it keeps size."""
    pad = (size // 2, size // 2) if padding is None else padding
    init = nnx.initializers.zeros if zero else _kernel_init
    return nnx.Conv(
        features_in,
        features_out,
        kernel_size=(size, size),
        strides=(stride, stride),
        padding=(pad, pad),
        kernel_init=init,
        **kw,
    )


def kernels_as_multiplied(network: nnx.GraphDef, params: Any) -> Any:
    """`params` of `network` with each kernel in the dtype in which its layer multiplies.

    Layers round the kernels that they are given; where they are called often with the same, once is
    enough, and kernels in bfloat16 are half as large. What a layer computes stays the same to the
    last bit. Not for training. Leaves may be `ShapeDtypeStruct`s; those that stay are not copied.
    """

    def multiplied(params: Any) -> Any:
        module = nnx.merge(network, params)
        for _, layer in nnx.iter_modules(module):
            if isinstance(layer, nnx.Linear | nnx.Conv) and layer.dtype is not None:
                layer.kernel.set_value(layer.kernel[...].astype(layer.dtype))
        return nnx.split(module)[1]

    def cast(leaf: Any, like: jax.ShapeDtypeStruct) -> Any:
        if leaf.dtype == like.dtype:
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf.update(dtype=like.dtype)
        return leaf.astype(like.dtype)

    return jax.tree.map(cast, params, jax.eval_shape(multiplied, params))


class GroupNorm(nnx.Module):
    """Group normalisation (arXiv 1803.08494), statistics in float32."""

    def __init__(self, channels: int, groups: int, epsilon: float, *, dtype: Dtype):
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))
        self.groups, self.epsilon, self.dtype = groups, epsilon, dtype

    def __call__(
        self, x: jax.Array, activation: Callable[[jax.Array], jax.Array] = lambda y: y
    ) -> jax.Array:  # [B, ..., C], the activation applied before rounding
        batch, channels = x.shape[0], x.shape[-1]
        grouped = x.reshape(batch, -1, self.groups, channels // self.groups).astype(jnp.float32)
        mean = grouped.mean((1, 3))  # [B, groups]
        variance = jnp.square(grouped - mean[:, None, :, None]).mean((1, 3))
        # One multiply-add per element: statistics and affine parameters are folded per channel.
        per_channel = channels // self.groups
        inverse = jnp.repeat(jax.lax.rsqrt(variance + self.epsilon), per_channel, axis=1)
        scale = inverse * self.scale[...]
        shift = self.bias[...] - jnp.repeat(mean, per_channel, axis=1) * scale
        broadcast = (batch,) + (1,) * (x.ndim - 2) + (channels,)
        y = x.astype(jnp.float32) * scale.reshape(broadcast) + shift.reshape(broadcast)
        return activation(y).astype(self.dtype)


class Attention(nnx.Module):
    """Multi-head attention from `x` to `context` (to itself when `context` is None)."""

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        context_dim: int | None = None,
        qkv_bias: bool = False,
        dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        source = context_dim or channels
        self.to_q = linear(channels, channels, bias=qkv_bias, **kw)
        self.to_k = linear(source, channels, bias=qkv_bias, **kw)
        self.to_v = linear(source, channels, bias=qkv_bias, **kw)
        self.to_out = linear(channels, channels, **kw)
        self.heads = heads

    def __call__(
        self,
        x: jax.Array,
        norm: "GroupNorm | nnx.LayerNorm",
        context: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """norm(x) [B, S, C] attends → float32 [B, S, C], for a sum with x before it is rounded.

        The backward pass makes norm(x) again. Of narrow layers it also makes the projections again,
        and attention to a context, which is short.
        """
        others = () if context is None else (self.to_k(context), self.to_v(context))
        layers = (self.to_q,) if others else (self.to_q, self.to_k, self.to_v)

        def weigh(others, mask, query, *own):  # -> [B, N, S, D]
            key, value = others or own
            return attention(query, key, value, query.shape[2] // self.heads, mask)

        def attend(given, norm, *layers):
            x, *rest = given
            return weigh(*rest, *norm_project(x, norm, *layers))

        def project(out, to_out):
            return to_out.unrounded(joined(out, x.shape[1]))

        def both(given, norm, to_out, *layers):
            return project(attend(given, norm, *layers), to_out)

        given = (x, others, mask)
        if recompute.is_narrow(x) and others:
            return recompute.from_inputs(both, given, norm, self.to_out, *layers)
        if recompute.is_narrow(x):
            out = recompute.from_inputs(attend, given, norm, *layers, keep=KEPT)
        else:
            projected = recompute.from_inputs(norm_project, x, norm, *layers)
            out = weigh(others, mask, *projected)
        return recompute.from_inputs(project, out, self.to_out)


def norm_project(
    x: jax.Array, norm: GroupNorm | nnx.LayerNorm, *layers: Linear | nnx.Conv
) -> list[jax.Array]:
    """Each of `layers` of norm(x)."""
    normed = norm(x)
    return [layer(normed) for layer in layers]


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
        dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.norm1 = GroupNorm(channels_in, groups, epsilon, dtype=dtype)
        self.conv1 = conv(channels_in, channels_out, **kw)
        self.time_emb_proj = linear(time_dim, channels_out, **kw) if time_dim else None
        self.norm2 = GroupNorm(channels_out, groups, epsilon, dtype=dtype)
        self.conv2 = conv(channels_out, channels_out, zero=zero, **kw)
        changes_width = channels_in != channels_out
        self.conv_shortcut = conv(channels_in, channels_out, 1, **kw) if changes_width else None

    def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
        h = recompute.from_inputs(_norm_silu_conv, x, self.norm1, self.conv1)
        if self.time_emb_proj is not None and time is not None:
            shift = self.time_emb_proj.unrounded(jax.nn.silu(time))
            h = (h + shift[:, None, None, :]).astype(h.dtype)
        h = recompute.from_inputs(_norm_silu_conv, h, self.norm2, self.conv2)
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


def _norm_silu_conv(x: jax.Array, norm: GroupNorm, conv: nnx.Conv) -> jax.Array:
    return conv(norm(x, jax.nn.silu))


class Downsample(nnx.Module):
    """Stride-2 convolution. The UNet pads (1, 1), the VAE encoder (0, 1)."""

    def __init__(self, channels: int, *, padding: tuple[int, int], dtype: Dtype, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, stride=2, padding=padding, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour upsampling, then a convolution."""

    def __init__(self, channels: int, *, dtype: Dtype, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        height, width = size or (2 * x.shape[1], 2 * x.shape[2])
        x = upsample_nearest(x, (height, width))
        # Else XLA may move x between chips and leave the kernel, here where x is at its largest.
        return self.conv(named_mesh.by_rows(x) if x.size > self.conv.kernel.size else x)


def upsample_nearest(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Nearest-neighbour resize to `size`; source index ⌊i · in / out⌋, as torch does."""
    batch, height, width, channels = x.shape
    if size == (2 * height, 2 * width):  # a broadcast, which XLA fuses; a gather it would not
        x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
        return x.reshape(batch, *size, channels)
    rows = jnp.arange(size[0]) * height // size[0]
    columns = jnp.arange(size[1]) * width // size[1]
    return x[:, rows][:, :, columns]


def sinusoidal_embedding(
    positions: jax.Array, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0
) -> jax.Array:
    """Sinusoidal embedding (arXiv 1706.03762 §3.5) of positions [B], `dim` wide, in float32."""
    half = dim // 2
    exponent = -math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = positions.astype(jnp.float32)[:, None] * jnp.exp(exponent)  # [B, dim / 2]
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    parts = (cosine, sine) if flip_sin_to_cos else (sine, cosine)
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, dim % 2)))
