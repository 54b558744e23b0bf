"""What runs on the devices, compiled for shapes and never for a vocabulary or an image.

encode         photos [B, H, W, 3] → latents [B, h, w, c]
sampler_on     jobs (image, pass, member), each device's part by itself:
  sample_jobs    contexts, latents and members [J] → x_0 [J, h, w, c]
  gray_maps      → unclipped gray maps [J, H, W], through the VAE or another decoder
merge          members [I, P, N, H, W] → maps and their spread [I, P, H, W]
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from segdiff_jax import codec
from segdiff_jax.config import SamplerConfig
from segdiff_jax.diffusion import ensemble
from segdiff_jax.diffusion import sampler as samplers
from segdiff_jax.diffusion.schedule import Schedule
from segdiff_jax.models import linear_decoder
from segdiff_jax.models.vae import decode_latents, encode_latents
from segdiff_jax.parallel import mesh as meshes
from segdiff_jax.parallel import processes
from segdiff_jax.parallel.placement import equal_parts, rows_of_call, spread_rows


@functools.partial(jax.jit, static_argnums=0)
def encode(vae: nnx.GraphDef, params: Any, images: jax.Array) -> jax.Array:
    """Encode photos uint8 [B, H, W, 3] as latents [B, h, w, c]."""
    return encode_latents(nnx.merge(vae, params), codec.to_pixels(images))


@functools.partial(jax.jit, static_argnums=0)
def features(joint: nnx.GraphDef, params: Any, images: jax.Array) -> jax.Array:
    """See photos uint8 [B, H, W, 3] as a `JointDecoder` does: [B, H/2, W/2, 64]."""
    return nnx.merge(joint, params).features(codec.to_pixels(images))


@functools.partial(jax.jit, static_argnums=0)
def reconstruct(vae: nnx.GraphDef, params: Any, pixels: jax.Array) -> jax.Array:
    """Send pixels [B, H, W, 3] in [-1, 1] through the VAE and back."""
    network = nnx.merge(vae, params)
    return decode_latents(network, encode_latents(network, pixels))


class How(NamedTuple):
    """What the sampler is compiled for, but for shapes."""

    unet: nnx.GraphDef
    decoder: nnx.GraphDef | None  # as of `gray_maps`
    steps: int
    eta: float
    start: str  # as config.sampler.initial_noise


class Jobs(NamedTuple):
    """What differs between jobs, each a row of every array."""

    contexts: Any  # float [J, L, D]
    mask: Any  # bool [J, L], the tokens that count; None where all do
    latents: Any  # of the job's image, [J, h, w, c]
    members: Any  # the number of the job's member, int [J]


@functools.cache
def sampler_on(mesh: Mesh) -> Any:
    """Return `sample_jobs` under `jit`, for each device's part of the jobs; only arrays are traced.

    A job needs nothing from another: left to the partitioner, parameters that are cut up would be
    exchanged in every step.
    """
    rows = meshes.rows_sharding(mesh).spec

    def sample(how, *arrays):
        own_jobs, specs = functools.partial(sample_jobs, how), (P(), P(), P(), rows, P())
        spread = jax.shard_map(own_jobs, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
        return spread(*arrays)

    return jax.jit(sample, static_argnums=0)


def sample_jobs(
    how: How,
    unet_params: Any,
    decoder_params: Any,
    schedule: Schedule,
    jobs: Jobs,
    key: jax.Array,
) -> jax.Array:
    """Return the unclipped gray maps [J, H, W] of jobs."""
    network = nnx.merge(how.unet, unet_params)

    def member(k, image_latent, context, context_mask):
        def predict(noisy, t):
            sample = jnp.concatenate([image_latent, noisy], axis=-1)[None]
            used = None if context_mask is None else context_mask[None]
            return network(sample, jnp.reshape(t, (1,)), context[None], used)[0]

        # The noise of member k is the same for every image and pass.
        member_key = jax.random.fold_in(key, k)
        shape, settings = image_latent.shape, (how.steps, how.eta, how.start)
        return samplers.sample_member(predict, schedule, member_key, shape, *settings)

    in_axes = (0, 0, 0, None if jobs.mask is None else 0)
    x0 = jax.vmap(member, in_axes)(jobs.members, jobs.latents, jobs.contexts, jobs.mask)
    return gray_maps(how.decoder, decoder_params, x0)


def gray_maps(decoder: nnx.GraphDef | None, params: Any, latents: jax.Array) -> jax.Array:
    """Decode latents [J, h, w, c] to unclipped gray maps [J, H, W].

    decoder: a VAE or a TinyVAE; None: `params` are a `LinearDecoder`.
    """
    if decoder is None:
        return linear_decoder.decode(params, latents)
    network: Any = nnx.merge(decoder, params)
    unscaled = latents / network.config.scaling_factor
    # One after the other: at full size the decoder's activations are hundreds of times the latents.
    return jax.lax.map(lambda z: codec.to_gray(network.decode(z[None]))[0], unscaled)


def merge_members(
    members: jax.Array, align: str, reduce: str, uncertainty: str
) -> tuple[jax.Array, jax.Array]:
    """Merge unclipped members [R, N, H, W] to unclipped maps and their spread [R, H, W].

    Members are clipped before they are merged. Where the result is at an end of [-1, 1], it is then
    moved beyond it, by as much as the unclipped members are when they are merged.
    """
    unit = (members.clip(-1.0, 1.0) + 1.0) / 2.0  # the ensemble's maths is for maps in [0, 1]
    combine = lambda maps: ensemble.ensemble(maps, align, reduce, uncertainty)  # noqa: E731
    merged, spread = jax.vmap(combine)(unit)
    merged = merged * 2.0 - 1.0
    beyond, _ = jax.vmap(lambda maps: ensemble.merge(maps, reduce))(members)
    beyond = beyond - beyond.clip(-1.0, 1.0)
    ends = ((merged <= -1.0) & (beyond < 0.0)) | ((merged >= 1.0) & (beyond > 0.0))
    return jnp.where(ends, merged + beyond, merged), spread


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _merge_spread(members, mesh, align, reduce, uncertainty):
    # Not left to the partitioner: no map needs anything of another device's.
    merge = functools.partial(merge_members, align=align, reduce=reduce, uncertainty=uncertainty)
    rows = meshes.rows_sharding(mesh).spec
    return jax.shard_map(merge, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(members)


def merge(members: np.ndarray, sampler: SamplerConfig, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Merge members [I, P, N, H, W] to maps and spread [I, P, H, W], I × P spread over `mesh`."""
    if sampler.ensemble == 1:
        return members[:, :, 0], np.zeros_like(members[:, :, 0])
    images, passes, *rest = members.shape
    flat = members.reshape(images * passes, *rest)
    settings = sampler.align, sampler.reduce, sampler.uncertainty
    size = rows_of_call(len(flat), sampler.batch_size, mesh.size)
    found = [
        processes.gathered(_merge_spread(spread_rows(part, mesh), mesh, *settings))
        for part in equal_parts(flat, size)
    ]
    merged, spread = (
        np.concatenate(maps)[: len(flat)].reshape(images, passes, *rest[1:])
        for maps in zip(*found, strict=True)
    )
    return merged, spread


class NotFinite(Exception):
    """The map of pass number `pass_` of image number `image` holds NaN or infinity."""

    def __init__(self, image: int, pass_: int):
        self.image, self.pass_ = image, pass_


def check_finite(maps: np.ndarray, owners: np.ndarray) -> None:
    """Raise `NotFinite` for the first such map of [..., H, W].

    owners: the image and the pass of each, int [..., 2 or more].
    """
    bad = np.argwhere(~np.isfinite(maps).all((-2, -1)))
    if bad.size:
        raise NotFinite(*owners[tuple(bad[0])][:2].tolist())


def grid(images: int, passes: int, members: int) -> np.ndarray:
    """Return the jobs (image, pass, member) of all three, int [J, 3], members fastest."""
    return np.indices((images, passes, members)).reshape(3, -1).T
