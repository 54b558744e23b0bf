"""From a source to training batches, with Grain.

Example i of training is a function of (seed, i) alone: which record it shows, how that record is
augmented and which classes are asked of it. Batches hold B successive examples, so a run that goes
on from any example on any process count sees the same batches as an uninterrupted run on one.
"""

import dataclasses
import functools
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from segdiff_jax.config import Config, DataConfig
from segdiff_jax.data import chance, transforms
from segdiff_jax.data.images import UnreadableError
from segdiff_jax.data.preference import Preference
from segdiff_jax.data.sources.source import Source
from segdiff_jax.errors import UserError


class Records(Protocol):
    """Random access to training pairs; `UnreadableError` for one that cannot be read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def train_batches(
    source: Source,
    config: Config,
    seed: int,
    start: int = 0,
    rows: Sequence[int] | None = None,
    preference: Preference | None = None,
) -> "TrainBatches":
    """Return an endless iterator over batches from example `start` on.

    Each batch is {"image": uint8 [b, H, W, 3], "labels": [b, H, W], "class_ids": int32 [b, G]}.
    Its b `rows` are those of the global batch (config.train.batch_size) that this process feeds,
    by default all. G is config.codec.classes_per_pass, or all K classes when that is 0; class_ids
    of -1 are empty slots. `preference` says which classes are asked for more often.
    """
    draws = Draws(source, config, seed, preference)
    example = functools.partial(_example, draws, config.data)
    return batches(source, example, config, seed, start, rows)


def batches(
    records: Records,
    example: Callable[[int, dict[str, Any]], dict[str, Any]],
    config: Config,
    seed: int,
    start: int = 0,
    rows: Sequence[int] | None = None,
) -> "TrainBatches":
    """Do what `train_batches` does with other records, in the same order and the same epochs.

    `example(i, record)` makes row i from the record that falls to it, which also has the keys
    "record", its index, and "unreadable", to be handed on. Both arguments must be picklable for
    data.workers > 0.
    """
    size = config.train.batch_size
    rows = range(size) if rows is None else rows
    # Grain adds the epoch to its seed: without the hash, runs of neighbouring seeds would overlap.
    salted = zlib.crc32(f"segdiff {seed}".encode())
    examples = (
        grain.MapDataset.source(_Readable(records, config.data))
        .shuffle(salted)
        .repeat()
        .map_with_index(example)
    )
    mine = grain.MapDataset.source(_Rows(examples, start, size, rows))
    dataset = mine.batch(len(rows), drop_remainder=True, batch_fn=_stack)
    threads = min(16, 2 * (os.cpu_count() or 1))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    iterable = dataset.to_iter_dataset(options)
    shared = config.data.workers > 0
    if shared:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads absl flags here, but not everyone uses absl
        workers = grain.MultiprocessingOptions(
            num_workers=config.data.workers, per_worker_buffer_size=2
        )
        iterable = iterable.mp_prefetch(workers)
    return TrainBatches(iter(iterable), len(records), config.data.max_unreadable, shared)


def with_batch_size(config: Config, size: int) -> Config:
    """Return `config` with a global batch of `size` examples."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=size))


class TrainBatches:
    """Iterator over batches that counts the pairs it had to skip.

    unreadable: the message about each skipped record, by record index. Raises `UserError` as soon
    as they are more than the permitted share of the dataset. Records are counted where they are
    met: with several processes each counts its own.
    """

    def __init__(
        self,
        batches: Iterator[dict[str, Any]],
        length: int,
        max_unreadable: float,
        shared: bool = False,
    ):
        self.unreadable: dict[int, str] = {}
        self._shared = shared  # whether the arrays lie in memory shared with worker processes
        self._batches = batches
        self._length = length
        self._max_unreadable = max_unreadable

    def __iter__(self) -> "TrainBatches":
        return self

    def close(self) -> None:
        """End the worker processes. There are no batches after it."""
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()
        self._batches = iter(())  # Grain's own, freed while Python ends, would fail noisily

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._batches)
        for record, message in batch.pop("unreadable"):
            if record not in self.unreadable:
                self.unreadable[record] = message
                logging.warning("skipped: %s", message)
        if len(self.unreadable) > self._max_unreadable * self._length:
            raise too_many_unreadable(self.unreadable, self._length, self._max_unreadable)
        if self._shared:
            # What workers send lies in shared memory, which is freed with the array: JAX may hold
            # on to that until the process ends, too late.
            batch = {name: np.array(values) for name, values in batch.items()}
        return batch


def too_many_unreadable(unreadable: dict[int, str], length: int, share: float) -> UserError:
    """Word the error for skipping more than `share` of `length` pairs."""
    first = next(iter(unreadable.values()))
    return UserError(
        f"{first} ({len(unreadable)} of {length} pairs unreadable, more than "
        f"config.data.max_unreadable={share:g} allows)"
    )


class _Readable:
    """Records with the next readable one in the place of each that cannot be read.

    With data.cache_images they are kept: in each worker process those that it reads, because
    pixels are not worth a pipe.
    """

    def __init__(self, source: Records, data: DataConfig):
        self.source = source
        self.max_unreadable = data.max_unreadable
        self.kept: dict[int, dict[str, Any]] | None = {} if data.cache_images else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        length = len(self.source)
        failures: dict[int, str] = {}
        while len(failures) <= self.max_unreadable * length and len(failures) < length:
            record = (index + len(failures)) % length
            try:
                found = self._record(record)
            except UnreadableError as error:
                failures[record] = str(error)
            else:
                return {**found, "record": record, "unreadable": list(failures.items())}
        raise too_many_unreadable(failures, length, self.max_unreadable)

    def _record(self, index: int) -> dict[str, Any]:
        if self.kept is None:
            return self.source[index]
        if index not in self.kept:
            self.kept[index] = self.source[index]
        return self.kept[index]


class _Rows:
    """Of each batch of `size` examples from `start` on, those at `rows`."""

    def __init__(self, examples: Records, start: int, size: int, rows: Sequence[int]):
        self.examples, self.start, self.size, self.rows = examples, start, size, rows

    def __len__(self) -> int:
        return (len(self.examples) - self.start) // self.size * len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch, place = divmod(index, len(self.rows))
        return self.examples[self.start + batch * self.size + self.rows[place]]


class Draws:
    """The random choices of training examples, the same whatever their pixels are made from."""

    def __init__(
        self, source: Source, config: Config, seed: int, preference: Preference | None = None
    ):
        self.preference = preference or Preference()
        self.classes_per_pass = config.codec.classes_per_pass
        self.negatives = config.codec.negatives
        self.num_classes = len(source.vocabulary)
        self.trained = np.setdiff1d(np.arange(self.num_classes), source.novel)
        self.views = config.data.augment.views
        self.seed = seed

    def generator(self, index: int) -> np.random.Generator:
        """Return the generator of example `index`, for its augmentation, then its classes."""
        return chance.generator(self.seed, "example", index)

    def view(self, rng: np.random.Generator) -> int:
        """Draw which of the `views` fixed views an example shows."""
        return int(rng.integers(self.views))

    def view_generator(self, record: int, view: int) -> np.random.Generator:
        """Return the source of the augmentation of a fixed view."""
        return chance.generator(self.seed, "view", record, view)

    def class_ids(self, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw the classes to ask of `labels`, int32 [G], as `draw_classes` does."""
        if not self.classes_per_pass:
            return np.arange(self.num_classes, dtype=np.int32)
        count, share = self.classes_per_pass, self.negatives
        return draw_classes(labels, self.trained, count, share, rng, self.preference)


def _example(draws: Draws, data: DataConfig, index: int, record: dict[str, Any]) -> dict[str, Any]:
    """Make training example number `index` of a record of the source."""
    rng = chances = draws.generator(index)
    if draws.views:
        chances = draws.view_generator(record["record"], draws.view(rng))
    image, labels = transforms.augment(record["image"], record["labels"], chances, data)
    return {
        "image": image,
        "labels": labels,
        "class_ids": draws.class_ids(labels, rng),
        "unreadable": record["unreadable"],
    }


def draw_classes(
    labels: np.ndarray,
    trained: np.ndarray,
    count: int,
    negatives: float,
    rng: np.random.Generator,
    preference: Preference = Preference(),
) -> np.ndarray:
    """Draw which classes to ask of unsigned `labels` [...], int32 [count], in random order.

    Of the labels it only matters which ids occur.
    Each slot shows an absent class with probability `negatives`, else a present one; where one
    kind runs out the other fills in, and -1 where both do. Only ids in `trained` are drawn, among
    which `preference` chooses.
    """
    occurs = np.bincount(labels.ravel(), minlength=int(trained.max(initial=0)) + 1) > 0
    present, absent = trained[occurs[trained]], trained[~occurs[trained]]
    absent_count = int((rng.random(count) < negatives).sum())
    absent_count = max(absent_count, count - len(present))
    absent_count = min(absent_count, len(absent))
    present_count = min(count - absent_count, len(present))
    drawn = np.concatenate(
        [
            preference.of_present(present, present_count, rng),
            preference.of_absent(absent, present, absent_count, rng),
        ]
    )
    class_ids = np.full(count, -1, np.int32)
    class_ids[: len(drawn)] = rng.permutation(drawn)
    return class_ids


def _stack(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    batch: dict[str, Any] = {
        key: np.stack([example[key] for example in examples])
        for key in examples[0]
        if key != "unreadable"
    }
    batch["unreadable"] = [item for example in examples for item in example["unreadable"]]
    return batch
