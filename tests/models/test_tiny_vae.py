"""The tiny autoencoder against diffusers, on random weights and on real ones where they are."""

from pathlib import Path

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch_oracles import from_torch, normal, relative_error, run, tiny_vae, to_torch, write

from segdiff_jax.errors import UserError
from segdiff_jax.models.tiny_vae import TinyVAE
from segdiff_jax.weights import pretrained
from segdiff_jax.weights.pretrained import Pretrained

# name: (width, blocks of each level, diffusers options, pixels [B, H, W])
CASES = {
    "published": (8, (1, 3, 3, 3), {}, (2, 16, 24)),
    "odd_sizes_wide_latent": (5, (2, 1), {"latent_channels": 7}, (1, 7, 9)),
    "one_level_no_blocks": (4, (0,), {"latent_channels": 1}, (3, 5, 4)),
}
# Real weights and photos are not ours to redistribute: they may lie in a folder above the checkout.
SHARED = next((p / "shared" for p in Path(__file__).parents if (p / "shared/taesd").is_dir()), None)


def _load(oracle, folder, **options):
    return pretrained.load(write(folder, tiny_vae=oracle), ("tiny_vae",), **options).tiny_vae


def _errors(ours, oracle, pixels, seed=1):
    with torch.no_grad():
        expected = from_torch(oracle.encode(to_torch(pixels)).latents)
        latents = 2 * normal(*expected.shape, seed=seed)
        decoded = from_torch(oracle.decode(to_torch(latents)).sample)
    return (
        relative_error(run(TinyVAE.encode, ours, pixels), expected),
        relative_error(run(TinyVAE.decode, ours, latents), decoded),
    )


@pytest.mark.parametrize("name", CASES)
def test_equals_diffusers(name, tmp_path):
    width, blocks, options, size = CASES[name]
    oracle = tiny_vae(width, blocks, **options)
    pixels = normal(*size, oracle.config.in_channels)
    errors = _errors(_load(oracle, tmp_path / "float32"), oracle, pixels)
    print(f"{name}: encoded, decoded", *(f"{error:.1e}" for error in errors))
    assert max(errors) <= 1e-4


def test_bfloat16_gives_float32(tmp_path):
    width, blocks, options, size = CASES["published"]
    oracle = tiny_vae(width, blocks, **options)
    ours = _load(oracle, tmp_path, dtype=jnp.bfloat16)
    assert max(_errors(ours, oracle, normal(*size, 3))) <= 3e-2
    assert run(TinyVAE.encode, ours, normal(*size, 3)).dtype == jnp.float32


def test_diffusers_reads_what_we_write(tmp_path):
    width, blocks, options, size = CASES["published"]
    ours = _load(tiny_vae(width, blocks, scaling_factor=0.5, **options), tmp_path / "theirs")
    pretrained.save(Pretrained(tiny_vae=ours), tmp_path / "ours")
    theirs = diffusers.AutoencoderTiny.from_pretrained(tmp_path / "ours" / "tiny_vae")
    assert theirs.config.scaling_factor == 0.5
    assert max(_errors(ours, theirs, normal(*size, 3))) <= 1e-4


@pytest.mark.parametrize(("option", "value"), [("act_fn", "gelu"), ("upsample_fn", "bilinear")])
def test_another_kind_of_network_is_refused(option, value, tmp_path):
    with pytest.raises(UserError, match=f"{option}='{value}' is not supported"):
        _load(tiny_vae(4, (1, 1), **{option: value}), tmp_path)


@pytest.mark.skipif(SHARED is None, reason="no real weights: shared/taesd is in no folder above")
def test_real_weights_give_photos_back(tmp_path):
    oracle = diffusers.AutoencoderTiny().eval()
    halves = {"encoder": 0, "decoder": -1}  # the decoder's first layer there clamps its input
    tensors = {}
    for half, shift in halves.items():
        for name, tensor in load_file(SHARED / f"taesd/taesd_{half}.safetensors").items():
            layer, rest = name.split(".", 1)
            tensors[f"{half}.layers.{int(layer) + shift}.{rest}"] = tensor.float()
    oracle.load_state_dict(tensors)
    ours = _load(oracle, tmp_path)
    size = (192, 256)
    paths = sorted((SHARED / "camvid/val/images").glob("*"))[::40]
    photos = [Image.open(path).convert("RGB").resize(size[::-1]) for path in paths]
    if not photos:
        pytest.skip(f"no photos in {SHARED}/camvid/val")
    pixels = np.stack([np.asarray(p, np.float32) for p in photos]) / 127.5 - 1.0
    errors = _errors(ours, oracle, pixels[:1])
    back = np.clip(run(lambda m, x: m.decode(m.encode(x)), ours, pixels), -1.0, 1.0)
    ratio = 10 * np.log10(4.0 / np.square(back - pixels).mean((1, 2, 3)))
    print(f"real: {ratio.mean():.1f} dB, least {ratio.min():.1f}; parity", errors)
    assert max(errors) <= 1e-4
    assert ratio.mean() >= 22.0
