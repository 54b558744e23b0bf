"""One line on what the labels of a data set hold, logged before a training or an evaluation."""

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from segdiff_jax import codec
from segdiff_jax.config import DataConfig
from segdiff_jax.data import chance, images
from segdiff_jax.data.images import UnreadableError
from segdiff_jax.data.sources.layouts import IGNORED
from segdiff_jax.data.sources.source import Look, PairSource, Source
from segdiff_jax.data.survey import pixels_of_classes
from segdiff_jax.errors import UserError

log = logging.getLogger(__name__)

_SECONDS = 2.0  # after which no more pairs are read
_AT_ONCE = 32  # pairs read together, and at least
_NAMES_SHOWN = 5
_BACKGROUND_WORDS = {
    *("background", "bg", "other", "others", "void", "unlabeled", "unlabelled", "unknown"),
    *("none", "nothing", "no", "non", "not", "clutter", "rest"),
}


class Survey(NamedTuple):
    """Some pairs of a data set, or all."""

    seen: int  # pairs
    total: int  # pairs
    ids: Counter[int]  # id in the mask files: pixels
    unreadable: int  # pairs
    turn_unsure: int  # photos turned by EXIF whose masks may or may not be turned
    guessed: Counter[int]  # range by which a 16-bit photo was read: photos


def report(source: Source, config: DataConfig, split: str) -> tuple[float, ...]:
    """Log the labels of up to two seconds' worth of pairs, spread over `source`, in a line.

    Return the part of the labelled pixels that each class has, 0…1.

    What is nearly always a mistake gets a warning of its own. Drawn and packed data sets, whose
    labels are as they must be, are passed over, and give (). Raises `UserError` for a wrong mask,
    and if no pixel has a class.
    """
    if not isinstance(source, PairSource):
        return ()
    survey = _survey(source)
    found = figures(source, survey.ids, survey.seen)
    log.info("labels of %r: %s", split, _line(found, survey))
    if survey.ids and found["share_ignored"] == 1:
        raise UserError(
            f"{config.root}: every labelled pixel of split {split!r} is ignored (ids "
            f"{_ranges(found['ids'])}): correct the masks{_ignore_keys(config)}"
        )
    for warning in _warnings(source, config, survey, found):
        log.warning("labels of %r: %s", split, warning)
    pixels = pixels_of_classes(survey.ids, getattr(source, "lookup", None))
    each = [pixels[number] for number in range(len(source.vocabulary))]
    return tuple(round(count / sum(each), 6) for count in each) if sum(each) else ()


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


def _survey(source: PairSource) -> Survey:
    ids: Counter[int] = Counter()
    guessed: Counter[int] = Counter()
    seen = unreadable = unsure = 0
    for look in _looks(source):
        if look is None:
            unreadable += 1
            continue
        seen += 1
        ids.update(look.ids)
        unsure += look.turn_unsure
        if look.guessed_max:
            guessed[look.guessed_max] += 1
    return Survey(seen, len(source), ids, unreadable, unsure, guessed)


def _looks(source: PairSource) -> Iterator[Look | None]:
    """Yield pairs spread over the source until the time is up; None for unreadable ones."""

    def look(index: int) -> Look | None:
        try:
            return source.look(index)
        except UnreadableError:
            return None  # training counts these, and evaluation names them

    order = chance.generator(0, "labels").permutation(len(source)).tolist()
    end = time.monotonic() + _SECONDS
    with ThreadPoolExecutor(min(_AT_ONCE, 2 * (os.cpu_count() or 1))) as pool:
        for start in range(0, len(order), _AT_ONCE):
            if start and time.monotonic() > end:
                return
            yield from pool.map(look, order[start : start + _AT_ONCE])


def _line(found: dict[str, Any], survey: Survey) -> str:
    parts = [f"{survey.seen} of {survey.total} pairs seen"]
    if survey.unreadable:
        parts.append(f"{survey.unreadable} unreadable")
    if survey.ids:
        parts += [f"ids {_ranges(found['ids'])}", f"{found['share_ignored']:.1%} ignored"]
        absent = found["absent_classes"]
        parts.append(f"no pair shows {_listed(absent)}" if absent else "all classes occur")
    return ", ".join(parts)


def _warnings(
    source: PairSource, config: DataConfig, survey: Survey, found: dict[str, Any]
) -> Iterator[str]:
    configurable = config.source == "folder"
    if configurable and survey.ids:
        yield from _id_warnings(source, survey.ids, found)
    if survey.turn_unsure:
        yield (
            f"{survey.turn_unsure} of {survey.seen} photos are turned by an EXIF tag that their "
            "masks do not have: if the masks were drawn on the stored pixels, set "
            "config.data.exif=ignore"
        )
    if survey.guessed:
        yield images.guessed_range(survey.guessed, survey.seen)


def _id_warnings(
    source: PairSource, ids: Mapping[int, int], found: dict[str, Any]
) -> Iterator[str]:
    names, lookup = source.vocabulary.names, source.lookup
    classes = {value: names[lookup[value]] for value in ids if lookup[value] != IGNORED}
    commonest = max(classes, key=lambda value: ids[value])
    if set(ids) == {0, 255} and 0 in classes and 255 not in classes:
        absent = found["absent_classes"]
        lost = f"{_listed(absent)} would not be learnt" if absent else "nothing else is learnt"
        yield (
            f"the masks hold only 0 and 255, and 255 is *ignore*: {lost}. If 255 is the object, "
            "list two classes, background first, and set --config.data.mask_values=0,255 "
            "--config.data.ignore_ids=()"
        )
    elif len(classes) == 1 < len(names):
        only = f"{classes[commonest]!r} (id {commonest})"
        yield f"all that is not ignored is {only}: there is nothing to tell apart, check the masks"
    elif commonest == 0 and not any(map(_is_background, names)):
        yield (
            f"the commonest id is 0, which is {classes[0]!r}, and no class is called background: "
            "if 0 is background and the ids of the classes begin with 1, set "
            "config.data.first_id=1, or begin the class list with background"
        )


def _is_background(name: str) -> bool:
    words = name.casefold().replace("-", " ").replace("_", " ").split()
    return not _BACKGROUND_WORDS.isdisjoint(words)


def _ignore_keys(config: DataConfig) -> str:
    keys = "config.data.ignore_ids, config.data.first_id and config.data.mask_values"
    return f", or {keys}" if config.source == "folder" else ""


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(repr(name) for name in names[:_NAMES_SHOWN]) + more


def _ranges(ids: Sequence[int]) -> str:
    """Write sorted ids as "0–10, 255"."""
    runs: list[list[int]] = []
    for value in ids:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in runs)
