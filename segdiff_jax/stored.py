"""Files that another program, version or person wrote: read, or said what is wrong with them.

A stored JSON file is any JSON at all, and often enough no JSON: what a clone without git-lfs leaves
in place of a file, or the page on which a server asks for a password.
"""

import json
from typing import Any, NoReturn

from etils import epath

from segdiff_jax import files
from segdiff_jax.errors import UserError

HEAD = 512  # bytes from the start of a file that `instead` wants to see

_LFS = b"version https://git-lfs.github.com/spec/"
_HTML = (b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--")


def instead(head: bytes) -> str | None:
    """What stands in place of a file that begins with `head`, and the mend; None if nothing known.

    For messages of the form "PATH: {instead}".
    """
    begin = head[:HEAD].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if begin.startswith(_LFS):
        return "a git-lfs pointer in place of the file: run `git lfs pull` in its folder"
    if begin.startswith(_HTML):
        return "an HTML page in place of the file: download it again (does it ask for a login?)"
    if not begin:
        return "an empty file: fetch it again"
    return None


def read_text(path: epath.PathLike, mend: str = "fetch it again") -> str:
    """The text of a UTF-8 file, local or `gs://`.

    Raises `UserError` that names the file, what is wrong with it, and the `mend`.
    """
    try:
        with files.reading(path):
            data = epath.Path(path).read_bytes()
        reason = instead(data)
        if reason:
            raise UserError(f"{path}: {reason}")
        return data.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file: {mend}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}): {mend}") from error


def read_object(path: epath.PathLike, mend: str = "fetch it again") -> dict[str, Any]:
    """The JSON object in a file. NaN and infinity are no JSON. Raises as `read_text` does."""
    try:
        value = json.loads(read_text(path, mend), parse_constant=_no_json)
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply to be such a file: {mend}") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}): {mend}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object: {mend}")
    return value


def _no_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
