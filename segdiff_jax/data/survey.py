"""Every pair of a data set looked at: counts, ids, classes, what is broken, what is shifted."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from segdiff_jax.config import DataConfig
from segdiff_jax.data import images
from segdiff_jax.data.images import UnreadableError
from segdiff_jax.data.sources.layouts import IGNORED, OUTSIDE
from segdiff_jax.data.sources.source import PairSource, Source, count_ids
from segdiff_jax.errors import UserError
from segdiff_jax.progress import Progress

_AT_ONCE = 64  # pairs


class Checked(NamedTuple):
    """Some pairs of a data set, or all."""

    pairs: int
    ids: Counter[int]  # id in the mask files: pixels
    images: Counter[int]  # class: pairs that show it
    pixels: Counter[int]  # class: pixels
    faults: list[str]  # what is wrong with a pair, a line each


class _Seen(NamedTuple):
    ids: dict[int, int]
    fault: str | None


def check(source: Source, config: DataConfig, numbers: list[int], progress: Progress) -> Checked:
    """Reads the pairs of these numbers in whole. Nothing is raised for what is wrong with them."""
    lookup = getattr(source, "lookup", None)
    ids: Counter[int] = Counter()
    shown: Counter[int] = Counter()
    faults = []
    for done, seen in enumerate(_seen(source, config, numbers), 1):
        ids.update(seen.ids)
        shown.update({class_of(value, lookup) for value in seen.ids})
        if seen.fault:
            faults.append(seen.fault)
        progress(done, len(numbers))
    return Checked(len(numbers), ids, shown, pixels_of_classes(ids, lookup), faults)


def pixels_of_classes(ids: Mapping[int, int], lookup: np.ndarray | None) -> Counter[int]:
    """Add up the pixels of each class (`class_of`) from those of each id in the mask files."""
    pixels: Counter[int] = Counter()
    for value, count in ids.items():
        pixels[class_of(value, lookup)] += count
    return pixels


def class_of(value: int, lookup: np.ndarray | None) -> int:
    """The class of an id in the mask files: `IGNORED` or `OUTSIDE` where it is none."""
    if lookup is None:
        return value
    return int(lookup[value]) if 0 <= value < len(lookup) else OUTSIDE


def _seen(source: Source, config: DataConfig, numbers: list[int]) -> Iterator[_Seen]:
    def look(number: int) -> _Seen:
        try:
            record = source[number]
            return _Seen(record.get("ids") or count_ids(record["labels"]), None)
        except UserError as error:  # unreadable files too
            return _Seen(_ids_of(source, config, number, error), str(error))

    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        for start in range(0, len(numbers), _AT_ONCE):
            yield from pool.map(look, numbers[start : start + _AT_ONCE])


def _ids_of(source: Source, config: DataConfig, number: int, error: UserError) -> dict[int, int]:
    """The ids of a mask that the source refuses, as far as it can be read."""
    if isinstance(error, UnreadableError) or not isinstance(source, PairSource):
        return {}
    try:
        mask = source.pairs[number][1]
        return count_ids(images.read_labels(mask, config.max_pixels, exif=config.exif))
    except UserError:
        return {}


def shift(ids: Counter[int], lookup: np.ndarray) -> str:
    """What the ids look like if they are not those of this layout, or "".

    Copies circulate in which every id is one too high or one too low. That is plain where ids that
    are no class become classes by the shift; where none is left over it can only be suspected: the
    last class never occurs, and the id below the first one does.
    """
    classes, found = np.flatnonzero(lookup >= 0), set(ids)
    known = {int(i) for i in np.flatnonzero(lookup != OUTSIDE)}
    ignored = {int(i) for i in np.flatnonzero(lookup == IGNORED)}
    outside = found - known
    largest = ignored & {255, 65535}
    for step, word in ((-1, "high"), (1, "low")):
        moved = {i + step for i in found - largest}
        if outside and all(i in known for i in moved - {int(classes[0]) - 1}):
            shown = ", ".join(map(str, sorted(outside)[:3]))
            return f"every id is one too {word}: {shown} are no classes, but would be by the shift"
    first, last = int(classes[0]), int(classes[-1])
    if not outside and first - 1 in found & ignored and last not in found and found & largest:
        return (
            f"ids may be one too low: {first - 1}, which is ignored, occurs and {last}, the last "
            "class, does not: is this a copy whose ids were shifted already?"
        )
    if not outside and first not in found and first == 0 and len(found & known) > 1:
        return "ids may be one too high: 0, the first class, never occurs"
    return ""
