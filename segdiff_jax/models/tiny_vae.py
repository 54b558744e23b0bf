"""A distilled autoencoder of a few plain convolutions (`AutoencoderTiny`, TAESD), channel-last.

It reads and writes the latents of the VAE that it was distilled from, at a small part of its cost.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from segdiff_jax.fields import number
from segdiff_jax.models.layers import Dtype, conv, upsample_nearest
from segdiff_jax.shapes import Latents, Pixels

# Functions have a place among the layers, as in the published files, whose keys count them.
Layer = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class TinyVAEConfig:
    """The fields of diffusers' `config.json` that change the network or its use."""

    in_channels: int = number(3, 1, 65536)  # channels of an image
    out_channels: int = number(3, 1, 65536)  # channels of a decoded image
    latent_channels: int = number(4, 1, 65536)  # of its own latents
    width: int = number(64, 1, 65536)  # channels of every layer between
    encoder_blocks: tuple[int, ...] = number((1, 3, 3, 3), 0, 64)  # per level, from pixels on
    decoder_blocks: tuple[int, ...] = number((3, 3, 3, 1), 0, 64)  # per level, from latents on
    scaling_factor: float = number(1.0, 1e-4, 1e4)  # latents the UNet sees = encoded × this

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.encoder_blocks) - 1)


class Block(nnx.Module):
    """conv → relu → conv → relu → conv, plus the skip, → relu."""

    def __init__(self, width: int, **kw: Any):
        self.conv = nnx.List(conv(width, width, **kw) for _ in range(3))

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, H, W, C] -> [B, H, W, C]
        h = jax.nn.relu(self.conv[0](x))
        h = jax.nn.relu(self.conv[1](h))
        return jax.nn.relu(self.conv[2](h) + x)


def _double(x: jax.Array) -> jax.Array:
    return upsample_nearest(x, (2 * x.shape[1], 2 * x.shape[2]))


def _encoder(config: TinyVAEConfig, **kw: Any) -> nnx.Sequential:
    width, down = config.width, kw | {"stride": 2, "padding": (1, 1), "use_bias": False}
    layers: list[Layer] = [conv(config.in_channels, width, **kw)]
    for level, blocks in enumerate(config.encoder_blocks):
        layers += [conv(width, width, **down)] if level else []
        layers += [Block(width, **kw) for _ in range(blocks)]
    return nnx.Sequential(*layers, conv(width, config.latent_channels, **kw))


def _decoder(config: TinyVAEConfig, **kw: Any) -> nnx.Sequential:
    width = config.width
    layers: list[Layer] = [conv(config.latent_channels, width, **kw), jax.nn.relu]
    for level, blocks in enumerate(config.decoder_blocks):
        layers += [_double, conv(width, width, use_bias=False, **kw)] if level else []
        layers += [Block(width, **kw) for _ in range(blocks)]
    return nnx.Sequential(*layers, conv(width, config.out_channels, **kw))


class TinyVAE(nnx.Module):
    """Images in [-1, 1] ⇄ latents, f times smaller; it has no posterior."""

    def __init__(self, config: TinyVAEConfig, *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.encoder = _encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = _decoder(config, dtype=dtype, rngs=rngs)

    def encode(self, pixels: Pixels) -> Latents:
        """Encode pixels [B, H, W, 3] in [-1, 1] to latents [B, ⌈H/f⌉, ⌈W/f⌉, 4], unscaled."""
        return self.encoder((pixels + 1.0) / 2.0).astype(jnp.float32)

    def decode(self, latents: Latents) -> Pixels:
        """Decode latents [B, h, w, 4], unscaled, to pixels [B, h·f, w·f, 3], about in [-1, 1]."""
        bounded = 3.0 * jnp.tanh(latents / 3.0)
        return self.decoder(bounded).astype(jnp.float32) * 2.0 - 1.0
