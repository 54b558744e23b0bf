"""What the pairs of a data set show, and what is wrong with them or nearly always a mistake.

Before a training and an evaluation as many pairs are looked at as two seconds allow (`report`);
`segdiff data check` reads all of them.
"""

import contextlib
import dataclasses
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from segdiff_jax import codec
from segdiff_jax.config import DataConfig
from segdiff_jax.data import chance, chunks, images
from segdiff_jax.data.images import UnreadableError
from segdiff_jax.data.sources.layouts import IGNORED, OUTSIDE
from segdiff_jax.data.sources.source import ForeignIdError, Look, PairSource, Source, count_ids
from segdiff_jax.errors import UserError
from segdiff_jax.progress import Progress

log = logging.getLogger(__name__)

_SECONDS = 2.0  # after which `report` looks at no more pairs
_AT_ONCE = 32  # pairs looked at together, and at least
_NAMES_SHOWN = 5
_BACKGROUND_WORDS = {
    *("background", "bg", "other", "others", "void", "unlabeled", "unlabelled", "unknown"),
    *("none", "nothing", "no", "non", "not", "clutter", "rest"),
}


@dataclasses.dataclass
class Survey:
    """What some pairs of a data set show, or all."""

    pairs: int = 0  # looked at
    ids: Counter[int] = dataclasses.field(default_factory=Counter)  # in the mask files: pixels
    images: Counter[int] = dataclasses.field(default_factory=Counter)  # class: pairs that show it
    faults: list[UserError] = dataclasses.field(default_factory=list)  # one a pair that has one
    turn_unsure: int = 0  # photos turned by EXIF whose masks may or may not be turned
    guessed: Counter[int] = dataclasses.field(default_factory=Counter)  # range of 16 bits: photos

    def add(self, look: Look | UserError, lookup: np.ndarray | None) -> None:
        """Count one pair more, or what is wrong with it."""
        self.pairs += 1
        if isinstance(look, UserError):
            self.faults.append(look)
            look = Look(look.ids if isinstance(look, ForeignIdError) else {})
        self.ids.update(look.ids)
        self.images.update({class_of(value, lookup) for value in look.ids})
        self.turn_unsure += look.turn_unsure
        self.guessed.update([look.guessed_max] if look.guessed_max else [])


def survey(
    source: Source,
    numbers: Sequence[int],
    *,
    whole: bool = False,
    seconds: float = math.inf,
    progress: Progress = lambda done, total: None,
) -> Survey:
    """Look at the pairs of these numbers until the time is up. Raise nothing for what is wrong.

    whole: decode the photos too, which finds all damage.
    """
    found, end = Survey(), time.monotonic() + seconds

    def look(number: int) -> Look | UserError:
        try:
            if isinstance(source, PairSource):
                return source.look(number, whole)
            return Look(count_ids(source[number]["labels"]))
        except UserError as error:
            return error

    with contextlib.closing(chunks.read_ahead(look, numbers, _AT_ONCE)) as looks:
        for some in looks:
            for one in some:
                found.add(one, getattr(source, "lookup", None))
            progress(found.pairs, len(numbers))
            if time.monotonic() > end:
                break
    return found


def report(source: Source, config: DataConfig, split: str) -> tuple[float, ...]:
    """Log the labels of up to two seconds' worth of pairs, spread over `source`, in a line.

    Return the part of the labelled pixels that each class has, 0…1.

    What is nearly always a mistake gets a warning of its own. Drawn and packed data sets, whose
    labels are as they must be, are passed over, and give (). Raises `UserError` for a wrong mask,
    and if no pixel has a class.
    """
    if not isinstance(source, PairSource):
        return ()
    order = chance.generator(0, "labels").permutation(len(source)).tolist()
    found = survey(source, order, seconds=_SECONDS)
    for fault in found.faults:
        if not isinstance(fault, UnreadableError):  # training counts these, evaluation names them
            raise fault
    log.info("labels of %r: %s", split, _line(source, found))
    if nothing := unlabelled(source, config, split, found):
        raise UserError(nothing)
    for warning in (*warnings(source, config, split, found), suspicion(source, config, found)):
        if warning:
            log.warning("labels of %r: %s", split, warning)
    pixels = pixels_of_classes(found.ids, source.lookup)
    each = [pixels[number] for number in range(len(source.vocabulary))]
    return tuple(round(count / sum(each), 6) for count in each) if any(each) else ()


def figures(source: Source, ids: Mapping[int, int], pairs: int) -> dict[str, Any]:
    """Return what metrics.json says of the labels; `ids`: pixels of each id of the mask files."""
    total, lookup = sum(ids.values()), getattr(source, "lookup", None)
    pixels = pixels_of_classes(ids, lookup)
    names = source.vocabulary.names
    ignored = codec.ignore_label(len(names)) if lookup is None else IGNORED
    return {
        "pairs": pairs,
        "ids": sorted(ids),
        "absent_classes": [name for i, name in enumerate(names) if not pixels[i]],
        "share_ignored": pixels[ignored] / total if total else None,
    }


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


def ranges(ids: Iterable[int]) -> str:
    """Write ids as "0–10, 255"."""
    runs: list[list[int]] = []
    for value in sorted(ids):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in runs)


def unlabelled(source: Source, config: DataConfig, split: str, found: Survey) -> str:
    """Say that all is ignored, and what to do, or ""."""
    if figures(source, found.ids, found.pairs)["share_ignored"] != 1:
        return ""
    keys = ", or config.data.ignore_ids, config.data.first_id and config.data.mask_values"
    return (
        f"{config.root}: every labelled pixel of split {split!r} is ignored (ids "
        f"{ranges(found.ids)}): correct the masks{keys if config.source == 'folder' else ''}"
    )


def warnings(source: Source, config: DataConfig, split: str, found: Survey) -> Iterator[str]:
    """Say what is nearly always a mistake, a line each."""
    if nothing := unlabelled(source, config, split, found):
        yield nothing
    if not isinstance(source, PairSource):
        return
    readable = found.pairs - len(found.faults)
    if config.source == "folder":
        yield from _of_ids(source, found)
    if shifted := _shift(found.ids, source.lookup):
        yield shifted
    if found.turn_unsure:
        yield (
            f"{found.turn_unsure} of {readable} photos are turned by an EXIF tag that their "
            "masks do not have: if the masks were drawn on the stored pixels, set "
            "config.data.exif=ignore"
        )
    if found.guessed:
        yield images.guessed_range(found.guessed, readable)


def _of_ids(source: PairSource, found: Survey) -> Iterator[str]:
    names, classes = source.vocabulary.names, _named(source, found)
    if set(found.ids) == {0, 255} and 0 in classes and 255 not in classes:
        absent = [name for number, name in enumerate(names) if not found.images[number]]
        lost = f"{_listed(absent)} would not be learnt" if absent else "nothing else is learnt"
        yield (
            f"the masks hold only 0 and 255, and 255 is *ignore*: {lost}. If 255 is the object, "
            "list two classes, background first, and set --config.data.mask_values=0,255 "
            "--config.data.ignore_ids=()"
        )
    elif len(classes) == 1 < len(names):
        ((value, name),) = classes.items()
        only = f"{name!r} (id {value})"
        yield f"all that is not ignored is {only}: there is nothing to tell apart, check the masks"


def suspicion(source: Source, config: DataConfig, found: Survey) -> str:
    """Say what is often a mistake, but may be as it should, or ""."""
    if config.source != "folder" or not isinstance(source, PairSource):
        return ""
    classes = _named(source, found)
    commonest = max(classes, key=lambda value: found.ids[value], default=None)
    if commonest != 0 or len(classes) < 2 or any(map(_is_background, source.vocabulary.names)):
        return ""
    return (
        f"the commonest id is 0, which is {classes[0]!r}, and no class is called background: "
        "if 0 is background and the ids of the classes begin with 1, set "
        "config.data.first_id=1, or begin the class list with background"
    )


def _named(source: PairSource, found: Survey) -> dict[int, str]:
    """Return the ids of the mask files that are classes, and the names of these."""
    numbers = {value: class_of(value, source.lookup) for value in found.ids}
    return {
        value: source.vocabulary.names[number] for value, number in numbers.items() if number >= 0
    }


def _shift(ids: Mapping[int, int], lookup: np.ndarray) -> str:
    """Say that the ids look as if they were not those of this layout, or "".

    Copies circulate in which every id is one too high or one too low. That is likely where ids that
    are no class become classes by the shift; where none is left over, the last class alone never
    occurs, and the id below the first one does.
    """
    classes, found = np.flatnonzero(lookup >= 0).tolist(), set(ids)
    known = set(np.flatnonzero(lookup != OUTSIDE).tolist())
    ignored = set(np.flatnonzero(lookup == IGNORED).tolist())
    outside, largest, below = found - known, ignored & {255, 65535}, classes[0] - 1
    for step, word, other in ((-1, "high", "lower"), (1, "low", "higher")):
        if outside and {i + step for i in found - largest} <= known | {below}:
            *first, last = map(str, sorted(outside)[:3])
            which = f"{', '.join(first)} and {last} are no classes; one {other}, they would be"
            which = which if first else f"{last} is no class; one {other}, it would be"
            return f"every id may be one too {word}: {which}"
    last_only = set(classes) - found == {classes[-1]}
    if not outside and last_only and below in found & ignored and found & largest:
        return (
            f"ids may be one too low: {below}, which is ignored, occurs and {classes[-1]}, the "
            "last class, does not: is this a copy whose ids were shifted already?"
        )
    return ""


def _line(source: PairSource, found: Survey) -> str:
    about = figures(source, found.ids, found.pairs)
    unreadable = len(found.faults)
    parts = [f"{found.pairs - unreadable} of {len(source)} pairs seen"]
    if unreadable:
        parts.append(f"{unreadable} unreadable")
    if found.ids:
        parts += [f"ids {ranges(found.ids)}", f"{about['share_ignored']:.1%} ignored"]
        absent = about["absent_classes"]
        parts.append(f"no pair shows {_listed(absent)}" if absent else "all classes occur")
    return ", ".join(parts)


def _is_background(name: str) -> bool:
    words = name.casefold().replace("-", " ").replace("_", " ").split()
    return not _BACKGROUND_WORDS.isdisjoint(words)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(repr(name) for name in names[:_NAMES_SHOWN]) + more
