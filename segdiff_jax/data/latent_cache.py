"""Encode the training pairs once, so that the training step needs no VAE.

`data/latents.py` reads the cache and documents the contents of its files.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from segdiff_jax import codec, waiting
from segdiff_jax.config import Config, DataConfig
from segdiff_jax.data import chunks, geometry, pipeline, transforms
from segdiff_jax.data.images import UnreadableError
from segdiff_jax.data.latents import Latents
from segdiff_jax.data.sources.source import Source, files_digest
from segdiff_jax.errors import UserError
from segdiff_jax.files import check_writable, is_remote, write_json
from segdiff_jax.models.vae import VAE, encode_latents
from segdiff_jax.parallel import processes
from segdiff_jax.parallel.mesh import replicated
from segdiff_jax.parallel.placement import equal_parts, spread_rows
from segdiff_jax.progress import reporter

log = logging.getLogger(__name__)

_FORMAT = 4
_OWN = re.compile(r"cache\.json|classes-\d{5}\.json|latents-\d{5}\.array_record")  # its files
_PAIRS_AT_ONCE = 16  # read, encoded and written together
_ENCODED_AT_ONCE = 8  # images in one call of the VAE, per device

View = tuple[np.ndarray, np.ndarray]  # uint8 [H, W, 3] and [H, W]


def open_or_build(source: Source, vae: VAE, config: Config, folder: str) -> Latents:
    """Open the cache in `folder`; build it first if there is none or it does not fit.

    `config` is one that `config.validate` accepts with data.cache_latents. All processes call
    this, and see the same folder. Raises `UserError` for a full disk or unwritable folder and for
    too many unreadable pairs.
    """
    reason = _outdated(folder, fingerprint(source, vae, config))
    latents = None
    if reason is None:
        try:
            latents = Latents(folder, source)
        except waiting.NoAnswer:  # this says nothing about the files
            raise
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, UserError) as error:
            reason = f"cannot be read ({str(error).splitlines()[0]})"
    if processes.all_agree(latents is not None):
        assert latents is not None
        return latents
    log.info("%s: latent cache %s: building it", folder, reason)
    build(source, vae, config, folder)
    return Latents(folder, source)


def build(source: Source, vae: VAE, config: Config, folder: str) -> None:
    """Encode all of `source` into `folder`, of which nothing is visible before all is written.

    All processes call this, and each encodes its share.
    """
    first, count = processes.is_first(), processes.count()
    target = epath.Path(folder)
    # A store of objects cannot rename: there cache.json, written last, makes the folder a cache.
    partial = target if is_remote(folder) else target.parent / f".{target.name}.partial"
    if first:
        _check_own(target)
    try:
        if first:
            (target / "cache.json").unlink(missing_ok=True)
            if partial.exists():
                partial.rmtree()
            check_writable(partial)
        processes.barrier()
        with processes.at_work("encodes its share of the latent cache"):
            _write_shard(source, vae, config, partial, processes.index(), count)
        processes.barrier()
        if first:
            description = {
                "made_from": fingerprint(source, vae, config),
                "shards": count,
                "latent": _latent_shape(vae, config),
            }
            write_json(partial / "cache.json", description)
            if partial != target:
                if target.exists():
                    target.rmtree()
                partial.rename(target)
        processes.barrier()
    except BaseException as error:
        if first and partial.exists():
            partial.rmtree()
        failed = re.match(r"\w+\(\) failed: ([^;]+)", str(error))  # array_record's words
        if failed:
            raise UserError(
                f"{folder}: cannot write the latent cache: {failed[1]}: free some space, "
                "or set config.data.cache_latents=False"
            ) from error
        raise


def _check_own(folder: epath.Path) -> None:
    """Raise `UserError` if a folder that is to be replaced holds what no cache has."""
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    foreign = [name for name in names if not _OWN.fullmatch(name)]
    if foreign:
        raise UserError(
            f"{folder / foreign[0]}: is no part of a latent cache, which is about to be built anew "
            "in its folder: move it elsewhere"
        )


def fingerprint(source: Source, vae: VAE, config: Config) -> dict[str, Any]:
    """Return everything that the latents depend on, as JSON values."""
    data = config.data
    seeded = data.source == "scenes" or data.augment.views > 0
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(nnx.state(vae))[0]:
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    made_from = {
        "format": _FORMAT,
        "vae": [digest.hexdigest(), dataclasses.asdict(vae.config), np.dtype(vae.dtype).name],
        "source": [data.source, data.root, data.train_split, data.vocabulary],
        "reading": [data.first_id, data.mask_values, data.ignore_ids, data.exif, data.max_value]
        + [data.max_pixels],
        "scenes": dataclasses.asdict(data.scenes) if data.source == "scenes" else {},
        "seed": config.seed if seeded else None,
        "pairs": [len(source), files_digest(source)],
        "classes": [list(source.vocabulary.names), list(source.novel)],
        "image_size": list(data.image_size),
        "fit": data.fit,
        "augment": dataclasses.asdict(data.augment),
        "all_in_one_image": _in_one_image(config),
    }
    return json.loads(json.dumps(made_from))


def _outdated(folder: str, wanted: dict[str, Any]) -> str | None:
    """Say why the cache in `folder` cannot be used; None if it can."""
    try:
        made_from = json.loads((epath.Path(folder) / "cache.json").read_text())["made_from"]
        changed = [key for key in wanted if made_from.get(key) != wanted[key]]
    except FileNotFoundError:
        return "does not exist"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "is damaged"
    return f"was made from another {' and '.join(changed)}" if changed else None


def _write_shard(
    source: Source, vae: VAE, config: Config, folder: epath.Path, process: int, count: int
) -> None:
    """Encode this process's share of the pairs, a contiguous one."""
    first, last = (len(source) * part // count for part in (process, process + 1))
    encoder = _Encoder(vae, config, len(source.vocabulary))
    draws = pipeline.Draws(source, config, config.seed)
    progress = reporter("latent cache", "pair")
    contents: list[list[list[int]] | str] = []
    unreadable: list[str] = []
    share = config.data.max_unreadable
    name = f"latents-{process:05d}.array_record"
    with tempfile.TemporaryDirectory() as temporary:  # array_record writes to local disks only
        path = os.path.join(temporary if is_remote(folder) else folder, name)
        writer = ArrayRecordWriter(path, "group_size:1,zstd:1")
        try:
            if process == 0:
                writer.write(encoder.empty())
            read = functools.partial(_read, source, draws, config.data)
            for pairs in chunks.read_ahead(read, range(first, last), _PAIRS_AT_ONCE):
                progress(len(contents), last - first)
                contents += _encoded(pairs, encoder, draws.trained, writer.write)
                unreadable += [pair for pair in pairs if isinstance(pair, str)]
                if len(unreadable) > share * len(source):
                    some = dict(enumerate(unreadable))
                    raise pipeline.too_many_unreadable(some, len(source), share)
            progress(last - first, last - first)
        finally:
            writer.close()
        if is_remote(folder):
            epath.Path(path).copy(folder / name)
    write_json(folder / f"classes-{process:05d}.json", contents)


def _encoded(
    pairs: list[list[View] | str],
    encoder: "_Encoder",
    trained: np.ndarray,
    write: Callable[[bytes], None],
) -> Iterator[list[list[int]] | str]:
    """Write the records of these pairs; yield the classes of the views of each, or its message."""
    views = [view for pair in pairs if not isinstance(pair, str) for view in pair]
    classes = [np.intersect1d(labels, trained) for _, labels in views]
    for record in encoder.views(views, classes):
        write(record)
    shown = iter(classes)
    for pair in pairs:
        if isinstance(pair, str):
            log.warning("skipped: %s", pair)
            yield pair
        else:
            yield [next(shown).tolist() for _ in pair]


def _read(source: Source, draws: pipeline.Draws, data: DataConfig, index: int) -> list[View] | str:
    """Return all that training can show of a pair, at the network's size; or why it cannot."""
    try:
        record = source[index]
    except UnreadableError as error:
        return str(error)
    image, labels = record["image"], record["labels"]
    if data.augment.views:
        chances = (draws.view_generator(index, view) for view in range(data.augment.views))
        return [transforms.augment(image, labels, rng, data) for rng in chances]
    show = functools.partial(geometry.fit, size=data.image_size, rule=data.fit)
    steps = (1, -1) if data.augment.flip else (1,)
    return [(show(image[:, ::step]), show(labels[:, ::step])) for step in steps]


class _Encoder:
    """Pairs -> records, with the VAE on all devices of this process."""

    def __init__(self, vae: VAE, config: Config, num_classes: int):
        graph, params = nnx.split(vae)
        self._mesh = Mesh(np.array(jax.local_devices()), ("data",))
        params = jax.device_put(params, replicated(self._mesh))
        self._size = _ENCODED_AT_ONCE * self._mesh.size
        self._latent = _latent_shape(vae, config)

        @functools.partial(jax.jit, static_argnums=0)
        def encode(pixels: Callable, params: Any, *arrays: jax.Array) -> jax.Array:
            return encode_latents(nnx.merge(graph, params), pixels(*arrays))

        self._photos = functools.partial(encode, codec.to_pixels, params)
        self._masks = functools.partial(encode, codec.mask_images, params)
        self._factor = vae.config.downsampling
        shown = functools.partial(codec.latent_shown, factor=self._factor)
        self._shown = jax.jit(jax.vmap(shown))
        self._all = np.arange(num_classes)[None] if _in_one_image(config) else None  # [1, K]

    def empty(self) -> bytes:
        """Return the record of a mask image that shows nothing."""
        nothing = np.full((1, *(self._factor * n for n in self._latent[:2])), codec.IGNORE)
        latent = self._all_of(self._masks, nothing.astype(np.uint8), np.zeros((1, 1), int))[0]
        return _record(latent, np.zeros(self._latent[:2], bool))

    def views(self, views: list[View], classes: list[np.ndarray]) -> Iterator[bytes]:
        """Return the records of `views` in order, with a mask latent for each of `classes` [n]."""
        if not views:
            return
        images, labels = zip(*views, strict=True)
        groups = [ids[:, None] if self._all is None else self._all for ids in classes]
        rows = np.repeat(np.arange(len(views)), [len(group) for group in groups])
        valid = np.asarray(codec.latent_valid(jnp.stack(labels), self._factor))  # [V, h, w]
        photos = self._all_of(self._photos, np.stack(images))
        shown = np.stack(labels)[rows], np.concatenate(groups)
        masks = zip(
            self._all_of(self._masks, *shown), self._all_of(self._shown, *shown), strict=True
        )
        for photo, positions, group in zip(photos, valid, groups, strict=True):
            yield _record(photo, positions)
            for _ in group:
                yield _record(*next(masks))

    def _all_of(self, function: Callable, *arrays: np.ndarray) -> np.ndarray:
        """Apply `function` to the rows of `arrays` [n, ...] in calls of one size: [n, ...]."""
        results = []
        for parts in zip(*(equal_parts(array, self._size) for array in arrays), strict=True):
            placed = (spread_rows(part, self._mesh) for part in parts)
            results.append(np.asarray(function(*placed)))
        return np.concatenate(results)[: len(arrays[0])] if results else np.zeros(0)


def _record(latent: np.ndarray, positions: np.ndarray) -> bytes:
    """Pack a latent [h, w, c] with a bit for each of its positions, bool [h, w]."""
    return latent.tobytes() + np.packbits(positions).tobytes()


def _in_one_image(config: Config) -> bool:
    return config.codec.classes_per_pass == 0


def _latent_shape(vae: VAE, config: Config) -> tuple[int, int, int]:
    height, width = (size // vae.config.downsampling for size in config.data.image_size)
    return height, width, vae.config.latent_channels
