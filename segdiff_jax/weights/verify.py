"""Comparison of an exported folder in diffusers with the same folder here: `export --verify`."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
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
    read: dict[str, Any] = {"torch_dtype": torch.float32}
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **read)
    vae = diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae", **read)
    theirs: dict[str, Any] = {
        "unet": lambda x, t, context: unet(_nchw(x), torch.tensor(t), torch.tensor(context)).sample,
        "vae encoder": lambda x: vae.encode(_nchw(x)).latent_dist.mean,
        "vae decoder": lambda z: vae.decode(_nchw(z)).sample,
    }
    found = {}
    for name, ours, inputs in _cases(loaded.unet, loaded.vae, image_size):
        with torch.no_grad():
            expected = theirs[name](*inputs).numpy().transpose(0, 2, 3, 1)
        with jax.default_matmul_precision("highest"):
            output = np.asarray(ours(*map(jnp.asarray, inputs)))
        found[name] = float(np.abs(output - expected).max() / np.abs(expected).max())
    return found


def _cases(
    unet: UNet, vae: VAE, image_size: tuple[int, int]
) -> Iterator[tuple[str, Any, tuple[np.ndarray, ...]]]:
    """Return (name, our function, its inputs) of each network, channels last."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    height, width = (length // vae.config.downsampling for length in image_size)
    sample = normal(1, height, width, unet.config.in_channels)
    context = normal(1, _TOKENS, unet.config.cross_attention_dim)
    pixels = normal(1, *image_size, vae.config.in_channels).clip(-1, 1)
    latents = normal(1, height, width, vae.config.latent_channels)
    jit: Any = nnx.jit
    run, encode, decode = jit(UNet.__call__), jit(VAE.encode), jit(VAE.decode)
    yield "unet", lambda *x: run(unet, *x), (sample, np.array([500]), context)
    yield "vae encoder", lambda *x: encode(vae, *x)[0], (pixels,)
    yield "vae decoder", lambda *x: decode(vae, *x), (latents,)


def _nchw(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(array.transpose(0, 3, 1, 2).copy())
