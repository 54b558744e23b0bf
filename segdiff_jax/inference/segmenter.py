"""The Python API: photos and class names in, labels and scores out.

Segmenter.load(workdir | export | Hugging Face id | gs://…)

image   → requests.as_photo    uint8 [H, W, 3]
        → geometry.fit         [h, w, 3] at config.data.image_size
        → VAE                  latent: once an image, `Segmenter.encode`
classes → requests.as_classes  Vocabulary
        → CLIP                 prompt table: once a list, `Segmenter.table`
both    → jobs                 image × pass × member, in chunks of few shapes
        → sampling.sampler_on  gray maps [J, h, w] → merged over members [P, h, w]
        → result.from_maps     Segmentation at the photo's own size
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from segdiff_jax import codec
from segdiff_jax.combinations import check_sampler
from segdiff_jax.config import CodecConfig, Config, MeshConfig, SamplerConfig
from segdiff_jax.data import geometry
from segdiff_jax.diffusion.schedule import make_schedule
from segdiff_jax.errors import UserError
from segdiff_jax.inference import requests, sampling
from segdiff_jax.inference.requests import Settings
from segdiff_jax.inference.result import Segmentation, from_maps
from segdiff_jax.models.attention import plain
from segdiff_jax.models.clip_text import CLIPText
from segdiff_jax.models.layers import kernels_as_multiplied
from segdiff_jax.models.linear_decoder import LinearDecoder
from segdiff_jax.models.tiny_vae import TinyVAE
from segdiff_jax.models.unet import UNet
from segdiff_jax.models.vae import VAE
from segdiff_jax.parallel import attention_kernels, processes
from segdiff_jax.parallel.mesh import make_mesh, place, replicated
from segdiff_jax.parallel.placement import equal_parts, for_use, on_mesh, rows_of_call, spread_rows
from segdiff_jax.text import conditioning, vocabulary
from segdiff_jax.text.tokenizer import Tokenizer
from segdiff_jax.text.vocabulary import ClassEntry, Vocabulary
from segdiff_jax.weights import hub, workdir


class Encoded(NamedTuple):
    """An image that has been through the VAE: to be asked for many lists of classes."""

    photo: np.ndarray  # uint8 [H, W, 3]
    latent: np.ndarray  # float32 [h, w, c]


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
        # Not the VAE's: a tenth of the size, and training has the same arrays in use. Rounded
        # before they are gathered: half of the bytes to send and to hold.
        rounded = kernels_as_multiplied(self._unet, unet_params)
        self._unet_params = for_use(on_mesh(rounded, self.mesh), self.mesh)
        self._vae_params = on_mesh(vae_params, self.mesh)
        # By the names of `config.sampler.decoder`; of a linear one no graph, only its arrays.
        self._decoders: dict[str, tuple[Any, Any]] = {"vae": (self._vae, self._vae_params)}
        self._schedule = on_mesh(make_schedule(config.diffusion), self.mesh)
        self.checkpoint_step: int | None = None  # None: of an export, or not from `load`
        self._tables: dict[tuple[ClassEntry, ...], conditioning.PromptTable] = {}

    @staticmethod
    def load(checkpoint: str, which: str | int = "newest") -> "Segmenter":
        """From a training workdir or an export: local, `gs://`, or OWNER/NAME of Hugging Face.

        which: "newest", "best" (by the mIoU of the training's validation) or a step, of the
        checkpoints of a training. `checkpoint_step` of the result says which was read.

        Raises `UserError` if it is neither, has no such step, or holds another architecture.
        """
        folder = hub.local(checkpoint)
        networks, step = workdir.load_with_step(folder, which=which)
        segmenter = Segmenter(*networks, trained=workdir.read_classes(folder))
        segmenter.checkpoint_step = step
        segmenter.add_decoders(*workdir.load_decoders(folder, networks[1]))
        return segmenter

    def add_decoders(self, linear: LinearDecoder | None, tiny: TinyVAE | None = None) -> None:
        """More choices for `config.sampler.decoder`; a linear decoder also ranks shortlists."""
        if linear is not None:
            self._decoders["linear"] = None, on_mesh(linear, self.mesh)
        if tiny is not None:
            graph, params = nnx.split(tiny)
            self._decoders["tiny"] = graph, on_mesh(params, self.mesh)

    def __call__(
        self,
        images: Any,
        classes: Sequence[str | ClassEntry] | Vocabulary,
        *,
        seed: int = 0,
        **settings: Unpack[Settings],
    ) -> Any:
        """Segments an image into `classes` ("building, edifice" names synonyms): a `Segmentation`.

        An image is a path, a PIL image, uint8 [H, W, 3], or what `encode` gave. A list of images is
        worked on in one batch and gives a list; for many use `stream`.

        Args:
          seed: the result depends on it and on nothing else that is random.
          settings: as of `requests.Settings`; those left out take the config's value.

        Raises:
          TypeError, ValueError: an image, list or setting that is none.
          UserError: an unreadable file, no or duplicate classes, and as of `unclipped_maps`.
        """
        several = isinstance(images, list | tuple) and not isinstance(images, Encoded)
        photos = [self._photo(image) for image in (images if several else [images])]
        wanted = requests.as_vocabulary(classes)
        sampler, decoding = requests.chosen(self.config, settings)
        if not photos:
            return []
        gray, spread = self.unclipped_maps(photos, wanted.classes, sampler, seed)
        found = []
        for number, image in enumerate(photos):
            photo = image.photo if isinstance(image, Encoded) else image
            uncertain = spread[number] if sampler.ensemble > 1 else None
            found.append(self.segmentation(gray[number], uncertain, photo, wanted, decoding))
        return found if several else found[0]

    def stream(
        self,
        images: Iterable[Any],
        classes: Sequence[str | ClassEntry] | Vocabulary,
        *,
        seed: int = 0,
        **settings: Unpack[Settings],
    ) -> Iterator[Segmentation]:
        """The `Segmentation` of each image, in order, in constant memory. Arguments as of a call.

        While one result is in use (being written, say), the next image is in the networks and the
        one after that is read: three images are in memory, however many there are.
        """
        wanted = requests.as_vocabulary(classes)
        photos = _ahead(map(self._photo, images))
        return _ahead(self(photo, wanted, seed=seed, **settings) for photo in photos)

    def encode(self, image: Any) -> Encoded:
        """`image` for many calls with other classes, seeds or settings: the VAE sees it once."""
        photo = requests.as_photo(image, self.config.data)
        return Encoded(photo, self._latents([photo])[0])

    def _photo(self, image: Any) -> Any:
        return image if isinstance(image, Encoded) else requests.as_photo(image, self.config.data)

    def segmentation(
        self,
        gray: np.ndarray,
        spread: np.ndarray | None,
        photo: np.ndarray,
        classes: Vocabulary,
        decoding: CodecConfig,
    ) -> Segmentation:
        """What the (unclipped) maps [P, h, w] of one photo say at its own size: `from_maps`."""
        return from_maps(gray, spread, photo, classes, decoding, self.config.data.fit)

    def reconstruct(self, pixels: np.ndarray) -> np.ndarray:
        """Images [J, H, W, 3] in [-1, 1] at the network's size, through the VAE and back.

        Raises `UserError` where that is not finite.
        """
        found = sampling.reconstruct(self._vae, self._vae_params, spread_rows(pixels, self.mesh))
        decoded = processes.gathered(found)[: len(pixels)]
        if not np.isfinite(decoded).all():
            raise UserError(f"what the VAE decodes is not finite: {self._why_not_finite()}")
        return decoded

    def maps(
        self,
        images: Sequence[Any],
        classes: Sequence[ClassEntry],
        sampler: SamplerConfig,
        seed: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gray maps in [-1, 1] and their spread, each [I, P, h, w] at the network's size."""
        gray, spread = self.unclipped_maps(images, classes, sampler, seed)
        return gray.clip(-1.0, 1.0), spread

    def unclipped_maps(
        self,
        images: Sequence[Any],
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
        table = self.table(classes)
        group = codec.group_size(len(classes), self.config.codec.classes_per_pass)
        groups = codec.groups(len(classes), group)
        if sampler.shortlist and group > 1:
            raise UserError(
                f"a shortlist (sampler.shortlist={sampler.shortlist}) needs one class per pass, "
                f"but this model paints {group} classes: set it to 0"
            )
        check_sampler(sampler)
        self._check_decoder(sampler.decoder)
        photos = [self._photo(image) for image in images]
        latents = self._latents(photos)
        short = 0 < sampler.shortlist < len(classes)
        size, rule = self.config.data.image_size, self.config.data.fit
        natives = [np.shape(p.photo if isinstance(p, Encoded) else p)[:2] for p in photos]
        filled = [geometry.filled(native, size, rule) for native in natives]
        find = functools.partial(self._shortlisted, filled) if short else self._all_in_full
        try:
            gray, spread = find(latents, table, groups, sampler, seed)
            sampling.check_finite(gray + spread, np.moveaxis(np.indices(gray.shape[:2]), 0, -1))
            return gray, spread
        except sampling.NotFinite as error:
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

    def _latents(self, images: Sequence[Any]) -> np.ndarray:
        """[I, h, w, c]; one image a device and call, so that no number of them compiles anew."""
        if all(isinstance(image, Encoded) for image in images):
            return np.stack([image.latent for image in images])
        photos = [image.photo if isinstance(image, Encoded) else image for image in images]
        data = self.config.data
        fitted = np.stack([geometry.fit(photo, data.image_size, data.fit) for photo in photos])
        parts = [
            sampling.encode(self._vae, self._vae_params, spread_rows(part, self.mesh))
            for part in equal_parts(fitted, self.mesh.size)
        ]
        return np.concatenate([processes.gathered(p) for p in parts])[: len(fitted)]

    def _all_in_full(self, image_latents, table, groups, sampler, seed):
        jobs = sampling.grid(len(image_latents), len(groups), sampler.ensemble)
        members = self._run(image_latents, table, groups, jobs, sampler, seed)
        shape = len(image_latents), len(groups), sampler.ensemble, *self.config.data.image_size
        return sampling.merge(members.reshape(shape), sampler, self.mesh)

    def _shortlisted(self, filled, image_latents, table, groups, sampler, seed):
        """One cheap pass for every class, the full budget for the M most present per image.

        filled: the part (height, width) of each view that its photo fills, for padding is no area.
        """
        count, size = len(image_latents), self.config.data.image_size
        decoder = "linear" if "linear" in self._decoders else sampler.decoder
        cheap = dataclasses.replace(sampler, steps=1, ensemble=1, decoder=decoder)
        jobs = sampling.grid(count, len(groups), 1)
        first = self._run(image_latents, table, groups, jobs, cheap, seed)
        first = first.reshape(count, len(groups), *size)
        seen = [maps[:, :down, :across] for maps, (down, across) in zip(first, filled, strict=True)]
        presence = np.stack([maps.clip(0.0, 1.0).mean((1, 2)) for maps in seen])  # [I, K] of area
        brightness = np.stack([maps.mean((1, 2)) for maps in seen])
        order = np.lexsort((-brightness, -presence))  # the brighter map of two absent ones
        kept = np.sort(order[:, : sampler.shortlist], axis=1)
        jobs = np.array(
            [(i, p, m) for i in range(count) for p in kept[i] for m in range(sampler.ensemble)]
        )
        members = self._run(image_latents, table, groups, jobs, sampler, seed)
        members = members.reshape(*kept.shape, sampler.ensemble, *size)
        merged, spread = sampling.merge(members, sampler, self.mesh)
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
        sample, running = sampling.sampler_on(self.mesh), None
        decoder, decoder_params = self._decoders[sampler.decoder]
        found: list[np.ndarray] = []
        for part in equal_parts(jobs, rows_of_call(len(jobs), sampler.batch_size, self.mesh.size)):
            image, pass_, member = part.T
            kind = self.config.codec.context
            contexts, mask = conditioning.context(table, groups[pass_], kind)
            rows = contexts, mask, image_latents[image], member.astype(np.int32)
            with processes.at_work("compiles or runs the sampler"):
                result = sample(
                    self._unet,
                    decoder,
                    sampler.steps,
                    sampler.eta,
                    sampler.initial_noise,
                    self._unet_params,
                    decoder_params,
                    self._schedule,
                    *jax.tree.map(lambda array: spread_rows(array, self.mesh), rows),
                    key,
                )
            # One call ahead: the devices do not wait, nor do they hold the inputs of all calls.
            found += [] if running is None else [processes.gathered(running)]
            running = result
        maps = np.concatenate([*found, processes.gathered(running)])[: len(jobs)]
        sampling.check_finite(maps, jobs)
        return maps

    def _check_decoder(self, name: str) -> None:
        """Raises `UserError` that says how to come by a decoder that is not there."""
        mend = {
            "linear": "run its training again, which only fits one if it is finished (of an "
            "export: then export it again)",
            "tiny": "copy an AutoencoderTiny of its latent space (madebyollin/taesd is one of "
            "Stable Diffusion 1 and 2) to tiny_vae/, of a workdir pretrained/tiny_vae/",
        }
        if name not in self._decoders:
            raise UserError(
                f"config.sampler.decoder={name!r}: this model has no such decoder: {mend[name]}, "
                "or use vae"
            )

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


_END = object()


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """`items`, the next of which is made in a thread while one is in use."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, items, _END)
        while (item := following.result()) is not _END:
            following = pool.submit(next, items, _END)
            yield item
