"""The VAE of Stable Diffusion (`AutoencoderKL`), channel-last."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from segdiff_jax.fields import number
from segdiff_jax.models.attention import AttentionFn, plain
from segdiff_jax.models.layers import (
    Attention,
    Downsample,
    Dtype,
    GroupNorm,
    ResnetBlock,
    Upsample,
    conv,
)
from segdiff_jax.shapes import Latents, Pixels

_EPSILON = 1e-6


def _narrow_posterior(key: jax.Array, shape: tuple[int, ...], dtype: Dtype) -> jax.Array:
    """Initialise a bias: zero for the means, -6 for the log-variances.

    With unit variance, a new VAE would first have to learn latents that exceed its own noise.
    """
    return jnp.where(jnp.arange(shape[0]) < shape[0] // 2, 0.0, -6.0).astype(dtype)


@dataclass(frozen=True)
class VAEConfig:
    """The fields of diffusers' `vae/config.json` that change the network or its use."""

    in_channels: int = number(3, 1, 65536)  # channels of an image
    out_channels: int = number(3, 1, 65536)  # channels of a decoded image
    latent_channels: int = number(4, 1, 65536)  # c
    block_out_channels: tuple[int, ...] = number((128, 256, 512, 512), 1, 65536)  # per level
    layers_per_block: int = number(2, 1, 64)  # resnets per level; one more in the decoder
    norm_groups: int = number(32, 1, 65536)  # a divisor of all widths
    mid_attention: bool = True  # in the middle of encoder and decoder
    scaling_factor: float = number(0.18215, 1e-4, 1e4)  # latents the UNet sees = mean × this

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)


class SpatialAttention(nnx.Module):
    """Single-head self-attention over image positions, with its own norm and residual."""

    def __init__(self, channels: int, groups: int, **kw: Any):
        self.group_norm = GroupNorm(channels, groups, _EPSILON)
        self.attention = Attention(channels, 1, qkv_bias=True, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, H, W, C] -> [B, H, W, C]
        tokens = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        return x + self.attention(tokens).reshape(x.shape)


def _resnet(config: VAEConfig, channels_in: int, channels_out: int, **kw: Any) -> ResnetBlock:
    # With zero residual branches a new VAE is a linear map, which soon learns colours.
    norm: dict[str, Any] = {"groups": config.norm_groups, "epsilon": _EPSILON, "zero": True}
    return ResnetBlock(channels_in, channels_out, **norm, **kw)


class MidBlock(nnx.Module):
    """resnet → attention → resnet, at the lowest resolution."""

    def __init__(self, config: VAEConfig, channels: int, *, attention: AttentionFn, **kw: Any):
        self.resnets = nnx.List(_resnet(config, channels, channels, **kw) for _ in range(2))
        attend = functools.partial(SpatialAttention, channels, config.norm_groups, **kw)
        self.attention = attend(attention=attention) if config.mid_attention else None

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, H, W, C] -> [B, H, W, C]
        x = self.resnets[0](x)
        if self.attention is not None:
            x = self.attention(x)
        return self.resnets[1](x)


class Level(nnx.Module):
    """One resolution of the encoder ("down" to the next), or of the decoder ("up" to it)."""

    def __init__(self, config: VAEConfig, widths: list[int], resample: str | None, **kw: Any):
        pairs = zip(widths, widths[1:], strict=False)
        self.resnets = nnx.List(_resnet(config, *pair, **kw) for pair in pairs)
        down, up = resample == "down", resample == "up"
        self.downsample = Downsample(widths[-1], padding=(0, 1), **kw) if down else None
        self.upsample = Upsample(widths[-1], **kw) if up else None

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, H, W, C_in] -> [B, H', W', C]
        for resnet in self.resnets:
            x = resnet(x)
        for resample in (self.downsample, self.upsample):
            x = x if resample is None else resample(x)
        return x


def _levels(
    config: VAEConfig, widths: tuple[int, ...], resnets: int, resample: str, **kw: Any
) -> nnx.List:
    """Build a `Level` of `resnets` for each of `widths`; all but the last change the resolution."""
    before = (widths[0], *widths[:-1])
    changes = [resample] * (len(widths) - 1) + [None]
    return nnx.List(
        Level(config, [first] + [width] * resnets, change, **kw)
        for first, width, change in zip(before, widths, changes, strict=True)
    )


class Encoder(nnx.Module):
    """Pixels [B, H, W, 3] → moments [B, H/f, W/f, 2 · latent channels]."""

    def __init__(self, config: VAEConfig, *, attention: AttentionFn, **kw: Any):
        widths = config.block_out_channels
        self.conv_in = conv(config.in_channels, widths[0], **kw)
        self.down_blocks = _levels(config, widths, config.layers_per_block, "down", **kw)
        self.mid_block = MidBlock(config, widths[-1], attention=attention, **kw)
        self.conv_norm_out = GroupNorm(widths[-1], config.norm_groups, _EPSILON)
        self.conv_out = conv(widths[-1], 2 * config.latent_channels, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents [B, h, w, latent channels] → pixels [B, h · f, w · f, 3]."""

    def __init__(self, config: VAEConfig, *, attention: AttentionFn, **kw: Any):
        widths = config.block_out_channels[::-1]
        self.conv_in = conv(config.latent_channels, widths[0], **kw)
        self.mid_block = MidBlock(config, widths[0], attention=attention, **kw)
        self.up_blocks = _levels(config, widths, config.layers_per_block + 1, "up", **kw)
        self.conv_norm_out = GroupNorm(widths[-1], config.norm_groups, _EPSILON)
        self.conv_out = conv(widths[-1], config.out_channels, **kw)

    def __call__(self, z: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class VAE(nnx.Module):
    """Images in [-1, 1] ⇄ Gaussian posteriors over latents, f times smaller."""

    def __init__(
        self,
        config: VAEConfig,
        *,
        attention: AttentionFn = plain,
        dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        latent = config.latent_channels
        self.config, self.dtype = config, dtype
        self.encoder = Encoder(config, attention=attention, **kw)
        self.quant_conv = conv(2 * latent, 2 * latent, 1, bias_init=_narrow_posterior, **kw)
        self.post_quant_conv = conv(latent, latent, 1, **kw)
        self.decoder = Decoder(config, attention=attention, **kw)

    def encode(self, pixels: Pixels) -> tuple[Latents, Latents]:
        """Encode pixels [B, H, W, 3] in [-1, 1] to mean and log-variance, each [B, H/f, W/f, 4]."""
        moments = self.quant_conv(self.encoder(pixels)).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: Latents) -> Pixels:
        """Decode latents [B, h, w, 4], unscaled, to pixels [B, h·f, w·f, 3], about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)


def encode_latents(vae: VAE, pixels: Pixels) -> Latents:
    """Encode pixels to the latents that diffusion works on: posterior mean × scaling factor."""
    return vae.encode(pixels)[0] * vae.config.scaling_factor


def decode_latents(vae: VAE, latents: Latents) -> Pixels:
    """Invert `encode_latents`, up to reconstruction error."""
    return vae.decode(latents / vae.config.scaling_factor)
