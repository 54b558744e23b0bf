"""What a model is asked for, and which class of the labels each answer means."""

import dataclasses
from typing import NamedTuple

import numpy as np

from segdiff_jax.data.sources.source import Source
from segdiff_jax.text.vocabulary import ClassEntry, Vocabulary, same_name


class Asked(NamedTuple):
    """owner: int32 [A], of each class that is asked for, the class of the labels that it means.

    other: the class that *other* counts as; -1 for none. synonyms: as of `of`.
    """

    vocabulary: Vocabulary
    owner: np.ndarray
    other: int
    synonyms: str

    def labels(self, found: np.ndarray) -> np.ndarray:
        """Map answers int32 [H, W], in which all beyond A is *other*, to classes of the labels."""
        other = np.iinfo(np.int32).max if self.other < 0 else self.other
        return np.append(self.owner, np.int32(other))[np.minimum(found, len(self.owner))]

    def highest(self, scores: np.ndarray, num_classes: int) -> np.ndarray:
        """Return of scores [A] the highest of each class of the labels: [K]."""
        found = np.zeros(num_classes, scores.dtype)
        np.maximum.at(found, self.owner, scores)
        return found


def of(source: Source, synonyms: str = "mean") -> Asked:
    """Return the classes of `source`, or what it has asked in their place.

    synonyms "mean": their prompts are averaged with the name's (the segmenter does that). "first":
    names alone, as CAT-Seg. "max": each is asked for by itself, and the class has the highest
    score, as FC-CLIP and ODISE; a name that two classes have is the first one's.
    """
    own = source.vocabulary
    asked, last = getattr(source, "asked", None), len(own) - 1
    vocabulary, other = (asked, last) if asked else (own, -1)
    owner = np.minimum(np.arange(len(vocabulary), dtype=np.int32), last)
    if synonyms == "mean":
        return Asked(vocabulary, owner, other, synonyms)
    entries: dict[str, tuple[ClassEntry, int]] = {}
    for number, entry in enumerate(vocabulary.classes):
        alone = dataclasses.replace(entry, synonyms=())
        entries[same_name(entry.name)] = alone, int(owner[number])
    if synonyms == "max":
        for number, entry in enumerate(vocabulary.classes):
            for name in entry.synonyms:
                entries.setdefault(same_name(name), (ClassEntry(name), int(owner[number])))
    classes, owners = zip(*entries.values(), strict=True)
    named = Vocabulary(f"{vocabulary.name}, {synonyms}", classes)
    return Asked(named, np.array(owners, np.int32), other, synonyms)
