"""Class lists: names, synonyms and colours, in the order of their ids."""

import colorsys
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from etils import epath

from segdiff_jax.errors import UserError

_PACKAGED = Path(__file__).parent / "vocabularies"


@dataclass(frozen=True)
class ClassEntry:
    name: str
    synonyms: tuple[str, ...] = ()
    color: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Vocabulary:
    """The classes of a dataset or of a request; the id of a class is its position."""

    name: str
    classes: tuple[ClassEntry, ...]

    def __post_init__(self) -> None:
        if not self.classes:
            raise UserError(f"{self.name}: empty class list, name at least one class")
        seen: dict[str, str] = {}
        for entry in self.classes:
            if not entry.name:
                raise UserError(f"{self.name}: a class has an empty name, remove or name it")
            # CLIP lower-cases its input: "Sky" and "sky" would be the same prompt.
            key = entry.name.casefold()
            if key in seen:
                raise UserError(
                    f"{self.name}: duplicate class name {entry.name!r}, keep one of them"
                )
            seen[key] = entry.name

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.classes)

    def palette(self) -> np.ndarray:
        """uint8 [K, 3]: RGB of each id, the class's own or one made up for its id."""
        colors = [
            _fallback_color(i) if e.color is None else e.color for i, e in enumerate(self.classes)
        ]
        return np.array(colors, np.uint8)


def _fallback_color(i: int) -> tuple[int, int, int]:
    # Hues a golden angle apart stay distinct however many there are; saturation and value cycle.
    hue = (0.13 + 0.618033988749895 * i) % 1.0
    rgb = colorsys.hsv_to_rgb(hue, (0.85, 0.6, 0.95)[i % 3], (0.9, 0.75, 0.6, 1.0)[i % 4])
    red, green, blue = (round(255 * value) for value in rgb)
    return red, green, blue


def packaged() -> tuple[str, ...]:
    """Names of the vocabularies that ship with the package."""
    return tuple(sorted(path.stem for path in _PACKAGED.glob("*.json")))


def load(name_or_path: str | epath.PathLike) -> Vocabulary:
    """A packaged vocabulary by name, or a classes.txt (local or gs://) by path.

    classes.txt has one class a line, in id order: its name, then its synonyms, between commas.
    """
    text = str(name_or_path)
    if text in packaged():
        return _from_json(json.loads((_PACKAGED / f"{text}.json").read_text("utf-8")))
    path = epath.Path(name_or_path)
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(
            f"vocabulary {text!r}: no such file, and not one of {', '.join(packaged())}"
        ) from error
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{text}: not text in UTF-8, write one class name a line") from error
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        if not line.split(",")[0].strip():
            raise UserError(f"{text}:{number}: no class name, but every line is an id: fill it in")
    return from_names(lines, name=text)


def from_names(names: Iterable[str], name: str = "classes") -> Vocabulary:
    """Classes from "name, synonym, …" strings; the first comma ends the name."""
    if isinstance(names, str):
        names = [names]
    entries = []
    for text in names:
        first, *rest = (part.strip() for part in text.split(","))
        entries.append(ClassEntry(first, tuple(part for part in rest if part)))
    return Vocabulary(name, tuple(entries))


def _from_json(value: dict) -> Vocabulary:
    entries = [
        ClassEntry(c["name"], tuple(c["synonyms"]), tuple(c["color"]) if "color" in c else None)
        for c in value["classes"]
    ]
    return Vocabulary(value["name"], tuple(_distinct(entries)))


def _distinct(entries: Sequence[ClassEntry]) -> list[ClassEntry]:
    """ADE20K-847 has three classes called "bag", told apart by their synonyms only.

    The one without synonyms (else the first) keeps the name; the others take as their name the
    first of their synonyms that no class has.
    """
    keepers: dict[str, int] = {}
    for i, entry in enumerate(entries):
        if entry.name not in keepers or not entry.synonyms:
            keepers[entry.name] = i
    taken = set(keepers)
    result = []
    for i, entry in enumerate(entries):
        if keepers[entry.name] != i:
            name = next(synonym for synonym in entry.synonyms if synonym not in taken)
            taken.add(name)
            others = tuple(synonym for synonym in entry.synonyms if synonym != name)
            entry = ClassEntry(name, (entry.name, *others), entry.color)
        result.append(entry)
    return result
