"""Suite `cpu`: Stable Diffusion 2's networks on two cores in float32, against diffusers."""

import functools
from collections.abc import Iterator

import numpy as np
import torch
from flax import nnx

from segdiff_jax.benchmarks import steps, twins
from segdiff_jax.benchmarks.timing import Result, side_by_side
from segdiff_jax.models.unet import UNet, UNetConfig
from segdiff_jax.models.vae import VAE, VAEConfig
from segdiff_jax.parallel import attention_kernels

_TOKENS = 77
_compared = functools.partial(side_by_side, tolerance=1e-3, aim=1.0)
NARROW = UNetConfig(
    block_out_channels=(16, 32),
    cross_attention=(True, False),
    heads=(1, 2),
    layers_per_block=1,
    norm_groups=8,
    cross_attention_dim=32,
)
NARROW_VAE = VAEConfig(block_out_channels=(8, 8, 8, 16), layers_per_block=1, norm_groups=4)
# A quarter of Stable Diffusion 2's widths; 32 groups would not divide them.
_QUARTER = UNetConfig(block_out_channels=(80, 160, 320, 320), heads=(1, 2, 5, 5), norm_groups=16)


def run(small: bool) -> Iterator[Result]:
    """Time a UNet, a VAE both ways, a training step. Takes 10 GB of memory at full size."""
    size, rounds = (8, 2) if small else (48, 5)
    with twins.cores(small), torch.no_grad():
        yield from _unet(NARROW if small else UNetConfig(), size, rounds)
        yield from _vae(NARROW_VAE if small else VAEConfig(), 8 * size, rounds)
    with twins.cores(small):
        pair = steps.pair(NARROW if small else _QUARTER, size, 2, "float32", rounds)
        yield _compared("training step, quarter width, batch 2", *pair, rounds)


def _unet(config: UNetConfig, size: int, rounds: int) -> Iterator[Result]:
    attention = attention_kernels.on_device("cpu")
    network = twins.filled(lambda: UNet(config, attention=attention, rngs=nnx.Rngs(0)))
    twin, forward = twins.of_unet(network), twins.jitted(UNet.__call__, network)
    for batch in (1, 4):
        sample = twins.normal(batch, size, size, config.in_channels)
        context = twins.normal(batch, _TOKENS, config.cross_attention_dim, seed=1)
        timesteps = np.linspace(1, 999, batch).astype(np.int32)
        theirs = twins.to_torch(sample), torch.from_numpy(timesteps), torch.from_numpy(context)
        yield _compared(
            f"UNet, {size} × {size}, batch {batch}",
            functools.partial(forward, sample, timesteps, context),
            lambda inputs=theirs: twins.from_torch(twin(*inputs).sample),  # type: ignore[misc]
            rounds,
        )


def _vae(config: VAEConfig, size: int, rounds: int) -> Iterator[Result]:
    network = twins.filled(lambda: VAE(config, rngs=nnx.Rngs(0)))
    twin = twins.of_vae(network)
    pixels = twins.normal(1, size, size, 3)
    latents = twins.normal(1, size // 8, size // 8, config.latent_channels)
    encode = twins.jitted(lambda vae, x: vae.encode(x)[0], network)
    decode = twins.jitted(VAE.decode, network)
    images, codes = twins.to_torch(pixels), twins.to_torch(latents)
    encoded = lambda: twins.from_torch(twin.encode(images).latent_dist.mean)  # noqa: E731
    decoded = lambda: twins.from_torch(twin.decode(codes).sample)  # noqa: E731
    yield _compared(f"VAE encode, {size} × {size}", lambda: encode(pixels), encoded, rounds)
    yield _compared(f"VAE decode, {size} × {size}", lambda: decode(latents), decoded, rounds)
