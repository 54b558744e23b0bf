"""Files that another program, version or person wrote: read, or said what is wrong with them.

A stored JSON file is any JSON at all, and often enough no JSON: what a clone without git-lfs leaves
in place of a file, or the page on which a server asks for a password.
"""

import json
from typing import Any, NoReturn

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


def parse_object(data: bytes, path: Any, mend: str = "fetch it again") -> dict[str, Any]:
    """The JSON object in `data`, the contents of `path`. NaN and infinity are no JSON.

    Raises `UserError` that names the file, what is wrong with it, and the `mend`.
    """
    reason = instead(data)
    if reason:
        raise UserError(f"{path}: {reason}")
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_no_json)
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply to be such a file: {mend}") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}): {mend}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object: {mend}")
    return value


def _no_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
