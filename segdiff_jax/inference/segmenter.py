"""The Python API: photos and class names in, labels and scores out.

Segmenter.load(workdir | export | Hugging Face id | gs://…)

image   → requests.as_photo       uint8 [H, W, 3]
        → geometry.fit            [h, w, 3] at config.data.image_size; `tiles`: and its windows
        → Networks.latents        once an image, `Segmenter.encode`
classes → requests.as_vocabulary  Vocabulary
        → CLIP                    prompt table: once a list, `Segmenter.table`
both    → Passes.shortlist        the passes that are worth the whole budget
        → Passes.in_full          jobs image × pass × member → maps of the passes [P, h, w]
        → result.from_maps        Segmentation at the photo's own size; `tiles`: from_ranks
"""

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Unpack

import numpy as np
from jax.sharding import Mesh

from segdiff_jax import codec
from segdiff_jax.config import CodecConfig, Config, MeshConfig, SamplerConfig
from segdiff_jax.data import geometry
from segdiff_jax.errors import UserError
from segdiff_jax.inference import requests, sampling, tiles
from segdiff_jax.inference.networks import Networks
from segdiff_jax.inference.passes import Passes, check_request
from segdiff_jax.inference.requests import Encoded, Settings
from segdiff_jax.inference.result import Segmentation, class_ranks, from_maps, from_ranks
from segdiff_jax.models.clip_text import CLIPText
from segdiff_jax.models.unet import UNet
from segdiff_jax.models.vae import VAE
from segdiff_jax.parallel.mesh import make_mesh
from segdiff_jax.progress import Progress
from segdiff_jax.text import conditioning, vocabulary
from segdiff_jax.text.tokenizer import Tokenizer
from segdiff_jax.text.vocabulary import ClassEntry, Vocabulary
from segdiff_jax.weights import hub, loading, workdir

_LISTS = 4  # of classes whose prompts are kept: a list takes tens of megabytes


class Segmenter:
    """A trained model, ready to segment. Make one with `load`.

    mesh: devices that share the jobs, all of them by default. What a map shows does not depend on
      how many there are. With several processes, all make the same calls and get the same results.
    trained: the classes of the training. A model of one gray map for all classes knows no others.
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
        self.networks = Networks(unet, vae, config, mesh or make_mesh(MeshConfig()))
        self.checkpoint_step: int | None = None  # None: of an export, or not from `load`
        # Of what encodes, not of a method: a model that holds itself keeps its memory when dropped.
        encode = functools.partial(_encode, text_encoder, tokenizer, config, trained)
        self._encoded = functools.lru_cache(_LISTS)(encode)

    @staticmethod
    def load(checkpoint: os.PathLike[str] | str, which: str | int = "newest") -> "Segmenter":
        """Read a training workdir or an export: local, `gs://`, or OWNER/NAME of Hugging Face.

        which: "newest", "best" (by the mIoU of the training's validation) or a step, of the
        checkpoints of a training. `checkpoint_step` of the result says which was read.

        Raise `UserError` if it is neither, has no such step, or holds another architecture.
        """
        folder = hub.local(checkpoint)
        networks, decoders, step = loading.load_networks(folder, which=which)
        networks = loading.with_nearest_decoder(networks, decoders, os.fspath(checkpoint))
        segmenter = Segmenter(*networks, trained=workdir.read_classes(folder))
        segmenter.checkpoint_step = step
        segmenter.networks.add_decoders(decoders)
        return segmenter

    def __call__(
        self,
        images: Any,
        classes: Sequence[str | ClassEntry] | Vocabulary,
        *,
        seed: int = 0,
        progress: Progress | None = None,
        **settings: Unpack[Settings],
    ) -> Any:
        """Segment an image into `classes` ("building, edifice" names synonyms): a `Segmentation`.

        An image is a path, a PIL image, uint8 [H, W, 3], or what `encode` gave. A list of images is
        worked on in one batch and gives a list; for many use `stream`.

        Args:
          seed: the result depends on it and on nothing else that is random.
          progress: called with (done, total) jobs, one for each image, pass and member.
          settings: as of `requests.Settings`; those left out take the config's value.

        Raises:
          TypeError, ValueError: an image, list or setting that is none.
          UserError: an unreadable file, no or duplicate classes, and as of `unclipped_maps`.
        """
        several = isinstance(images, list | tuple) and not isinstance(images, Encoded)
        photos = [self._photo(image) for image in (images if several else [images])]
        wanted = requests.as_vocabulary(classes)
        sampler, decoding = requests.chosen(self.config, settings)
        seed = requests.whole("seed", seed, 0)
        if not photos:
            return []
        if sampler.tiles > 1:
            found = [self.in_tiles(p, wanted, sampler, decoding, seed, progress) for p in photos]
            return found if several else found[0]
        gray, spread = self.unclipped_maps(photos, wanted.classes, sampler, seed, progress=progress)
        uncertain = spread if sampler.ensemble > 1 else [None] * len(photos)
        found = [
            self.segmentation(maps, spread_of_one, _pixels(image), wanted, decoding)
            for maps, spread_of_one, image in zip(gray, uncertain, photos, strict=True)
        ]
        return found if several else found[0]

    def stream(
        self,
        images: Iterable[Any],
        classes: Sequence[str | ClassEntry] | Vocabulary,
        *,
        seed: int = 0,
        progress: Progress | None = None,
        **settings: Unpack[Settings],
    ) -> Iterator[Segmentation]:
        """Yield the `Segmentation` of each image, in order. Arguments as of a call.

        While one result is in use (being written, say), the next image is in the networks and the
        one after that is read: three images are in memory, however many there are. `progress` is
        called from another thread, for each image anew.
        """
        wanted = requests.as_vocabulary(classes)
        photos = _ahead(map(self._photo, images))
        call = functools.partial(self, classes=wanted, seed=seed, progress=progress, **settings)
        return _ahead(map(call, photos))

    def __repr__(self) -> str:
        height, width = self.config.data.image_size
        said = f"steps {self.config.sampler.steps}, ensemble {self.config.sampler.ensemble}"
        return f"Segmenter({height} × {width}, {said})"

    def encode(self, image: Any) -> Encoded:
        """Prepare an image for many calls with other classes, seeds or settings."""
        photo = requests.as_photo(image, self.config.data)
        return Encoded(photo, self.networks.latents(self._fitted([photo]))[0])

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
        """Return what the unclipped maps [P, h, w] of one photo say at its own size."""
        if decoding.logit_adjustment:
            classes = vocabulary.with_shares(classes, self.trained)
        return from_maps(gray, spread, photo, classes, decoding, self.config.data.fit)

    def maps(
        self,
        images: Sequence[Any],
        classes: Sequence[ClassEntry],
        sampler: SamplerConfig,
        seed: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return gray maps in [-1, 1] and their spread, each [I, P, h, w] at the networks' size."""
        gray, spread = self.unclipped_maps(images, classes, sampler, seed)
        return gray.clip(-1.0, 1.0), spread

    def unclipped_maps(
        self,
        images: Sequence[Any],
        classes: Sequence[ClassEntry],
        sampler: SamplerConfig,
        seed: int,
        names: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return `maps` that go beyond [-1, 1] where the decoder does.

        Values beyond [-1, 1] break ties between equal scores. There are P = ⌈K/G⌉ passes. Each
        image is encoded once, as a whole: there are no tiles here. `names` are the images' in
        messages.

        Raise `UserError` for classes that this model cannot tell apart or was not trained for, and
        for maps that are not finite.
        """
        passes, groups = self._passes(classes, sampler, seed, progress)
        photos = [self._photo(image) for image in images]
        size, rule = self.config.data.image_size, self.config.data.fit
        filled = [geometry.filled(_pixels(p).shape[:2], size, rule) for p in photos]
        passes.begin(len(photos), len(photos))
        with self._saying_what_is_not_finite(classes, groups, names or [""] * len(photos)):
            latents, views = self._seen(photos, sampler)
            return passes.in_full(latents, views, passes.shortlist(latents, filled))

    def in_tiles(
        self,
        image: np.ndarray | Encoded,
        classes: Vocabulary,
        sampler: SamplerConfig,
        decoding: CodecConfig,
        seed: int,
        progress: Progress | None = None,
    ) -> Segmentation:
        """Segment an image as a whole and in windows, at most `sampler.tiles` along each side.

        A shortlist is that of the whole image. In memory are some windows, and ranks [K, h, w] of
        the canvas that they cover.
        """
        photo, data = _pixels(image), self.config.data
        if decoding.logit_adjustment:
            classes = vocabulary.with_shares(classes, self.trained)
        passes, groups = self._passes(classes.classes, sampler, seed, progress)
        plan = tiles.layout(photo.shape[:2], data.image_size, sampler.tiles)
        canvas = geometry.resize(photo, plan.canvas)
        passes.begin(1, 1 + len(plan.corners))

        def shown(gray: np.ndarray, spread: np.ndarray, view: np.ndarray) -> np.ndarray:
            """Return ranks, and of an ensemble the spread below them, of what is not padding."""
            height, width = geometry.filled(view.shape[:2], data.image_size, data.fit)
            ranks = class_ranks(gray[:, :height, :width], classes, decoding)
            some = spread[: len(spread) if sampler.ensemble > 1 else 0, :height, :width]
            return np.concatenate([ranks, some])

        def maps_of(views: Sequence[np.ndarray]) -> list[np.ndarray]:
            found = passes.in_full(*self._seen(views, sampler), kept.repeat(len(views), axis=0))
            return [shown(*maps) for maps in zip(*found, views, strict=True)]

        with self._saying_what_is_not_finite(classes.classes, groups, [""]):
            latent, seen = self._seen([image], sampler)
            filled = geometry.filled(photo.shape[:2], data.image_size, data.fit)
            kept = passes.shortlist(latent, [filled])
            (gray,), (spread,) = passes.in_full(latent, seen, kept)
            at_once = 1 + 4 * sampler.batch_size // passes.budget
            mean = tiles.blended(canvas, plan, shown(gray, spread, photo), maps_of, at_once)
        ranks, uncertain = mean[: len(classes)], mean[len(classes) :]
        return from_ranks(ranks, uncertain if len(uncertain) else None, photo, classes, decoding)

    def _passes(
        self,
        classes: Sequence[ClassEntry],
        sampler: SamplerConfig,
        seed: int,
        progress: Progress | None,
    ) -> tuple[Passes, np.ndarray]:
        """Check the request; return its `Passes` and the class ids int [P, G] of each."""
        check_request(sampler, self.config, len(classes))
        table, settings = self.table(classes), self.config.codec
        groups = codec.groups(
            len(classes), codec.group_size(len(classes), settings.classes_per_pass)
        )
        self.networks.check_decoder(sampler.decoder)
        contexts = lambda numbers: conditioning.context(  # noqa: E731
            table, groups[numbers], settings.context
        )
        text = np.asarray(table.pooled)[groups[:, 0]]
        return Passes(self.networks, contexts, text, sampler, seed, progress), groups

    @contextlib.contextmanager
    def _saying_what_is_not_finite(
        self, classes: Sequence[ClassEntry], groups: np.ndarray, names: Sequence[str]
    ) -> Iterator[None]:
        """Raise `UserError` of one line for `sampling.NotFinite`.

        names: of the images, "" where they have none.
        """
        try:
            yield
        except sampling.NotFinite as error:
            name = names[error.image] if error.image < len(names) else ""
            if not name and len(names) > 1:
                name = f"image {error.image + 1} of {len(names)}"
            image = f"{name}: " if name else ""
            shown = [classes[i].name for i in groups[error.pass_] if i != codec.PAD]
            raise UserError(
                f"{image}the map of {', '.join(map(vocabulary.shorten, shown[:3]))} is not "
                f"finite: {self.networks.why_not_finite()}"
            ) from None

    def table(self, classes: Sequence[ClassEntry]) -> conditioning.PromptTable:
        """Return prompt embeddings on the host, encoded anew only after other lists were asked for.

        Raise `UserError` for a vocabulary that the model cannot tell apart or does not know.
        """
        return self._encoded(tuple(classes))

    def _seen(
        self, images: Sequence[Any], sampler: SamplerConfig
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the latents of images and, for a decoder that sees them too, their views."""
        sees = sampler.decoder == "joint"
        if all(isinstance(image, Encoded) for image in images):
            latents = np.stack([image.latent for image in images])
            return latents, self._fitted(images) if sees else None
        views = self._fitted(images)
        return self.networks.latents(views), views if sees else None

    def _fitted(self, images: Sequence[Any]) -> np.ndarray:
        data = self.config.data
        return np.stack([geometry.fit(_pixels(i), data.image_size, data.fit) for i in images])


def _encode(
    text_encoder: CLIPText,
    tokenizer: Tokenizer,
    config: Config,
    trained: Vocabulary | None,
    classes: tuple[ClassEntry, ...],
) -> conditioning.PromptTable:
    vocabulary.check_known(classes, trained, config.codec.classes_per_pass)
    templates = config.prompts.templates
    return conditioning.encode_prompts(text_encoder, tokenizer, classes, templates)


def _pixels(image: np.ndarray | Encoded) -> np.ndarray:
    return image.photo if isinstance(image, Encoded) else image


_END = object()


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Yield `items`; the next is made in a thread while one is in use."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, items, _END)
        while (item := following.result()) is not _END:
            following = pool.submit(next, items, _END)
            yield item
