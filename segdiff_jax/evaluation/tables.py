"""Results kept as JSON, shown as tables of a Markdown file: what a document says was measured."""

import datetime
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from segdiff_jax import files
from segdiff_jax.errors import UserError
from segdiff_jax.stored import read_object
from segdiff_jax.version import code_version

Shown = Callable[[Mapping[str, Any]], Mapping[str, Any]]

_TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def origin(command: str, argv: Sequence[str], places: Mapping[str | None, str]) -> dict[str, str]:
    """Return command, commit and date of a result.

    places: names for folders of this machine, which are words of argv or what a flag is set to.
    """
    words = [_placed(word, places) for word in argv]
    today = datetime.date.today().isoformat()
    return {
        "command": shlex.join([*command.split(), *words]),
        "commit": code_version(),
        "date": today,
    }


def _placed(word: str, places: Mapping[str | None, str]) -> str:
    if word in places:
        return places[word]
    flag, _, value = word.partition("=")
    return f"{flag}={places[value]}" if value in places else word


def section(about: Mapping[str, Any]) -> str:
    """Return a result as Markdown: its table, its verdict, and where its figures come from."""
    return _section(about, f"`{about['command']}`, commit `{about['commit']}`, {about['date']}.")


def _section(about: Mapping[str, Any], source: str) -> str:
    columns, *cells = [f"| {' | '.join(line)} |" for line in (about["columns"], *about["cells"])]
    table = "\n".join([columns, "|---" * len(about["columns"]) + "|", *cells])
    return "\n\n".join(part for part in (table, about.get("verdict"), source) if part) + "\n"


def to_json(about: Mapping[str, Any]) -> str:
    """Return a result as JSON with a line for each measurement and each row of its table."""
    text = files.to_json(about)  # no string in it has a line break
    text = re.sub(r"(?<=[\[{])\n {6,}|\n {4,}(?=[\]}])", "", text)
    return re.sub(r"\n {6,}", " ", text)


def rewrite(document: str | os.PathLike[str], shown: Shown = dict) -> list[str]:
    """Renew each table between `<!-- table: FILE.json -->` and `<!-- end of table -->`.

    FILE is relative to the document, which is to say itself by which command it was made. shown:
    makes what is to be shown of what FILE holds. Returns the files. Raises `UserError` for a
    document without such marks, and for a file that is no result.
    """
    path = Path(document)
    if not path.is_file():
        raise UserError(f"{path}: no such file, name a Markdown file")
    used: list[str] = []

    def renewed(match: re.Match[str]) -> str:
        used.append(match[2])
        about = shown(_read(path.parent / match[2]))
        text = _section(about, f"Commit `{about['commit']}`, {about['date']}.")
        return f"{match[1]}\n{text}\n{match[3]}"

    text = _TABLE.sub(renewed, path.read_text("utf-8"))
    if not used:
        raise UserError(f"{path}: has no line <!-- table: FILE.json -->: mark where tables go")
    files.write_text(path, text)
    return used


def _read(path: Path) -> dict[str, Any]:
    about = read_object(path, "run the study or suite again")
    if missing := {"columns", "cells", "command", "commit", "date"} - set(about):
        raise UserError(f"{path}: has no {min(missing)}: let the study run to its end")
    return about
