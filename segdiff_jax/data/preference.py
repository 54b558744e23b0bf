"""Which classes a training example is asked for more often: rare ones, and those easily confused.

Everything here is numpy and the same in every process and on every start.
"""

from typing import NamedTuple

import numpy as np

from segdiff_jax.config import Config
from segdiff_jax.data import chance
from segdiff_jax.data.images import UnreadableError
from segdiff_jax.data.sources.source import Source

_PAIRS = 1000  # that are read for the frequencies of classes
_TEMPERATURE = 0.1  # of cosines: a class that is 0.1 more alike is drawn e times as often


class Preference(NamedTuple):
    """What `draw_classes` goes by; what is None makes no difference."""

    rarity: np.ndarray | None = None  # [K], inverse frequency
    likeness: np.ndarray | None = None  # [K, K], cosines
    hard: float = 0.0  # share of the absent classes that are drawn by likeness

    def of_present(self, present: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        """Draw `count` of the ids `present`, the rarer the likelier."""
        return _draw(present, count, self.rarity, rng)

    def of_absent(
        self, absent: np.ndarray, present: np.ndarray, count: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Draw `count` of the ids `absent`, a share `hard` of them by likeness to one `present`."""
        if self.likeness is None or not len(present):
            return _draw(absent, count, None, rng)
        hard_count = int((rng.random(count) < self.hard).sum())
        nearest = self.likeness[:, present].max(axis=1)
        hard = _draw(absent, hard_count, np.exp(nearest / _TEMPERATURE), rng)
        others = _draw(np.setdiff1d(absent, hard), count - hard_count, None, rng)
        return np.concatenate([hard, others])


def of_training(source: Source, config: Config, pooled: np.ndarray) -> Preference:
    """Return what `config` prefers; pooled [K, D]: the prompts of the classes of `source`."""
    hard, balanced = config.train.hard_negatives, config.data.class_balance
    return Preference(
        rarity(source, config.seed) if balanced else None,
        likeness(pooled) if hard else None,
        hard,
    )


def rarity(source: Source, seed: int) -> np.ndarray:
    """Return the inverse of the share of pairs that show each class [K]; of up to a thousand pairs.

    A class that none of them shows counts as shown by half a pair. Unreadable pairs are passed over
    here: training counts them.
    """
    count, seen = np.zeros(len(source.vocabulary)), 0
    for index in chance.generator(seed, "frequency").permutation(len(source))[:_PAIRS]:
        try:
            occurs = np.bincount(source[int(index)]["labels"].ravel(), minlength=len(count)) > 0
        except UnreadableError:
            continue
        count += occurs[: len(count)]
        seen += 1
    return max(seen, 1) / np.maximum(count, 0.5)


def likeness(pooled: np.ndarray) -> np.ndarray:
    """Return the cosines [K, K] between the pooled prompts [K, D] of classes.

    Without their mean, which text encoders give to every text: it would make all classes alike.
    """
    centred = np.asarray(pooled, np.float64)
    centred = centred - centred.mean(axis=0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    return unit @ unit.T


def _draw(
    ids: np.ndarray, count: int, weights: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    if weights is None or not len(ids):
        return rng.choice(ids, count, replace=False)
    return rng.choice(ids, count, replace=False, p=weights[ids] / weights[ids].sum())
