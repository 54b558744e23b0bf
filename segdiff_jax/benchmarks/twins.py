"""Networks with random weights, and diffusers' networks with the same ones."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from segdiff_jax.diffusion.sampler import initial_noise, member_keys
from segdiff_jax.errors import UserError
from segdiff_jax.models.unet import UNet
from segdiff_jax.models.vae import VAE
from segdiff_jax.weights import hf_config, key_map

M = TypeVar("M", bound=nnx.Module)
_CORES = 2


@contextlib.contextmanager
def cores(small: bool) -> Iterator[None]:
    """Keep both sides on the same two cores; XLA looks which it may use when it starts.

    small: one thread for torch, and no more: on a busy machine its threads wait for each other.
    """
    if not small and not hasattr(os, "sched_setaffinity"):
        raise UserError("bench: only on Linux can a process choose its cores: try --small")
    allowed, threads = set() if small else os.sched_getaffinity(0), torch.get_num_threads()
    torch.set_num_threads(1 if small else min(_CORES, len(allowed)))
    if allowed:
        os.sched_setaffinity(0, sorted(allowed)[:_CORES])
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if allowed:
            os.sched_setaffinity(0, allowed)


def filled(make: Callable[[], M]) -> M:
    """Build a module whose products keep the scale of what they are given; norms and biases vary.

    numpy draws the weights: the initialisers would have to be compiled for every shape.
    """
    graph, shapes = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(0)

    def fill(path: Any, leaf: Any) -> jax.Array:
        values = rng.standard_normal(leaf.shape, np.float32)
        if leaf.ndim < 2:
            return jnp.asarray(0.1 * values + ("scale" in jax.tree_util.keystr(path)))
        inputs = 1 if "embed" in jax.tree_util.keystr(path) else np.prod(leaf.shape[:-1])
        values *= inputs**-0.5
        return jnp.asarray(values)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, shapes))


def of_unet(network: UNet) -> Any:
    """Return diffusers' UNet with copies of the weights of ours."""
    values = hf_config.write_unet(network.config)
    return _twin("unet", diffusers.UNet2DConditionModel, values, network)


def of_vae(network: VAE) -> Any:
    """Return diffusers' VAE with copies of the weights of ours."""
    values = hf_config.write_vae(network.config)
    return _twin("vae", diffusers.AutoencoderKL, values, network)


def _twin(component: str, kind: Any, values: dict[str, Any], network: nnx.Module) -> Any:
    with torch.device("meta"):  # without its own weights, which take memory and seconds
        module = kind.from_config(values)
    tensors = {}
    for keys, leaf in nnx.to_flat_state(nnx.state(network)):
        path = "/".join(map(str, keys))
        array = key_map.to_file(path, np.asarray(leaf[...], np.float32))
        copied = np.array(array, order="C")  # torch's optimiser writes into it
        tensors[key_map.tensor_name(component, path)] = torch.from_numpy(copied)
    module.load_state_dict(tensors, assign=True)
    return module.eval()


def to_torch(array: Any) -> torch.Tensor:
    """Move [B, H, W, C] to torch's device as [B, C, H, W]."""
    found = torch.from_numpy(np.array(np.asarray(array).transpose(0, 3, 1, 2), order="C"))
    return found.to(device())


def from_torch(tensor: torch.Tensor) -> np.ndarray:
    """Invert `to_torch`."""
    return tensor.float().cpu().numpy().transpose(0, 2, 3, 1)


def device() -> str:
    """Name the device that both sides use: NVIDIA's if JAX computes on one."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def noise(shape: tuple[int, ...], members: int) -> np.ndarray:
    """Return the noise [N, h, w, c] that the members of an ensemble start from with seed 0."""
    keys = member_keys(jax.random.key(0), members)
    return np.asarray(jax.vmap(lambda key: initial_noise(key, shape))(keys))


def jitted(function: Callable[..., Any], network: nnx.Module) -> Callable[..., np.ndarray]:
    """Compile `function(network, *arrays)`; the result takes arrays and gives one of numpy."""
    graph, state = nnx.split(network)
    compiled = jax.jit(lambda state, *arrays: function(nnx.merge(graph, state), *arrays))
    return lambda *arrays: np.asarray(compiled(state, *arrays))
