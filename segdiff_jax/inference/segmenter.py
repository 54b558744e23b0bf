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

from segdiff_jax import codec
from segdiff_jax.config import Config, MeshConfig, SamplerConfig
from segdiff_jax.data import transforms
from segdiff_jax.diffusion import ensemble as ensemble_lib
from segdiff_jax.diffusion import sampler as sampler_lib
from segdiff_jax.diffusion.schedule import Schedule, make_schedule
from segdiff_jax.errors import UserError
from segdiff_jax.inference import requests
from segdiff_jax.inference.result import Segmentation, from_maps
from segdiff_jax.models.attention import plain
from segdiff_jax.models.clip_text import CLIPText
from segdiff_jax.models.layers import kernels_as_multiplied
from segdiff_jax.models.unet import UNet
from segdiff_jax.models.vae import VAE, decode_latents, encode_latents
from segdiff_jax.parallel import attention_kernels, processes
from segdiff_jax.parallel.mesh import make_mesh, place, replicated, rows_sharding
from segdiff_jax.parallel.placement import equal_parts, for_use, on_mesh, rows_of_call, spread_rows
from segdiff_jax.text import conditioning, vocabulary
from segdiff_jax.text.tokenizer import Tokenizer
from segdiff_jax.text.vocabulary import ClassEntry, Vocabulary
from segdiff_jax.weights import workdir


class Segmenter:
    """A trained model, ready to segment. Make one with `load`.

    mesh: devices that share the work, all of them by default: every pass of every image and member
    runs on one. What a map shows does not depend on how many there are. With several processes,
    all make the same calls and get the same results.
    trained: the classes of the training. A model of one gray image for all classes knows no others.
    """

    def __init__(
        self,
        unet: UNet,
        vae: VAE,
        text_encoder: CLIPText,
        tokenizer: Tokenizer,
        config: Config,
        mesh: Mesh | None = None,
        trained: Vocabulary | None = None,
    ):
        self.config, self.tokenizer, self.text_encoder = config, tokenizer, text_encoder
        self.trained = trained
        self.mesh = mesh or make_mesh(MeshConfig())
        # Each device works by itself (`sampler_on`), whatever mesh the networks were trained on.
        attention = attention_kernels.on_device(self.mesh.devices.flat[0].platform)
        self._unet, unet_params = nnx.split(attention_kernels.with_attention(unet, attention))
        self._vae, vae_params = nnx.split(attention_kernels.with_attention(vae, plain))
        self._unet_params = self._for_sampling(unet_params)
        self._vae_params = on_mesh(vae_params, self.mesh)
        self._schedule = on_mesh(make_schedule(config.diffusion), self.mesh)
        self.checkpoint_step: int | None = None  # None: of an export, or not from `load`
        self._tables: dict[tuple[ClassEntry, ...], conditioning.PromptTable] = {}

    @staticmethod
    def load(checkpoint: str, which: str | int = "newest") -> "Segmenter":
        """From a training workdir or an exported folder, local or `gs://`.

        which: "newest", "best" (by the mIoU of the training's validation) or a step, of the
        checkpoints of a training. `checkpoint_step` of the result says which was read.

        Raises `UserError` if `checkpoint` is neither, has no such step, or holds another
        architecture.
        """
        networks, step = workdir.load_with_step(checkpoint, which=which)
        segmenter = Segmenter(*networks, trained=workdir.read_classes(checkpoint))
        segmenter.checkpoint_step = step
        return segmenter

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
        return for_use(on_mesh(rounded, self.mesh), self.mesh)

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
        nothing else that is random. Raises `TypeError` or `ValueError` for an image or a list that
        is none, and `UserError` as `unclipped_maps` does and for no or duplicate classes.
        """
        photo, entries = requests.as_photo(image), requests.as_classes(classes)
        asked = {"steps": (steps, 1), "ensemble": (ensemble, 1), "shortlist": (shortlist, 0)}
        changes: dict[str, Any] = requests.whole_numbers(asked)
        sampler = dataclasses.replace(self.config.sampler, **changes)
        if threshold is not None and not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold={threshold}: scores are between 0 and 1")
        gray, spread = self.unclipped_maps([photo], entries, sampler, seed)
        chosen = self.config.codec
        return self.segmentation(
            gray[0],
            spread[0] if sampler.ensemble > 1 else None,
            entries,
            photo.shape[:2],
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
        """What the (unclipped) maps [P, h, w] of one image say at `size` = (H, W): `from_maps`."""
        group = codec.group_size(len(classes), self.config.codec.classes_per_pass)
        names = tuple(entry.name for entry in classes)
        return from_maps(gray, spread, names, group, size, threshold, closed)

    def reconstruct(self, pixels: np.ndarray) -> np.ndarray:
        """Images [J, H, W, 3] in [-1, 1] at the network's size, through the VAE and back.

        Raises `UserError` where that is not finite.
        """
        found = _reconstruct(self._vae, self._vae_params, spread_rows(pixels, self.mesh))
        decoded = processes.gathered(found)[: len(pixels)]
        if not np.isfinite(decoded).all():
            raise UserError(f"what the VAE decodes is not finite: {self._why_not_finite()}")
        return decoded

    def maps(
        self,
        images: Sequence[np.ndarray],
        classes: Sequence[ClassEntry],
        sampler: SamplerConfig,
        seed: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gray maps in [-1, 1] and their spread, each [I, P, H, W] at the network's size."""
        gray, spread = self.unclipped_maps(images, classes, sampler, seed)
        return gray.clip(-1.0, 1.0), spread

    def unclipped_maps(
        self,
        images: Sequence[np.ndarray],
        classes: Sequence[ClassEntry],
        sampler: SamplerConfig,
        seed: int,
        names: Sequence[str] = (),
    ) -> tuple[np.ndarray, np.ndarray]:
        """`maps` that go beyond [-1, 1] where the decoder does: that orders classes of equal score.

        P = ⌈K/G⌉ passes. All images × passes × members run in equal chunks, of `sampler.batch_size`
        (or the next multiple of the devices) where there are as many, else of one of the few sizes
        of `rows_of_call`; each image is encoded once. `names` are the images' in error messages.

        Raises `UserError` for classes that this model cannot tell apart or was not trained for,
        and for maps that are not finite.
        """
        size = self.config.data.image_size
        table = self.table(classes)
        group = codec.group_size(len(classes), self.config.codec.classes_per_pass)
        groups = codec.groups(len(classes), group)
        if sampler.shortlist and group > 1:
            raise UserError(
                f"a shortlist (sampler.shortlist={sampler.shortlist}) needs one class per pass, "
                f"but this model paints {group} classes: set it to 0"
            )
        photos = [requests.as_photo(image) for image in images]
        latents = self._latents(np.stack([transforms.resize_image(p, size) for p in photos]))
        short = 0 < sampler.shortlist < len(classes)
        find = self._shortlisted if short else self._all_in_full
        try:
            gray, spread = find(latents, table, groups, sampler, seed)
            _check_finite(gray + spread, np.moveaxis(np.indices(gray.shape[:2]), 0, -1))
            return gray, spread
        except _NotFinite as error:
            numbered = f"image {error.image + 1} of {len(images)}: " if len(images) > 1 else ""
            image = f"{names[error.image]}: " if names else numbered
            shown = [classes[i].name for i in groups[error.map] if i != codec.PAD]
            raise UserError(
                f"{image}the map of {', '.join(map(vocabulary.shorten, shown[:3]))} is not "
                f"finite: {self._why_not_finite()}"
            ) from None

    def table(self, classes: Sequence[ClassEntry]) -> conditioning.PromptTable:
        """Prompt embeddings on the host, encoded the first time a vocabulary is seen.

        Raises `UserError` for a vocabulary that the model cannot tell apart or does not know.
        """
        key = tuple(classes)
        if key not in self._tables:
            vocabulary.check_known(key, self.trained, self.config.codec.classes_per_pass)
            templates = self.config.prompts.templates
            self._tables[key] = conditioning.encode_prompts(
                self.text_encoder, self.tokenizer, key, templates
            )
        return self._tables[key]

    def _latents(self, fitted: np.ndarray) -> np.ndarray:
        """Of uint8 [I, H, W, 3]; one a device and call, so that no number of them compiles anew."""
        parts = [
            _encode(self._vae, self._vae_params, spread_rows(part, self.mesh))
            for part in equal_parts(fitted, self.mesh.size)
        ]
        return np.concatenate([processes.gathered(p) for p in parts])[: len(fitted)]

    def _all_in_full(self, image_latents, table, groups, sampler, seed):
        jobs = _grid(len(image_latents), len(groups), sampler.ensemble)
        members = self._run(image_latents, table, groups, jobs, sampler, seed)
        shape = len(image_latents), len(groups), sampler.ensemble, *self.config.data.image_size
        return _merge(members.reshape(shape), sampler, self.mesh)

    def _shortlisted(self, image_latents, table, groups, sampler, seed):
        """One cheap pass for every class, the full budget for the M most present per image."""
        count, size = len(image_latents), self.config.data.image_size
        cheap = dataclasses.replace(sampler, steps=1, ensemble=1)
        jobs = _grid(count, len(groups), 1)
        first = self._run(image_latents, table, groups, jobs, cheap, seed)
        first = first.reshape(count, len(groups), *size)
        presence = first.clip(0.0, 1.0).mean((2, 3))  # [I, K]: area that is more yes than no
        order = np.lexsort((-first.mean((2, 3)), -presence))  # the brighter map of two absent ones
        kept = np.sort(order[:, : sampler.shortlist], axis=1)
        jobs = np.array(
            [(i, p, m) for i in range(count) for p in kept[i] for m in range(sampler.ensemble)]
        )
        members = self._run(image_latents, table, groups, jobs, sampler, seed)
        members = members.reshape(*kept.shape, sampler.ensemble, *size)
        merged, spread = _merge(members, sampler, self.mesh)
        # Darker than all that was asked for: what was not asked for wins nowhere.
        gray = np.full_like(first, min(-1.0, merged.min()) - 1.0)
        all_spread = np.zeros_like(first)
        for i in range(count):
            gray[i, kept[i]], all_spread[i, kept[i]] = merged[i], spread[i]
        return gray, all_spread

    def _run(self, image_latents, table, groups, jobs, sampler, seed) -> np.ndarray:
        """Unclipped gray maps [J, H, W] of jobs (image, pass, member) int [J, 3]."""
        key = jax.random.key_data(jax.random.key(seed))
        key = jax.random.wrap_key_data(place(key, replicated(self.mesh)))
        image_latents = np.asarray(image_latents)
        sample, running = sampler_on(self.mesh), None
        found: list[np.ndarray] = []
        for part in equal_parts(jobs, rows_of_call(len(jobs), sampler.batch_size, self.mesh.size)):
            image, pass_, member = part.T
            kind = self.config.codec.context
            contexts, mask = conditioning.context(table, groups[pass_], kind)
            rows = contexts, mask, image_latents[image], member.astype(np.int32)
            with processes.at_work("compiles or runs the sampler"):
                result = sample(
                    self._unet,
                    self._vae,
                    sampler.steps,
                    sampler.eta,
                    self._unet_params,
                    self._vae_params,
                    self._schedule,
                    *jax.tree.map(lambda array: spread_rows(array, self.mesh), rows),
                    key,
                )
            # One call ahead: the devices do not wait, nor do they hold the inputs of all calls.
            found += [] if running is None else [processes.gathered(running)]
            running = result
        maps = np.concatenate([*found, processes.gathered(running)])[: len(jobs)]
        _check_finite(maps, jobs)
        return maps

    def _why_not_finite(self) -> str:
        """The likely reason, and what to do."""
        for name, params in (("UNet", self._unet_params), ("VAE", self._vae_params)):
            if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params)):
                return f"the weights of the {name} are not: use another checkpoint, or restore it"
        if self.config.model.dtype == "bfloat16":
            return (
                "the weights are, so it is an overflow, most likely of bfloat16: "
                'set "dtype" of "model" to "float32" in the config.json (of an export: '
                "segdiff.json) of the checkpoint"
            )
        return (
            "the weights are, so it is an overflow on the way: use an earlier checkpoint, "
            "or train on with a lower optimizer.learning_rate"
        )


class _NotFinite(Exception):
    """Of image `image` the map of pass `map` has NaN or infinity in it."""

    def __init__(self, image: int, map: int):
        self.image, self.map = image, map


def _check_finite(maps: np.ndarray, owners: np.ndarray) -> None:
    """Raises `_NotFinite` of the first such map of [..., H, W]; owners: its (image, map, ...)."""
    bad = np.argwhere(~np.isfinite(maps).all((-2, -1)))
    if bad.size:
        raise _NotFinite(*owners[tuple(bad[0])][:2].tolist())


@functools.partial(jax.jit, static_argnums=0)
def _encode(vae: nnx.GraphDef, params: Any, images: jax.Array) -> jax.Array:
    return encode_latents(nnx.merge(vae, params), codec.to_pixels(images))


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(vae: nnx.GraphDef, params: Any, pixels: jax.Array) -> jax.Array:
    network = nnx.merge(vae, params)
    return decode_latents(network, encode_latents(network, pixels))


@functools.cache
def sampler_on(mesh: Mesh) -> Any:
    """`sample_jobs` under `jit`, on every device's part of the jobs; all but its arrays are static.

    A job needs nothing from another: left to the partitioner, parameters that are cut up would be
    exchanged in every step.
    """
    rows = rows_sharding(mesh).spec

    def sample(unet, vae, steps, eta, *arrays):
        own_jobs = functools.partial(sample_jobs, unet, vae, steps, eta)
        specs = (P(), P(), P(), rows, rows, rows, rows, P())
        spread = jax.shard_map(own_jobs, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
        return spread(*arrays)

    return jax.jit(sample, static_argnums=(0, 1, 2, 3))


def sample_jobs(
    unet: nnx.GraphDef,
    vae: nnx.GraphDef,
    steps: int,
    eta: float,
    unet_params: Any,
    vae_params: Any,
    schedule: Schedule,
    contexts: jax.Array,
    mask: jax.Array | None,
    image_latents: jax.Array,
    members: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Unclipped gray maps [J, H, W] of jobs: contexts [J, L, D], their mask [J, L], latents and
    numbers of members [J].

    It knows no vocabulary and no images: what it is compiled for does not depend on them.
    """
    network, decoder = nnx.merge(unet, unet_params), nnx.merge(vae, vae_params)

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
    x0 = jax.vmap(member, in_axes)(members, image_latents, contexts, mask)
    # One after the other: at full size the decoder's activations are hundreds of times the latents.
    return jax.lax.map(lambda latent: codec.to_gray(decode_latents(decoder, latent[None]))[0], x0)


def _merge_members(
    members: jax.Array, align: str, reduce: str, uncertainty: str
) -> tuple[jax.Array, jax.Array]:
    """Unclipped members [R, N, H, W] → unclipped maps and their spread [R, H, W].

    Members are clipped before they are merged. Where the result is at an end of [-1, 1], it is then
    moved on to where the members themselves meet.
    """
    unit = (members.clip(-1.0, 1.0) + 1.0) / 2.0  # the ensemble's maths is for maps in [0, 1]
    combine = lambda maps: ensemble_lib.ensemble(maps, align, reduce, uncertainty)  # noqa: E731
    merged, spread = jax.vmap(combine)(unit)
    merged = merged * 2.0 - 1.0
    beyond, _ = jax.vmap(lambda maps: ensemble_lib.merge(maps, reduce))(members)
    beyond = beyond - beyond.clip(-1.0, 1.0)
    ends = ((merged <= -1.0) & (beyond < 0.0)) | ((merged >= 1.0) & (beyond > 0.0))
    return jnp.where(ends, merged + beyond, merged), spread


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _merge_spread(members, mesh, align, reduce, uncertainty):
    # Not left to the partitioner: the search of `align` would ask all devices after each step
    # whether every map of every device is done.
    merge = functools.partial(_merge_members, align=align, reduce=reduce, uncertainty=uncertainty)
    rows = rows_sharding(mesh).spec
    return jax.shard_map(merge, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(members)


def _merge(
    members: np.ndarray, sampler: SamplerConfig, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Members [I, P, N, H, W] → maps and spread [I, P, H, W], I × P shared out over `mesh`."""
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


def _grid(images: int, passes: int, members: int) -> np.ndarray:
    """Every (image, pass, member), int [J, 3], members fastest."""
    return np.indices((images, passes, members)).reshape(3, -1).T
