"""Class lists: names, synonyms and colours, in the order of their ids."""

import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from segdiff_jax import stored
from segdiff_jax.errors import UserError
from segdiff_jax.text import colors

log = logging.getLogger(__name__)

_PACKAGED = Path(__file__).parent / "vocabularies"
# In a classes.txt: a line that begins with #, or a # that stands alone. "#1 sign" is a name.
_COMMENT = re.compile(r"\s*#(?!\d)|.*\s#(\s|$)")
# Line and paragraph ends, control and format characters, halves of surrogate pairs.
_INVISIBLE = ("Zl", "Zp", "Cc", "Cf", "Cs")
_JOINERS = "\u200c\u200d"  # the format characters that some scripts write words with
_BLANKS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols without ink
_SHOWN_CLASSES, _SHOWN_SYNONYMS, _SHOWN_LETTERS = 12, 3, 40  # in a summary


@dataclass(frozen=True)
class ClassEntry:
    """A class.

    Raises `TypeError` if a name is no text or `synonyms` is one text, `ValueError` for a colour
    that is none.
    """

    name: str
    synonyms: tuple[str, ...] = ()  # their prompts are averaged with the name's
    color: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.synonyms, str):
            raise TypeError(
                f"ClassEntry: synonyms={self.synonyms!r} is one text: give a tuple of them"
            )
        object.__setattr__(self, "synonyms", tuple(self.synonyms))
        for name in self.names:
            if not isinstance(name, str):
                raise TypeError(f"ClassEntry: the name {name!r} is no text")
        if self.color is not None:
            object.__setattr__(self, "color", colors.rgb(self.color))

    @property
    def names(self) -> tuple[str, ...]:
        """The name, then its synonyms."""
        return (self.name, *self.synonyms)


@dataclass(frozen=True)
class Vocabulary:
    """The classes of a dataset or of a request; the id of a class is its position."""

    name: str
    classes: tuple[ClassEntry, ...]
    # Of each class, its part of the labelled pixels of a training, 0…1; () where nobody counted.
    shares: tuple[float, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if not self.classes:
            raise UserError(f"{self.name}: empty class list, name at least one class")
        seen: dict[str, str] = {}
        for entry in self.classes:
            for name in entry.names:
                _check_name(name, self.name)
            key = same_name(entry.name)
            if key in seen:
                raise UserError(
                    f"{self.name}: duplicate class name {shorten(entry.name)!r}, keep one of them"
                )
            seen[key] = entry.name

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.classes)

    def summary(self) -> str:
        """Describe the list in one line: "2 classes, 1 synonym: sky; brick (= wall)".

        What looks like several classes between commas gets a hint. Long lists are cut.
        """
        first, count = self.classes[0], len(self.classes)
        if count == 1 and first.synonyms:
            shown = " = ".join(_first(first.names, 1 + _SHOWN_SYNONYMS))
            hint = f": {SEPARATE_CLASSES}" if looks_like_several(first) else ""
            return f"1 class ({shown}){hint}"
        synonyms = sum(len(entry.synonyms) for entry in self.classes)
        said = ", ".join(
            [_count(count, "class"), *([_count(synonyms, "synonym")] * (synonyms > 0))]
        )
        described = []
        for entry in self.classes[:_SHOWN_CLASSES]:
            others = ", ".join(_first(entry.synonyms, _SHOWN_SYNONYMS))
            described.append(shorten(entry.name) + (f" (= {others})" if others else ""))
        if count > _SHOWN_CLASSES:
            described.append(f"and {count - _SHOWN_CLASSES} more")
        return f"{said}: {'; '.join(described)}"

    def palette(self) -> np.ndarray:
        """Return RGB of each id, uint8 [K, 3]: the class's own or one made up for its id."""
        own = (entry.color for entry in self.classes)
        return np.array([c or colors.made_up(i) for i, c in enumerate(own)], np.uint8)


SEPARATE_CLASSES = (
    'commas stand between synonyms: if these are several classes, write ";" between them, '
    "or one a line in a file, or one a string in Python"
)


def looks_like_several(entry: ClassEntry) -> bool:
    """Return whether the only class of a list was probably meant as a list."""
    return len(entry.synonyms) > 1


def same_name(name: str) -> str:
    """Return equal keys for names that CLIP's tokenizer, which lower-cases, cannot tell apart."""
    plain = unicodedata.normalize("NFC", name).casefold()
    return " ".join(plain.translate({ord(c): None for c in _JOINERS}).split())


def shorten(text: str, letters: int = _SHOWN_LETTERS) -> str:
    """Shorten `text` for a message to at most `letters`."""
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _first(names: Sequence[str], count: int) -> list[str]:
    more = [f"{len(names) - count} more"] if len(names) > count else []
    return [shorten(name) for name in names[:count]] + more


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def _check_name(name: str, source: str) -> None:
    """Raise `UserError`, with what is invisible spelt out, for a name that cannot be seen."""
    ends = {name[:1], name[-1:]}
    bad = [c for c in name if _invisible(c) and not (c in _JOINERS and c not in ends)]
    if bad:
        raise UserError(
            f"{source}: the class name '{visible(name)}' holds the invisible character "
            f"{visible(bad[0])}: remove it"
        )
    if not name:
        raise UserError(f"{source}: a class has an empty name, remove or name it")
    if not any(unicodedata.category(c)[0] in "LNPS" for c in name):
        raise UserError(f"{source}: the class name {ascii(name)} shows nothing, remove or name it")


def _invisible(character: str) -> bool:
    return unicodedata.category(character) in _INVISIBLE or character in _BLANKS


def visible(text: str) -> str:
    """Escape, for a message, what in `text` cannot be seen or would upset a terminal."""
    return "".join(ascii(c)[1:-1] if _invisible(c) else c for c in shorten(text))


def packaged() -> tuple[str, ...]:
    """List the names of the vocabularies that ship with the package.

    Where a benchmark gives several classes one name (ADE20K-847 has three called "bag"), all but
    one are listed there under the first of their synonyms that no class has.
    """
    return tuple(sorted(path.stem for path in _PACKAGED.glob("*.json")))


def load(name_or_path: str | epath.PathLike) -> Vocabulary:
    """Load a packaged vocabulary by name, or a classes.txt or .json (local or gs://) by path.

    classes.txt has one class a line, in id order: its name, then its synonyms, between commas.
    A .json is the `classes.json` of a training. Raises `UserError` for what is neither.
    """
    text = str(name_or_path)
    if text in packaged():
        return _from_object(stored.read_object(_PACKAGED / f"{text}.json"), text)
    if text.endswith(".json"):
        return _from_object(stored.read_object(name_or_path, "name the file of a class list"), text)
    mend = f"give a file in UTF-8 with one class name a line, or one of {', '.join(packaged())}"
    return _from_lines(stored.read_text(name_or_path, mend), text)


def _from_lines(content: str, path: str) -> Vocabulary:
    # Not splitlines(): it also cuts at characters that are no line end to any editor.
    lines = content.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        if not line.split(",")[0].strip():
            raise UserError(f"{path}:{number}: no class name, but every line is an id: fill it in")
        if _COMMENT.match(line):
            raise UserError(
                f"{path}:{number}: '{visible(line.strip())}' looks like a comment, but every "
                "line is a class: remove it"
            )
    return from_names(lines, name=path)


def from_names(names: Iterable[str], name: str = "classes") -> Vocabulary:
    """Build a vocabulary from "name, synonym, …" strings; the first comma ends the name."""
    if isinstance(names, str):
        names = [names]
    return Vocabulary(name, tuple(entry_from(text, name) for text in names))


def entry_from(text: str, source: str = "classes") -> ClassEntry:
    """Parse "name, synonym, …". Raise `UserError` for ";", which stands between classes."""
    if ";" in text:
        raise UserError(
            f"{source}: '{visible(text.strip())}' holds a semicolon, which stands between classes: "
            "give each class a line in a file, or a string of its own in Python"
        )
    first, *rest = (part.strip() for part in text.split(","))
    return ClassEntry(first, tuple(part for part in rest if part))


def first_difference(classes: Sequence[ClassEntry], others: Sequence[ClassEntry]) -> str:
    """Say where the names of `others` first differ: "class 2 is 'sky', not 'road'"."""
    for number, (one, other) in enumerate(zip(classes, others, strict=False)):
        if same_name(one.name) != same_name(other.name):
            return f"class {number} is {shorten(other.name)!r}, not {shorten(one.name)!r}"
    if len(classes) == len(others):
        return ""
    return f"there are {len(others)} classes, not {len(classes)}"


def with_shares(wanted: Vocabulary, trained: Vocabulary | None) -> Vocabulary:
    """Return `wanted` with the shares that `trained` has for classes of these names or synonyms.

    A class that the training did not know gets their median: it is neither rare nor common.
    Raise `UserError` as `known_shares` does.
    """
    known, median = known_shares(trained)
    shares = tuple(known.get(same_name(name), median) for name in wanted.names)
    return replace(wanted, shares=shares)


def known_shares(trained: Vocabulary | None) -> tuple[dict[str, float], float]:
    """Return the share of each name and synonym, as `same_name` has them, and the median share.

    Raise `UserError` if the training counted none.
    """
    if trained is None or not trained.shares:
        raise UserError(
            "this model does not say how often its classes occurred in training: set "
            "config.codec.logit_adjustment to 0"
        )
    pairs = list(zip(trained.classes, trained.shares, strict=True))
    synonyms = {same_name(name): share for entry, share in pairs for name in entry.synonyms}
    names = {same_name(entry.name): share for entry, share in pairs}
    return synonyms | names, float(np.median(trained.shares))


def check_known(
    classes: Sequence[ClassEntry], trained: Vocabulary | None, classes_per_pass: int
) -> None:
    """Raise `UserError` if a model of one gray image for all classes has not learnt `classes`.

    Its gray levels stand for the classes of the training, whatever the text says. A model with
    another `classes_per_pass` reads names, and takes any. Synonyms may differ.
    """
    if classes_per_pass or (len(classes) == 1 and (trained is None or len(trained) == 1)):
        return
    if trained is None:
        log.warning(
            "the checkpoint does not say which classes it was trained with (it is of an earlier "
            "version): it paints them into one gray image, so only the same list in the same "
            "order has a meaning"
        )
        return
    difference = first_difference(classes, trained.classes)
    if difference:
        raise UserError(
            f"this model paints all classes into one gray image and knows only the list it was "
            f"trained with, where {difference}: ask for all of {trained.name}, in that order"
        )


def to_json(vocabulary: Vocabulary) -> str:
    """Serialise what `load` reads from a `.json` file: names, synonyms, … in id order."""
    classes: list[dict[str, Any]] = [
        {"name": e.name, "synonyms": list(e.synonyms)}
        | ({} if e.color is None else {"color": [int(c) for c in e.color]})
        for e in vocabulary.classes
    ]
    for entry, share in zip(classes, vocabulary.shares, strict=False):
        entry["share"] = share
    value = {"name": vocabulary.name, "classes": classes}
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _from_object(value: dict[str, Any], name: str) -> Vocabulary:
    try:
        classes = value["classes"]
        entries = [ClassEntry(c["name"], c["synonyms"], c.get("color")) for c in classes]
        shares = tuple(float(c["share"]) for c in classes if "share" in c)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{name}: no class list of this program ({reason}): correct it") from error
    return Vocabulary(name, tuple(entries), shares if len(shares) == len(entries) else ())
