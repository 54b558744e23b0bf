"""Files of decoders that take the place of the VAE's, in the folder of a model.

linear_decoder.safetensors            fitted when a training ends
joint_decoder.safetensors (joint/STEP/)  trained after it, where config.joint.steps is not 0
tiny_vae/ (of a workdir: pretrained/) an AutoencoderTiny of the same latent space, put there by hand
"""

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from flax import nnx

from segdiff_jax import files
from segdiff_jax.errors import UserError
from segdiff_jax.models.joint_decoder import JointDecoder
from segdiff_jax.models.layers import Dtype
from segdiff_jax.models.linear_decoder import LinearDecoder
from segdiff_jax.models.tiny_vae import TinyVAE
from segdiff_jax.models.vae import VAEConfig
from segdiff_jax.weights import pretrained, safetensors_files, tensors

LINEAR, TINY, JOINT = "linear_decoder.safetensors", "tiny_vae", "joint_decoder.safetensors"


class Decoders(NamedTuple):
    """What a model has beside its VAE's decoder: None for what it lacks."""

    linear: LinearDecoder | None = None
    tiny: TinyVAE | None = None
    joint: JointDecoder | None = None


def nearest(wanted: str, decoders: Decoders) -> str:
    """Return the name of the decoder `wanted`, or of what comes nearest to it.

    The linear decoder is fitted when a training ends, and the joint one trained on its maps: a
    checkpoint from before has none of its own.
    """
    if wanted == "joint" and (decoders.joint is None or decoders.linear is None):
        wanted = "linear"
    if wanted == "linear" and decoders.linear is None:
        wanted = "vae"
    return wanted


def _found(folder: os.PathLike[str] | str, name: str) -> epath.Path | None:
    path = epath.Path(folder) / name
    with files.reading(path):
        return path if path.exists() else None


def linear_to_bytes(decoder: LinearDecoder) -> bytes:
    """Serialise the contents of `linear_decoder.safetensors`."""
    return safetensors.numpy.save({k: np.asarray(v) for k, v in decoder._asdict().items()})


def read_linear(folder: os.PathLike[str] | str, vae: VAEConfig) -> LinearDecoder | None:
    """Read the linear decoder in the folder of a model; None if there is none.

    Raises `UserError` for a damaged file, and for one that was not fitted to such a VAE.
    """
    if (path := _found(folder, LINEAR)) is None:
        return None
    pixels = vae.downsampling**2
    expected = {"kernel": (3, 3, vae.latent_channels, pixels), "bias": (pixels,)}
    return LinearDecoder(**_arrays(path, expected, "fitted to this VAE"))


def joint_to_bytes(params: nnx.State, dtype: str = "float32") -> bytes:
    """Serialise the contents of `joint_decoder.safetensors`: the state of a `JointDecoder`.

    dtype: of the stored weights. Raises `UserError` as `safetensors_files.write` does.
    """
    arrays = {_name(key): np.asarray(leaf[...]) for key, leaf in nnx.to_flat_state(params)}
    stored = {n: safetensors_files.as_stored(a, dtype, f"{JOINT}: {n}") for n, a in arrays.items()}
    return safetensors.numpy.save(stored)


def read_joint(
    folder: os.PathLike[str] | str, text_width: int, dtype: Dtype = jnp.float32
) -> JointDecoder | None:
    """Read the joint decoder in the folder of a model; None if there is none.

    Raises `UserError` for a damaged file, and for one that reads text of another width.
    """
    if (path := _found(folder, JOINT)) is None:
        return None
    make = functools.partial(JointDecoder, text_width, dtype=dtype)
    graph, state = nnx.split(tensors.shapes_of(make))
    leaves = list(nnx.to_flat_state(state))
    shapes = {_name(key): leaf.shape for key, leaf in leaves}
    arrays = _arrays(path, shapes, "trained for this text encoder")
    filled = [(key, leaf.replace(arrays[_name(key)].astype(leaf.dtype))) for key, leaf in leaves]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _name(key: tuple[Any, ...]) -> str:
    return ".".join(map(str, key))


def _arrays(
    path: epath.Path, expected: dict[str, tuple[int, ...]], made: str
) -> dict[str, jax.Array]:
    """Read arrays of these names and shapes from a file, or raise `UserError`."""
    with safetensors_files.opened([path]) as (file,):
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if {name: array.shape for name, array in arrays.items()} != expected:
        raise UserError(f"{path}: was not {made}: delete it and run the training again")
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def read_tiny(
    folder: os.PathLike[str] | str, vae: VAEConfig, dtype: Dtype = jnp.float32
) -> TinyVAE | None:
    """Read the tiny autoencoder in a Stable Diffusion folder; None if there is none.

    Raises `UserError` as `pretrained.load` does, and for one with another latent space's shape.
    """
    if (path := _found(folder, TINY)) is None:
        return None
    tiny = pretrained.load(folder, (TINY,), dtype=dtype).tiny_vae
    assert tiny is not None
    shape = tiny.config.latent_channels, tiny.config.downsampling
    if shape != (vae.latent_channels, vae.downsampling):
        raise UserError(
            f"{path}: has latents of {shape[0]} channels at 1/{shape[1]} of the size, the VAE "
            f"{vae.latent_channels} at 1/{vae.downsampling}: use one that was made for this VAE"
        )
    return tiny
