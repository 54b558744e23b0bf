"""The Python API: an image and class names in, labels and scores out."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from segdiff_jax import codec, conditioning, workdir
from segdiff_jax.config import Config, MeshConfig, SamplerConfig
from segdiff_jax.data import transforms, vocabulary
from segdiff_jax.data.vocabulary import ClassEntry
from segdiff_jax.diffusion import ensemble as ensemble_lib
from segdiff_jax.diffusion import sampler as sampler_lib
from segdiff_jax.diffusion.schedule import Schedule, make_schedule
from segdiff_jax.errors import UserError
from segdiff_jax.models.attention import plain
from segdiff_jax.models.clip_text import CLIPText
from segdiff_jax.models.layers import kernels_as_multiplied
from segdiff_jax.models.tokenizer import Tokenizer
from segdiff_jax.models.unet import UNet
from segdiff_jax.models.vae import VAE, decode_latents, encode_latents
from segdiff_jax.segmentation import Segmentation, from_maps
from segdiff_jax.training import attention_kernels, processes, sharding
from segdiff_jax.training.losses import to_pixels
from segdiff_jax.training.placement import equal_parts, multiple, on_mesh, spread_rows


class Segmenter:
    """A trained model, ready to segment. Make one with `load`.

    mesh: devices that share the work, all of them by default: every pass of every image and member
    runs on one. What a map shows does not depend on how many there are. With several processes,
    all make the same calls and get the same results.
    """

    def __init__(
        self,
        unet: UNet,
        vae: VAE,
        text_encoder: CLIPText,
        tokenizer: Tokenizer,
        config: Config,
        mesh: Mesh | None = None,
    ):
        self.config, self.tokenizer, self.text_encoder = config, tokenizer, text_encoder
        self.mesh = mesh or sharding.make_mesh(MeshConfig())
        # Each device works by itself (`sampler_on`), whatever mesh the networks were trained on.
        attention = attention_kernels.on_device(self.mesh.devices.flat[0].platform)
        self._unet, unet_params = nnx.split(attention_kernels.with_attention(unet, attention))
        self._vae, vae_params = nnx.split(attention_kernels.with_attention(vae, plain))
        self._unet_params = self._for_sampling(unet_params)
        self._vae_params = on_mesh(vae_params, self.mesh)
        self._schedule = on_mesh(make_schedule(config.diffusion), self.mesh)
        self._tables: dict[tuple[ClassEntry, ...], conditioning.PromptTable] = {}

    @staticmethod
    def load(checkpoint: str) -> "Segmenter":
        """From a training workdir or an exported folder, local or `gs://`.

        Raises `UserError` if `checkpoint` is neither, or holds another architecture.
        """
        return Segmenter(*workdir.load_networks(checkpoint))

    def with_params(self, unet_params: Any) -> "Segmenter":
        """The same model with other UNet parameters: compiled functions are shared.

        They may be cut up, as those of a training state are: all processes gather them.
        """
        other = object.__new__(Segmenter)
        other.__dict__.update(self.__dict__)
        other._unet_params = self._for_sampling(unet_params)
        return other

    def _for_sampling(self, unet_params: Any) -> Any:
        # Not the VAE's: a tenth of the size, and training has the same arrays in use. Rounded
        # before they are gathered: half of the bytes to send and to hold.
        rounded = kernels_as_multiplied(self._unet, unet_params)
        return sharding.for_use(on_mesh(rounded, self.mesh), self.mesh)

    def __call__(
        self,
        image: np.ndarray,
        classes: Sequence[str | ClassEntry],
        *,
        steps: int | None = None,
        ensemble: int | None = None,
        seed: int = 0,
        threshold: float | None = None,
        closed: bool | None = None,
        shortlist: int | None = None,
    ) -> Segmentation:
        """Segments `image` uint8 [H, W, 3] into `classes` ("building, edifice" names synonyms).

        Arguments left at None take the config's value. The result depends on `seed` and on
        nothing else that is random. Raises `UserError` for no or duplicate classes.
        """
        entries = _entries(classes)
        given = {"steps": steps, "ensemble": ensemble, "shortlist": shortlist}
        changes: dict[str, Any] = {name: v for name, v in given.items() if v is not None}
        sampler = dataclasses.replace(self.config.sampler, **changes)
        gray, spread = self.maps([image], entries, sampler, seed)
        chosen = self.config.codec
        return self.segmentation(
            gray[0],
            spread[0] if sampler.ensemble > 1 else None,
            entries,
            image.shape[:2],
            chosen.threshold if threshold is None else threshold,
            chosen.closed if closed is None else closed,
        )

    def segmentation(
        self,
        gray: np.ndarray,
        spread: np.ndarray | None,
        classes: Sequence[ClassEntry],
        size: tuple[int, int],
        threshold: float,
        closed: bool,
    ) -> Segmentation:
        """What the maps [P, h, w] of one image say at `size` = (H, W): `from_maps`."""
        group = codec.group_size(len(classes), self.config.codec.classes_per_pass)
        names = tuple(entry.name for entry in classes)
        return from_maps(gray, spread, names, group, size, threshold, closed)

    def reconstruct(self, pixels: np.ndarray) -> np.ndarray:
        """Images [J, H, W, 3] in [-1, 1] at the network's size, through the VAE and back."""
        found = _reconstruct(self._vae, self._vae_params, spread_rows(pixels, self.mesh))
        return processes.gathered(found)[: len(pixels)]

    def maps(
        self,
        images: Sequence[np.ndarray],
        classes: Sequence[ClassEntry],
        sampler: SamplerConfig,
        seed: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gray maps in [-1, 1] and their spread, each [I, P, H, W] at the network's size.

        P = ⌈K/G⌉ passes. All images × passes × members run in equal chunks of
        `sampler.batch_size`, or the next multiple of the devices; each image is encoded once.
        """
        size = self.config.data.image_size
        fitted = np.stack([transforms.resize_image(image, size) for image in images])
        encoded = _encode(self._vae, self._vae_params, spread_rows(fitted, self.mesh))
        image_latents = processes.gathered(encoded)[: len(images)]
        table = self.table(classes)
        group = codec.group_size(len(classes), self.config.codec.classes_per_pass)
        groups = codec.groups(len(classes), group)
        if sampler.shortlist and group > 1:
            raise UserError(
                f"a shortlist (sampler.shortlist={sampler.shortlist}) needs one class per pass, "
                f"but this model paints {group} classes: set it to 0"
            )
        if 0 < sampler.shortlist < len(classes):
            return self._shortlisted(image_latents, table, groups, sampler, seed)
        jobs = _grid(len(images), len(groups), sampler.ensemble)
        members = self._run(image_latents, table, groups, jobs, sampler, seed)
        members = members.reshape(len(images), len(groups), sampler.ensemble, *size)
        return _merge(members, sampler, self.mesh)

    def table(self, classes: Sequence[ClassEntry]) -> conditioning.PromptTable:
        """Prompt embeddings, encoded the first time a vocabulary is seen."""
        key = tuple(classes)
        if key not in self._tables:
            templates = self.config.prompts.templates
            table = conditioning.encode_prompts(self.text_encoder, self.tokenizer, key, templates)
            self._tables[key] = on_mesh(table, self.mesh)
        return self._tables[key]

    def _shortlisted(self, image_latents, table, groups, sampler, seed):
        """One cheap pass for every class, the full budget for the M most present per image."""
        count, size = len(image_latents), self.config.data.image_size
        cheap = dataclasses.replace(sampler, steps=1, ensemble=1)
        jobs = _grid(count, len(groups), 1)
        first = self._run(image_latents, table, groups, jobs, cheap, seed)
        first = first.reshape(count, len(groups), *size)
        presence = np.maximum(first, 0.0).mean((2, 3))  # [I, K]: area that is more yes than no
        kept = np.sort(np.argsort(-presence, axis=1)[:, : sampler.shortlist], axis=1)
        jobs = np.array(
            [(i, p, m) for i in range(count) for p in kept[i] for m in range(sampler.ensemble)]
        )
        members = self._run(image_latents, table, groups, jobs, sampler, seed)
        members = members.reshape(*kept.shape, sampler.ensemble, *size)
        merged, spread = _merge(members, sampler, self.mesh)
        gray, all_spread = np.full_like(first, -1.0), np.zeros_like(first)
        for i in range(count):
            gray[i, kept[i]], all_spread[i, kept[i]] = merged[i], spread[i]
        return gray, all_spread

    def _run(self, image_latents, table, groups, jobs, sampler, seed) -> np.ndarray:
        """Gray maps [J, H, W] of jobs (image, pass, member) int [J, 3]."""
        chunk = multiple(min(sampler.batch_size, len(jobs)), self.mesh.size)
        image_latents, groups, key = (
            sharding.place(array, sharding.replicated(self.mesh))
            for array in (image_latents, groups, jax.random.key_data(jax.random.key(seed)))
        )
        sample = sampler_on(self.mesh)
        results = [
            sample(
                self._unet,
                self._vae,
                self.config.codec.context,
                sampler.steps,
                sampler.eta,
                self._unet_params,
                self._vae_params,
                self._schedule,
                table,
                image_latents,
                groups,
                spread_rows(part, self.mesh),
                jax.random.wrap_key_data(key),
            )
            for part in equal_parts(jobs, chunk)
        ]
        return np.concatenate([processes.gathered(r) for r in results])[: len(jobs)]


@functools.partial(jax.jit, static_argnums=0)
def _encode(vae: nnx.GraphDef, params: Any, images: jax.Array) -> jax.Array:
    return encode_latents(nnx.merge(vae, params), to_pixels(images))


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(vae: nnx.GraphDef, params: Any, pixels: jax.Array) -> jax.Array:
    network = nnx.merge(vae, params)
    return decode_latents(network, encode_latents(network, pixels))


def to_gray(pixels: Any) -> jax.Array:
    """Decoded [..., H, W, 3] → gray maps [..., H, W] in [-1, 1]."""
    return jnp.clip(pixels.mean(-1), -1.0, 1.0)


@functools.cache
def sampler_on(mesh: Mesh) -> Any:
    """`sample_jobs` under `jit`, on every device's part of the jobs; all but its arrays are static.

    A job needs nothing from another: left to the partitioner, parameters that are cut up would be
    exchanged in every step.
    """
    rows = sharding.rows_sharding(mesh).spec

    def sample(unet, vae, context_kind, steps, eta, *arrays):
        own_jobs = functools.partial(sample_jobs, unet, vae, context_kind, steps, eta)
        specs = (*(P() for _ in arrays[:-2]), rows, P())
        spread = jax.shard_map(own_jobs, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
        return spread(*arrays)

    return jax.jit(sample, static_argnums=(0, 1, 2, 3, 4))


def sample_jobs(
    unet: nnx.GraphDef,
    vae: nnx.GraphDef,
    context_kind: str,
    steps: int,
    eta: float,
    unet_params: Any,
    vae_params: Any,
    schedule: Schedule,
    table: conditioning.PromptTable,
    image_latents: jax.Array,
    groups: jax.Array,
    jobs: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Jobs (image, pass, member) int [J, 3] → gray maps [J, H, W] in [-1, 1]."""
    network, decoder = nnx.merge(unet, unet_params), nnx.merge(vae, vae_params)
    contexts, mask = conditioning.context(table, groups[jobs[:, 1]], context_kind)
    latents = image_latents[jobs[:, 0]]  # [J, h, w, c]

    def member(k, image_latent, context, context_mask):
        def predict(noisy, t):
            sample = jnp.concatenate([image_latent, noisy], axis=-1)[None]
            used = None if context_mask is None else context_mask[None]
            return network(sample, jnp.reshape(t, (1,)), context[None], used)[0]

        # The noise of member k is the same for every image and pass.
        member_key = jax.random.fold_in(key, k)
        shape = image_latent.shape
        return sampler_lib.sample_member(predict, schedule, member_key, shape, steps, eta)

    in_axes = (0, 0, 0, None if mask is None else 0)
    x0 = jax.vmap(member, in_axes)(jobs[:, 2], latents, contexts, mask)
    # One after the other: at full size the decoder's activations are hundreds of times the latents.
    return jax.lax.map(lambda latent: to_gray(decode_latents(decoder, latent[None]))[0], x0)


def _merge_members(
    members: jax.Array, align: str, reduce: str, uncertainty: str
) -> tuple[jax.Array, jax.Array]:
    """Members [R, N, H, W] in [-1, 1] → maps and spread [R, H, W]."""
    unit = (members + 1.0) / 2.0  # the ensemble's maths is for maps in [0, 1]
    combine = lambda maps: ensemble_lib.ensemble(maps, align, reduce, uncertainty)  # noqa: E731
    merged, spread = jax.vmap(combine)(unit)
    return merged * 2.0 - 1.0, spread


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _merge_spread(members, mesh, align, reduce, uncertainty):
    # Not left to the partitioner: the search of `align` would ask all devices after each step
    # whether every map of every device is done.
    merge = functools.partial(_merge_members, align=align, reduce=reduce, uncertainty=uncertainty)
    rows = sharding.rows_sharding(mesh).spec
    return jax.shard_map(merge, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(members)


def _merge(
    members: np.ndarray, sampler: SamplerConfig, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Members [I, P, N, H, W] → maps and spread [I, P, H, W], I × P shared out over `mesh`."""
    if sampler.ensemble == 1:
        return members[:, :, 0], np.zeros_like(members[:, :, 0])
    images, passes, *rest = members.shape
    rows = spread_rows(members.reshape(images * passes, *rest), mesh)
    settings = sampler.align, sampler.reduce, sampler.uncertainty
    found = processes.gathered(_merge_spread(rows, mesh, *settings))
    merged, spread = (m[: images * passes].reshape(images, passes, *rest[1:]) for m in found)
    return merged, spread


def _grid(images: int, passes: int, members: int) -> np.ndarray:
    """Every (image, pass, member), int [J, 3], members fastest."""
    return np.indices((images, passes, members)).reshape(3, -1).T


def _entries(classes: Sequence[str | ClassEntry]) -> tuple[ClassEntry, ...]:
    if all(isinstance(c, ClassEntry) for c in classes) and classes:
        return tuple(classes)  # type: ignore[arg-type]
    return vocabulary.from_names([str(c) for c in classes]).classes
