"""The conditional UNet of Stable Diffusion (`UNet2DConditionModel`), channel-last."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from segdiff_jax.fields import number
from segdiff_jax.models.attention import AttentionFn, plain
from segdiff_jax.models.layers import (
    KEEP_INPUTS,
    KEEP_PRODUCTS,
    Attention,
    Downsample,
    Dtype,
    GroupNorm,
    ResnetBlock,
    Upsample,
    conv,
    keeping,
    linear,
    sinusoidal_embedding,
)
from segdiff_jax.shapes import ConditionedLatents, Context, ContextMask, Latents, Timesteps


@dataclass(frozen=True)
class UNetConfig:
    """The fields of diffusers' `unet/config.json` that change the network."""

    in_channels: int = number(8, 1, 65536)  # image latent ⊕ noisy mask latent
    out_channels: int = number(4, 1, 65536)  # channels of one latent
    block_out_channels: tuple[int, ...] = number((320, 640, 1280, 1280), 1, 65536)  # per level
    cross_attention: tuple[bool, ...] = (True, True, True, False)  # per level: has transformers
    layers_per_block: int = number(2, 1, 64)  # resnets per level going down; one more going up
    transformer_layers: int = number(1, 1, 64)  # blocks per transformer
    heads: tuple[int, ...] = number((5, 10, 20, 20), 1, 65536)  # in files: `attention_head_dim`
    cross_attention_dim: int = number(1024, 1, 65536)  # channels of the text
    use_linear_projection: bool = True  # around a transformer; False: a 1 × 1 convolution
    norm_groups: int = number(32, 1, 65536)  # a divisor of all widths
    norm_epsilon: float = number(1e-5, 1e-12, 1.0)  # of the resnets' norms
    flip_sin_to_cos: bool = True  # cosines come first in the code of the timestep
    freq_shift: float = number(0.0, 0.0, 1.0)  # 1 lets its frequencies end at 1 / 10,000


class FeedForward(nnx.Module):
    """GEGLU (arXiv 2002.05202): proj_out(a · gelu(b)) with a, b = split(proj_in(x))."""

    def __init__(self, channels: int, **kw: Any):
        self.proj_in = linear(channels, 8 * channels, **kw)
        self.proj_out = linear(4 * channels, channels, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, S, C] -> [B, S, C]
        hidden, gate = jnp.split(self.proj_in(x), 2, axis=-1)
        return self.proj_out(hidden * jax.nn.gelu(gate, approximate=False))


class TransformerBlock(nnx.Module):
    """Positions attend to each other, then to the text; then each by itself."""

    def __init__(
        self, channels: int, heads: int, context_dim: int, *, attention: AttentionFn, **kw: Any
    ):
        norm = lambda: nnx.LayerNorm(channels, epsilon=1e-5, rngs=kw["rngs"])  # noqa: E731
        self.norm1, self.norm2, self.norm3 = norm(), norm(), norm()
        self.attn1 = Attention(channels, heads, attention=attention, **kw)
        self.attn2 = Attention(channels, heads, attention=attention, context_dim=context_dim, **kw)
        self.ff = FeedForward(channels, **kw)

    def __call__(self, x: jax.Array, context: jax.Array, mask: jax.Array | None) -> jax.Array:
        """x float32 [B, S, C], context [B, L, D], mask [B, 1, 1, L] -> float32 [B, S, C]."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nnx.Module):
    """Image positions as tokens that attend to each other and to the text."""

    def __init__(
        self,
        config: UNetConfig,
        channels: int,
        heads: int,
        *,
        zero: bool,
        attention: AttentionFn,
        **kw: Any,
    ):
        project = linear if config.use_linear_projection else lambda i, o, **k: conv(i, o, 1, **k)
        self.norm = GroupNorm(channels, config.norm_groups, 1e-6)
        self.proj_in = project(channels, channels, **kw)
        self.transformer_blocks = nnx.List(
            TransformerBlock(channels, heads, config.cross_attention_dim, attention=attention, **kw)
            for _ in range(config.transformer_layers)
        )
        self.proj_out = project(channels, channels, zero=zero, **kw)

    def __call__(self, x: jax.Array, context: jax.Array, mask: jax.Array | None) -> jax.Array:
        """x [B, H, W, C], context [B, L, D], mask [B, 1, 1, L] -> [B, H, W, C]."""
        batch, height, width, channels = x.shape
        # A linear layer and a 1×1 convolution are the same map channel-last, before or after this.
        h = self.proj_in(self.norm(x)).astype(jnp.float32)
        h = h.reshape(batch, height * width, channels)
        for block in self.transformer_blocks:
            h = block(h, context, mask)
        return x + self.proj_out(h.reshape(x.shape))


class Level(nnx.Module):
    """One resolution of the UNet, on the way down, in the middle or on the way up."""

    def __init__(
        self,
        config: UNetConfig,
        widths_in: list[int],
        channels: int,
        heads: int,
        *,
        resample: str | None,
        zero: bool,
        attention: AttentionFn,
        **kw: Any,
    ):
        norm: dict[str, Any] = {"groups": config.norm_groups, "epsilon": config.norm_epsilon}
        time_dim = 4 * config.block_out_channels[0]
        self.resnets = nnx.List(
            ResnetBlock(width, channels, time_dim=time_dim, zero=zero, **norm, **kw)
            for width in widths_in
        )
        count = len(widths_in) - (resample == "middle") if heads else 0
        self.attentions = nnx.List(
            SpatialTransformer(config, channels, heads or 1, zero=zero, attention=attention, **kw)
            for _ in range(count)
        )
        self.downsample = Downsample(channels, padding=(1, 1), **kw) if resample == "down" else None
        self.upsample = Upsample(channels, **kw) if resample == "up" else None

    def layer(self, x, skip, time, context, mask, *, index: int) -> jax.Array:
        """Apply the resnet at `index` to x ⊕ skip, and the transformer if any: [B, H, W, C]."""
        x = x if skip is None else jnp.concatenate([x, skip], axis=-1)
        x = self.resnets[index](x, time)
        return self.attentions[index](x, context, mask) if index < len(self.attentions) else x


class UNet(nnx.Module):
    """Predicts noise, x0 or velocity from noisy latents, timestep and text.

    `attention` serves self- and cross-attention. With `remat`, a block saves only its inputs for
    the backward pass; without, it also saves the results of its products, and in float32 all. With
    `zero_init`, every residual branch and the output start at zero, for training from scratch.
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        attention: AttentionFn = plain,
        dtype: Dtype = jnp.float32,
        remat: bool = False,
        zero_init: bool = False,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = {"zero": zero_init, "attention": attention}
        kw |= {"dtype": dtype, "rngs": rngs}
        widths, layers = config.block_out_channels, config.layers_per_block
        last = len(widths) - 1
        self.config, self.dtype = config, dtype
        # Float32 is for CPUs, where time counts more than memory.
        by_default = None if dtype == jnp.float32 else KEEP_PRODUCTS
        self.kept = KEEP_INPUTS if remat else by_default
        # The two ends and the time embedding, which every block adds, are small: float32 there
        # costs nothing that can be measured and takes out rounding that all layers would see.
        exact: dict[str, Any] = {"dtype": jnp.float32, "rngs": rngs}
        self.conv_in = conv(config.in_channels, widths[0], **exact)
        self.time_linear_1 = linear(widths[0], 4 * widths[0], **exact)
        self.time_linear_2 = linear(4 * widths[0], 4 * widths[0], **exact)

        attends = zip(config.heads, config.cross_attention, strict=True)
        heads = [count if on else 0 for count, on in attends]
        skips, down = [widths[0]], []
        for i, width in enumerate(widths):
            inputs = [widths[max(i - 1, 0)]] + [width] * (layers - 1)
            resample = "down" if i < last else None
            down.append(Level(config, inputs, width, heads[i], resample=resample, **kw))
            skips += [width] * (layers + (i < last))
        self.down_blocks = nnx.List(down)
        self.mid_block = Level(
            config, [widths[-1]] * 2, widths[-1], config.heads[-1], resample="middle", **kw
        )
        up, running = [], widths[-1]
        for i in reversed(range(len(widths))):
            inputs = [before + skips.pop() for before in (running, *[widths[i]] * layers)]
            running = widths[i]
            resample = "up" if i > 0 else None
            up.append(Level(config, inputs, widths[i], heads[i], resample=resample, **kw))
        self.up_blocks = nnx.List(up)
        self.conv_norm_out = GroupNorm(widths[0], config.norm_groups, config.norm_epsilon)
        self.conv_out = conv(widths[0], config.out_channels, zero=zero_init, **exact)

    def __call__(
        self,
        sample: ConditionedLatents,
        timesteps: Timesteps,
        context: Context,
        context_mask: ContextMask | None = None,
    ) -> Latents:
        """sample [B, h, w, in], timesteps [B], context [B, L, D], context_mask [B, L] True = used.

        Returns [B, h, w, out] in float32.
        """
        mask = None if context_mask is None else context_mask[:, None, None, :].astype(bool)
        width, c = self.config.block_out_channels[0], self.config
        time = sinusoidal_embedding(timesteps, width, c.flip_sin_to_cos, c.freq_shift)
        time = self.time_linear_2(jax.nn.silu(self.time_linear_1(time)))  # [B, 4 · width]

        def layer(level: Level, index: int, x: jax.Array, skip: Any = None) -> jax.Array:
            block = functools.partial(Level.layer, index=index)
            return keeping(self.kept, block, level, x, skip, time, context, mask)

        x = self.conv_in(sample).astype(self.dtype)
        skips = [x]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                x = layer(level, i, x)
                skips.append(x)
            if level.downsample is not None:
                x = level.downsample(x)
                skips.append(x)
        for i in range(len(self.mid_block.resnets)):
            x = layer(self.mid_block, i, x)
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = layer(level, i, x, skips.pop())
            if level.upsample is not None:
                # The next skip's size, not twice this one: odd sizes were rounded on the way down.
                _, height, width, _ = skips[-1].shape
                x = level.upsample(x, (height, width))
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))
