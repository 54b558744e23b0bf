"""The latent cache: VAE latents of the training pairs in place of their pixels.

cache.json                  what the latents were made from, their shape, the number of shards
classes-00000.json          of each pair: the classes in each view, or why it could not be read
latents-00000.array_record  float32 latents; a shard per process that wrote, pairs in order

The first record is the latent of an empty mask. Then follow, for each view of each pair, the image
latent with its valid mask, and a latent for each mask with the latent pixels that show its class.
There is one mask for each class in the view, or one for all classes where one pass paints them all.
A pair has data.augment.views views, or without these itself and, where the config flips, its mirror
image. A folder without `cache.json` is no cache. `data/latent_cache.py` writes these files.
"""

import atexit
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from etils import epath

from segdiff_jax.config import AugmentConfig, Config
from segdiff_jax.data import pipeline, transforms
from segdiff_jax.data.images import UnreadableError
from segdiff_jax.data.preference import Preference
from segdiff_jax.data.sources.source import Source
from segdiff_jax.errors import UserError
from segdiff_jax.files import is_remote


def train_batches(
    latents: "Latents",
    config: Config,
    seed: int,
    start: int = 0,
    rows: Sequence[int] | None = None,
    preference: Preference | None = None,
) -> pipeline.TrainBatches:
    """Return the batches of `pipeline.train_batches`, example for example, with latents for pixels.

    Each is {"image_latents": float32 [b, h, w, c], "mask_latents": float32 [b, h, w, c],
    "shown": bool [b, h, w], "valid": bool [b, h, w], "class_ids": int32 [b, G]}.
    """
    draws = pipeline.Draws(latents, config, seed, preference)
    example = functools.partial(_example, latents, draws, config.data.augment)
    return pipeline.batches(latents, example, config, seed, start, rows)


class Latents:
    """An open cache: which classes each pair shows, and latents by pair, view and class.

    Opening damaged files raises what they lead the readers to: `OSError`, `ValueError`, ...
    """

    def __init__(self, folder: str, source: Source):
        self.folder, root = folder, epath.Path(folder)
        description = json.loads((root / "cache.json").read_text())
        self.shape = tuple(description["latent"])  # (h, w, c)
        self.vocabulary, self.novel = source.vocabulary, source.novel
        self._in_one_image = description["made_from"]["all_in_one_image"]
        shards = range(description["shards"])
        texts = [(root / f"classes-{shard:05d}.json").read_text() for shard in shards]
        self._contents = [pair for text in texts for pair in json.loads(text)]
        views = [view for pair in self._contents if not isinstance(pair, str) for view in pair]
        sizes = [1 + (1 if self._in_one_image else len(classes)) for classes in views]
        self._start = 1 + np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])  # [views + 1]
        counts = [0 if isinstance(pair, str) else len(pair) for pair in self._contents]
        self._first_view = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])  # [N + 1]
        local = _local_copy(root) if is_remote(folder) else folder
        paths = [os.path.join(local, f"latents-{shard:05d}.array_record") for shard in shards]
        self._records = grain.sources.ArrayRecordDataSource(paths)
        if len(self._records) != self._start[-1]:
            raise ValueError(f"{len(self._records)} records, not {self._start[-1]}")
        self._empty = self._read(0)

    def __len__(self) -> int:
        return len(self._contents)

    def __getitem__(self, pair: int) -> dict[str, Any]:
        if isinstance(self._contents[pair], str):
            raise UnreadableError(self._contents[pair])
        return {}  # what is read depends on the view

    def classes(self, pair: int, view: int) -> np.ndarray:
        """Return the ids [n] of trained classes that a view of a pair shows."""
        return np.array(self._contents[pair][view], np.int32)

    def image(self, pair: int, view: int) -> tuple[np.ndarray, np.ndarray]:
        """Read image latent [h, w, c] and valid mask bool [h, w]."""
        return self._read(self._record(pair, view))

    def mask(self, pair: int, view: int, class_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Read the mask latent [h, w, c] of a class, or of all in one image; shown bool [h, w]."""
        slots = [0] if self._in_one_image else np.flatnonzero(self.classes(pair, view) == class_id)
        if not len(slots):
            return self._empty
        return self._read(self._record(pair, view) + 1 + int(slots[0]))

    def _record(self, pair: int, view: int) -> int:
        return int(self._start[self._first_view[pair] + view])

    def _read(self, record: int) -> tuple[np.ndarray, np.ndarray]:
        """Read a record: a latent [h, w, c], and a bit for each of its positions, bool [h, w]."""
        height, width, _ = self.shape
        floats = int(np.prod(self.shape))
        error, data = None, b""
        try:
            data = self._records[record]  # empty where the file was cut off
        except RuntimeError as caught:  # its chunks have checksums
            error = caught
        if len(data) != 4 * floats + -(-height * width // 8):
            raise UserError(
                f"{self.folder}: damaged latent cache: remove it and run again"
            ) from error
        latent = np.frombuffer(data, np.float32, floats).reshape(self.shape)
        bits = np.unpackbits(np.frombuffer(data, np.uint8, offset=4 * floats), count=height * width)
        return latent, bits.astype(bool).reshape(height, width)


def _example(
    latents: Latents,
    draws: pipeline.Draws,
    augment: AugmentConfig,
    index: int,
    record: dict[str, Any],
) -> dict[str, Any]:
    """Make training example number `index` of a record that `Latents` gives."""
    pair, rng = record["record"], draws.generator(index)
    view = draws.view(rng) if draws.views else int(transforms.draw_flip(rng, augment))
    class_ids = draws.class_ids(latents.classes(pair, view), rng)
    image, valid = latents.image(pair, view)
    mask, shown = latents.mask(pair, view, class_ids[0])
    return {
        "image_latents": image,
        "mask_latents": mask,
        "shown": shown,
        "valid": valid,
        "class_ids": class_ids,
        "unreadable": record["unreadable"],
    }


def _local_copy(root: epath.Path) -> str:
    """Copy a store's files for this process: array_record reads local files only."""
    folder = tempfile.mkdtemp(prefix="segdiff_latents_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for path in root.glob("*.array_record"):
        path.copy(os.path.join(folder, path.name))
    return folder
