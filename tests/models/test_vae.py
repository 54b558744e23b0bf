"""The VAE against diffusers, on random weights that diffusers wrote."""

import jax.numpy as jnp
import pytest
import torch
from torch_oracles import from_torch, normal, relative_error, run, to_torch, vae, write

from segdiff_jax.models.vae import VAE, decode_latents, encode_latents
from segdiff_jax.weights import pretrained

_GRAY = {"in_channels": 1, "out_channels": 2}
# name, widths, layers, groups, latent channels, attention in the middle, pixels, rest
_CASES: list[tuple] = [
    ("sd", (8, 16, 16), 2, 4, 4, True, (2, 16, 24), {}),
    ("odd_channels_three_layers", (9, 15), 3, 3, 5, True, (1, 10, 14), {}),
    ("no_attention_wide_latent", (8, 12), 1, 2, 16, False, (3, 8, 8), {"scaling_factor": 0.5}),
    ("one_level", (6,), 1, 6, 4, True, (1, 7, 5), _GRAY),
    ("one_pixel_wide", (4,), 1, 2, 4, True, (1, 6, 1), {}),
    ("narrowing", (12, 8), 1, 4, 4, True, (1, 8, 6), {}),
    ("eleven_channels", (11,), 1, 11, 7, True, (2, 5, 4), {}),
    ("four_levels", (2, 4, 4, 6), 1, 2, 4, False, (1, 16, 8), {}),
]
_NAMES = "layers_per_block", "norm_num_groups", "latent_channels", "mid_block_add_attention"
CASES = {  # name: (widths, options of diffusers, pixels [B, H, W])
    name: (widths, dict(zip(_NAMES, values, strict=True)) | rest, size)
    for name, widths, *values, size, rest in _CASES
}


def _moments(oracle, pixels):
    with torch.no_grad():
        posterior = oracle.encode(to_torch(pixels)).latent_dist
    return from_torch(posterior.mean), from_torch(posterior.logvar)


def _decoded(oracle, latents):
    with torch.no_grad():
        return from_torch(oracle.decode(to_torch(latents)).sample)


@pytest.mark.parametrize("name", CASES)
def test_equals_diffusers(name, tmp_path):
    widths, options, size = CASES[name]
    oracle = vae(widths, **options)
    ours = pretrained.load(write(tmp_path, vae=oracle), ("vae",)).vae
    pixels = normal(*size, oracle.config.in_channels)
    mean, logvar = run(VAE.encode, ours, pixels)
    expected_mean, expected_logvar = _moments(oracle, pixels)
    latents = normal(*expected_mean.shape, seed=1)
    decoded = run(VAE.decode, ours, latents)
    errors = (
        relative_error(mean, expected_mean),
        relative_error(logvar, expected_logvar),
        relative_error(decoded, _decoded(oracle, latents)),
    )
    print(f"{name}: mean, logvar, decoded", *(f"{error:.1e}" for error in errors))
    assert max(errors) <= 1e-4


def test_bfloat16_and_scaling_factor(tmp_path):
    widths, options, size = CASES["no_attention_wide_latent"]
    oracle = vae(widths, **options)
    ours = pretrained.load(write(tmp_path, vae=oracle), ("vae",), dtype=jnp.bfloat16).vae
    pixels = normal(*size, 3)
    latents = run(encode_latents, ours, pixels)
    expected = _moments(oracle, pixels)[0] * 0.5
    assert latents.dtype == jnp.float32
    assert relative_error(latents, expected) <= 2e-2
    decoded = run(decode_latents, ours, expected)
    assert relative_error(decoded, _decoded(oracle, expected / 0.5)) <= 2e-2
