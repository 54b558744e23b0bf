"""The numbered folders of checkpoints on a disk or in a bucket: which are complete, and whose.

On a local disk Orbax writes into `N.orbax-checkpoint-tmp` and renames it to `N`. A bucket cannot
rename: there Orbax writes into `N` and puts the file `MARKER` last. A copy may lack that file, so
its absence proves nothing. A folder `N` counts as left by a killed run only beside our own note
`N.writing`, or where Orbax's own file says that the write began and does not say that it ended.
"""

import contextlib
import glob
import json
import logging
import os
import unicodedata
from collections.abc import Iterator
from typing import Any

from etils import epath

from segdiff_jax.errors import UserError
from segdiff_jax.files import is_remote, reading, write_text

log = logging.getLogger(__name__)

MARKER = "commit_success.txt"  # Orbax's, as the next
_TIMES = "_CHECKPOINT_METADATA"
_ITEMS = ("state", "metadata")  # what each of our checkpoints holds
_NOTE = ".writing"

# gcsfs takes some of these for patterns in the names of objects, also when it deletes, and Orbax
# takes the others for the end of the name.
_NOT_IN_BUCKETS = "*?[]#;"


def check_path(path: os.PathLike[str] | str) -> None:
    """Raise `UserError` for a path under which checkpoints could not be written or read back."""
    text = os.fspath(path)
    where, forbidden = ("in a bucket", _NOT_IN_BUCKETS) if is_remote(text) else ("on a disk", "\\")
    bad = sorted(
        {c for c in text if c in forbidden or unicodedata.category(c) in ("Cc", "Cs")}
    )  # the categories: control characters, and bytes that are no UTF-8
    if bad:
        shown = " ".join(c if c in forbidden else ascii(c) for c in bad)
        readable = text.encode("utf-8", "backslashreplace").decode()
        raise UserError(
            f"{readable}: checkpoints cannot be kept {where} under a path with {shown} in it: "
            "choose another folder, or rename it"
        )


def settle(directory: epath.Path) -> None:
    """Remove what a killed run left unfinished in a bucket, and only that.

    On a local disk Orbax does so itself. Raises `UserError`, with nothing changed, where numbered
    folders hold something else than a complete checkpoint.
    """
    with reading(directory):
        unfinished, unknown = _sort(directory)
        if unknown:
            raise UserError(_explain(directory, unknown))
        for folder in unfinished:
            log.info("%s: left unfinished by a run that was killed: removed", folder)
            folder.rmtree()
        for note in _notes(directory):
            note.unlink()


def complaint(directory: epath.Path) -> str | None:
    """Describe, in one line, numbered folders that may be incomplete checkpoints, if there are."""
    _, unknown = _sort(directory)
    return _explain(directory, unknown) if unknown else None


def _explain(directory: epath.Path, unknown: list[epath.Path]) -> str:
    names = ", ".join(folder.name for folder in unknown)
    if not is_remote(directory):
        return (
            f"{directory}: folder {names} is no checkpoint of ours: move it away, or choose "
            "another --workdir (nothing was changed)"
        )
    return (
        f"{directory}: no {MARKER} in {names}, so they may be incomplete: copy them again with "
        f"that file, or put an empty {unknown[-1] / MARKER} where one is known to be whole, or "
        "move them away, or choose another --workdir (nothing was changed)"
    )


def numbered(directory: epath.Path) -> list[int]:
    """List the complete steps, as far as names and markers tell; none on errors."""
    with contextlib.suppress(Exception):
        found = [path for path in directory.iterdir() if path.name.isdecimal()]
        whole = [p for p in found if not is_remote(p) or (p / MARKER).exists()]
        return [int(path.name) for path in whole]
    return []


def _sort(directory: epath.Path) -> tuple[list[epath.Path], list[epath.Path]]:
    """Return the numbered folders with files that are surely unfinished, and those that may be."""
    unfinished: list[epath.Path] = []
    unknown: list[epath.Path] = []
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    for name in sorted((n for n in names if n.isdecimal()), key=int):
        folder = directory / name
        if not folder.is_dir() or not any(folder.iterdir()):
            continue
        if not is_remote(directory):
            if not any((folder / item).exists() for item in (_TIMES, *_ITEMS)):
                unknown.append(folder)
        elif not (folder / MARKER).exists():
            began, ended = _times(folder)
            ours = not ended and (began or f"{name}{_NOTE}" in names)
            (unfinished if ours else unknown).append(folder)
    return unfinished, unknown


def _times(folder: epath.Path) -> tuple[bool, bool]:
    """Return whether Orbax noted the beginning of the write of `folder`, and its end."""
    try:
        values = json.loads((folder / _TIMES).read_text())
        return bool(values["init_timestamp_nsecs"]), bool(values["commit_timestamp_nsecs"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False, False


def _notes(directory: epath.Path) -> list[epath.Path]:
    if not is_remote(directory) or not directory.is_dir():
        return []
    return [path for path in directory.iterdir() if path.name.endswith(_NOTE)]


def note(directory: epath.Path, step: int) -> None:
    """Note, before `step` is written, that its folder is ours to remove after a kill."""
    if is_remote(directory):
        write_text(directory / f"{step}{_NOTE}", "being written by segdiff_jax\n")


def forget(directory: epath.Path, step: int) -> None:
    """Remove the note after `step` is written."""
    if is_remote(directory):
        (directory / f"{step}{_NOTE}").unlink(missing_ok=True)


def scores(directory: epath.Path, steps: list[int], metric: str) -> dict[int, float]:
    """Return the finite values of `metric` that were saved with `steps`."""
    found = {}
    for step in steps:
        # A damaged file is no reason to give up the others.
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError, AttributeError):
            value = json.loads((directory / str(step) / "metrics" / "metrics").read_text())
            if isinstance(value.get(metric), int | float) and value[metric] == value[metric]:
                found[step] = float(value[metric])
    return found


def _glob_below(self: Any, pattern: str) -> Iterator[Any]:
    """Glob below a folder: `Path.glob` of etils takes brackets in its name for a pattern.

    After a write, Orbax globs for the parts of a checkpoint: in "g [x]" it found nothing.
    """
    if is_remote(self):
        return _glob(self, pattern)  # names in buckets hold no brackets: `check_path`
    return (self / name for name in glob.glob(pattern, root_dir=self))


_Path: Any = type(epath.Path())
_glob = _Path.glob
_Path.glob = _glob_below
