"""The VAE of Stable Diffusion (`AutoencoderKL`), channel-last."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from segdiff_jax.fields import number
from segdiff_jax.models.layers import (
    Attention,
    Downsample,
    Dtype,
    GroupNorm,
    ResnetBlock,
    Upsample,
    conv,
)

_EPSILON = 1e-6


def _narrow_posterior(key: jax.Array, shape: tuple[int, ...], dtype: Dtype) -> jax.Array:
    """Zero for the means, -6 for the log-variances.

    A new VAE that starts at unit variance first has to learn to whisper louder than its own noise.
    """
    return jnp.where(jnp.arange(shape[0]) < shape[0] // 2, 0.0, -6.0).astype(dtype)


@dataclass(frozen=True)
class VAEConfig:
    """The fields of diffusers' `vae/config.json` that change the network or its use."""

    in_channels: int = number(3, 1, 65536)
    out_channels: int = number(3, 1, 65536)
    latent_channels: int = number(4, 1, 65536)
    block_out_channels: tuple[int, ...] = number((128, 256, 512, 512), 1, 65536)
    layers_per_block: int = number(2, 1, 64)
    norm_groups: int = number(32, 1, 65536)
    mid_attention: bool = True
    # Latents that the UNet sees = posterior mean × this.
    scaling_factor: float = number(0.18215, 1e-4, 1e4)

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)


class SpatialAttention(nnx.Module):
    """Single-head self-attention over image positions, with its own norm and residual."""

    def __init__(self, channels: int, groups: int, *, dtype: Dtype, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(channels, groups, _EPSILON, dtype=dtype)
        self.attention = Attention(channels, 1, qkv_bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        return (x + self.attention(tokens, self.group_norm).reshape(x.shape)).astype(x.dtype)


class MidBlock(nnx.Module):
    def __init__(self, channels: int, config: VAEConfig, *, dtype: Dtype, rngs: nnx.Rngs):
        kw: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        # A new VAE starts as a linear map, which learns colours first and fast.
        norm: dict[str, Any] = {"groups": config.norm_groups, "epsilon": _EPSILON, "zero": True}
        self.resnets = nnx.List(ResnetBlock(channels, channels, **norm, **kw) for _ in range(2))
        attend = config.mid_attention
        self.attention = SpatialAttention(channels, config.norm_groups, **kw) if attend else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.resnets[0](x)
        if self.attention is not None:
            x = self.attention(x)
        return self.resnets[1](x)


class Level(nnx.Module):
    """One resolution of the encoder or decoder."""

    def __init__(
        self,
        config: VAEConfig,
        widths_in: list[int],
        channels: int,
        *,
        resample: str | None,
        dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        # A new VAE starts as a linear map, which learns colours first and fast.
        norm: dict[str, Any] = {"groups": config.norm_groups, "epsilon": _EPSILON, "zero": True}
        self.resnets = nnx.List(ResnetBlock(w, channels, **norm, **kw) for w in widths_in)
        down, up = resample == "down", resample == "up"
        self.downsample = Downsample(channels, padding=(0, 1), **kw) if down else None
        self.upsample = Upsample(channels, **kw) if up else None

    def __call__(self, x: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x = resnet(x)
        if self.downsample is not None:
            x = self.downsample(x)
        return x if self.upsample is None else self.upsample(x)


class Encoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, dtype: Dtype, rngs: nnx.Rngs):
        kw: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        widths, last = config.block_out_channels, len(config.block_out_channels) - 1
        self.conv_in = conv(config.in_channels, widths[0], **kw)
        self.down_blocks = nnx.List(
            Level(
                config,
                [widths[max(i - 1, 0)]] + [width] * (config.layers_per_block - 1),
                width,
                resample="down" if i < last else None,
                **kw,
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], config, **kw)
        self.conv_norm_out = GroupNorm(widths[-1], config.norm_groups, _EPSILON, dtype=dtype)
        self.conv_out = conv(widths[-1], 2 * config.latent_channels, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, dtype: Dtype, rngs: nnx.Rngs):
        kw: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        widths = config.block_out_channels[::-1]
        self.conv_in = conv(config.latent_channels, widths[0], **kw)
        self.mid_block = MidBlock(widths[0], config, **kw)
        self.up_blocks = nnx.List(
            Level(
                config,
                [widths[max(i - 1, 0)]] + [width] * config.layers_per_block,
                width,
                resample="up" if i < len(widths) - 1 else None,
                **kw,
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = GroupNorm(widths[-1], config.norm_groups, _EPSILON, dtype=dtype)
        self.conv_out = conv(widths[-1], config.out_channels, **kw)

    def __call__(self, z: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class VAE(nnx.Module):
    """Images in [-1, 1] ⇄ Gaussian posteriors over latents, f times smaller."""

    def __init__(self, config: VAEConfig, *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs):
        kw: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        latent = config.latent_channels
        self.config, self.dtype = config, dtype
        self.encoder = Encoder(config, **kw)
        self.quant_conv = conv(2 * latent, 2 * latent, 1, bias_init=_narrow_posterior, **kw)
        self.post_quant_conv = conv(latent, latent, 1, **kw)
        self.decoder = Decoder(config, **kw)

    def encode(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """pixels [B, H, W, 3] in [-1, 1] → mean and log-variance, each [B, H/f, W/f, 4]."""
        moments = self.quant_conv(self.encoder(pixels.astype(self.dtype))).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: jax.Array) -> jax.Array:
        """latents [B, h, w, 4], unscaled → pixels [B, h·f, w·f, 3], nominally in [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents.astype(self.dtype))).astype(jnp.float32)


def encode_latents(vae: VAE, pixels: jax.Array) -> jax.Array:
    """Posterior mean × scaling factor: the latents that diffusion works on."""
    return vae.encode(pixels)[0] * vae.config.scaling_factor


def decode_latents(vae: VAE, latents: jax.Array) -> jax.Array:
    """The inverse of `encode_latents`, up to reconstruction error."""
    return vae.decode(latents / vae.config.scaling_factor)
