"""Comparison of an exported folder in diffusers with the same folder here: `export --verify`."""

from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from flax import nnx

from segdiff_jax.errors import UserError
from segdiff_jax.models.unet import UNet
from segdiff_jax.models.vae import VAE
from segdiff_jax.weights import pretrained

TOLERANCE = 1e-3  # in float32, of the largest output; a tensor in the wrong place gives about 1
_TOKENS = 77


def check_libraries() -> None:
    """Raise `UserError` unless what `differences` needs is installed."""
    missing = [name for name in ("torch", "diffusers") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"--verify: {' and '.join(missing)} not installed: pip install {' '.join(missing)}, "
            "or leave --verify out"
        )


def differences(folder: str, image_size: tuple[int, int]) -> dict[str, float]:
    """Return the largest difference of each network's outputs, as a share of its largest output.

    diffusers and this package both read `folder` and compute in float32, on random input for an
    image of `image_size` (height, width).
    """
    import diffusers
    import torch

    loaded = pretrained.load(folder, ("unet", "vae"))
    assert loaded.unet and loaded.vae
    unet, vae = loaded.unet, loaded.vae
    read: dict[str, Any] = {"torch_dtype": torch.float32}
    torch_unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **read)
    torch_vae = diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae", **read)

    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal((1, *shape), np.float32)  # noqa: E731
    size = tuple(length // vae.config.downsampling for length in image_size)
    sample = normal(*size, unet.config.in_channels)
    step = np.array([500])
    context = normal(_TOKENS, unet.config.cross_attention_dim)
    pixels = normal(*image_size, vae.config.in_channels).clip(-1, 1)
    latents = normal(*size, vae.config.latent_channels)

    with torch.no_grad():
        to_torch = lambda x: torch.from_numpy(x.transpose(0, 3, 1, 2).copy())  # noqa: E731
        steps, text = torch.tensor(step), torch.tensor(context)
        theirs = {
            "unet": torch_unet(to_torch(sample), steps, text).sample,
            "vae encoder": torch_vae.encode(to_torch(pixels)).latent_dist.mean,
            "vae decoder": torch_vae.decode(to_torch(latents)).sample,
        }
    jit: Any = nnx.jit
    with jax.default_matmul_precision("highest"):
        ours = {
            "unet": jit(UNet.__call__)(unet, sample, step, context),
            "vae encoder": jit(VAE.encode)(vae, pixels)[0],
            "vae decoder": jit(VAE.decode)(vae, latents),
        }
    found = {}
    for name, tensor in theirs.items():
        expected = tensor.numpy().transpose(0, 2, 3, 1)
        found[name] = float(np.abs(ours[name] - expected).max() / np.abs(expected).max())
    return found
