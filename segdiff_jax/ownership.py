"""Which files of a folder are ours: the only ones that a command replaces or deletes.

A folder that a command writes into holds `MARKER`, JSON that lists by kind ("prediction",
"diffusers", …) the files written there. It is written before the first of them and names them all,
so that whenever a command is killed, the next one knows what is its own.

`claimed` is for a folder that may hold other files too, `whole_folder` for one that is replaced as
a whole.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath

from etils import epath

from segdiff_jax import __version__, files
from segdiff_jax.errors import UserError

MARKER = ".segdiff_files.json"

Owned = dict[str, frozenset[str]]  # kind -> names, relative to the folder, with "/"


def owned(directory: os.PathLike[str] | str) -> Owned:
    """What the marker in `directory` lists; {} where there is none.

    Raises `UserError` for a marker that is damaged or cannot be read.
    """
    try:
        with files.reading(directory):
            path = epath.Path(directory) / MARKER
            data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}: choose another folder") from error
    try:
        found = json.loads(data)["files"]
        lists = {str(kind): frozenset(names) for kind, names in found.items()}
        if not all(map(_is_inside, frozenset().union(*lists.values()))):
            raise ValueError("a name that is not inside the folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged: choose another folder, or remove this file; what it listed then "
            "counts as yours"
        ) from error
    return lists


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def is_ours(path: os.PathLike[str] | str) -> bool:
    """Whether the marker beside `path` lists it, under any kind."""
    place = epath.Path(path)
    return any(place.name in names for names in owned(place.parent).values())


def check(directory: os.PathLike[str] | str, kind: str, names: Collection[str]) -> None:
    """Raises `UserError` if files `names` in `directory` would replace one that is not listed.

    Also where the folder cannot be made or written to, as far as `files.check_place` sees. Writes
    nothing.
    """
    files.check_place(directory)
    folder, listed = epath.Path(directory), owned(directory)
    present = _present(folder, names)
    links = [name for name in sorted(present) if os.path.islink(folder / name)]
    if links:
        raise UserError(
            f"{folder / links[0]}: a link, through which a file elsewhere would be replaced: "
            "remove it or choose another folder"
        )
    foreign = sorted(present - listed.get(kind, frozenset()))
    if not foreign:
        return
    place = folder / foreign[0]
    for other, theirs in listed.items():
        if foreign[0] in theirs:
            raise UserError(f"{place}: is part of the {other} here: choose another folder")
    more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
    raise UserError(
        f"{place}{more}: would be replaced, but no {MARKER} says that this command wrote it: "
        "choose another folder, or move the old files away"
    )


def _present(folder: epath.Path, names: Collection[str]) -> set[str]:
    """Those of `names` that exist in `folder`, as whatever it may be."""
    return _below(folder, {os.path.dirname(name) for name in names}) & set(names)


def _below(folder: epath.Path, parents: Collection[str]) -> set[str]:
    """The names of what lies directly in the folders `parents` of `folder`."""
    found = {os.path.join(parent, n) for parent in parents for n in _entries(folder / parent)}
    return {os.path.normpath(name) for name in found}


def _entries(folder: epath.Path) -> set[str]:
    """The names in a folder; none where there is no such folder."""
    with files.writing(folder):
        try:
            return {path.name for path in folder.iterdir()}
        except (FileNotFoundError, NotADirectoryError):
            return set()


def claim(
    directory: os.PathLike[str] | str, kind: str, names: Collection[str], checked: bool = True
) -> None:
    """Lists `names` in the marker of `directory`, beside what it lists already; then write them.

    Makes the folder. That the marker can be written proves that files can, before hours of work.
    Raises `UserError` as `check` does, and where that fails. Not `checked` where something else
    tells that `names` are ours: the lock and the config of a training.
    """
    if checked:
        check(directory, kind, names)
    listed = owned(directory)
    _write_marker(directory, listed | {kind: listed.get(kind, frozenset()) | set(names)})


def release_unwritten(directory: os.PathLike[str] | str, kind: str, names: Collection[str]) -> None:
    """Takes those of `names` off the list that were not written: such files would not be ours."""
    listed = owned(directory)
    missing = set(names) - _present(epath.Path(directory), names)
    remaining = listed | {kind: listed.get(kind, frozenset()) - missing}
    if any(remaining.values()):
        _write_marker(directory, remaining)
    else:
        with files.writing(directory):
            (epath.Path(directory) / MARKER).unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(
    directory: os.PathLike[str] | str, kind: str, names: Collection[str], checked: bool = True
) -> Iterator[None]:
    """`claim` before the block that writes the files `names`, `release_unwritten` after it."""
    claim(directory, kind, names, checked)
    try:
        yield
    except BaseException:
        with contextlib.suppress(UserError):  # what stopped the block may stop this: a full disk
            release_unwritten(directory, kind, names)
        raise
    release_unwritten(directory, kind, names)


def _write_marker(directory: os.PathLike[str] | str, listed: Mapping[str, Collection[str]]) -> None:
    about = {
        "about": "what segdiff_jax wrote here, by kind, and may therefore replace or delete",
        "version": __version__,
        "files": {kind: sorted(listed[kind]) for kind in sorted(listed) if listed[kind]},
    }
    files.write_json(epath.Path(directory) / MARKER, about)


def check_whole(directory: os.PathLike[str] | str, kind: str) -> None:
    """Raises `UserError` unless `directory` is new, empty, or holds what its marker lists alone.

    Also where it cannot be made or written to, as far as `files.check_place` sees, and where it
    would be taken away under a shell. Writes nothing.
    """
    files.check_place(directory)
    folder = epath.Path(directory)
    if not files.is_remote(directory) and _lies_in(os.curdir, os.fspath(directory)):
        raise UserError(
            f"{folder}: is or holds the folder you are in, and would be replaced: go to another one"
        )
    inside = sorted(_entries(folder) - {MARKER})
    if not inside:
        return
    listed = owned(directory)
    for other in sorted(set(listed) - {kind}):
        raise UserError(f"{folder}: holds {other} files of segdiff_jax: choose another folder")
    if not listed:
        raise UserError(
            f"{folder}: is not empty and has no {MARKER} that says this command wrote it "
            f"(there is {inside[0]}): choose another folder, or remove it yourself"
        )
    foreign = _foreign(folder, listed[kind])
    if foreign:
        raise UserError(
            f"{folder / foreign[0]}: is no part of the export in this folder, which would be "
            "replaced: move it away or choose another folder"
        )


def _foreign(folder: epath.Path, listed: Collection[str]) -> list[str]:
    """Names in `folder` that are neither listed nor folders of what is, in order."""
    above = {parent.as_posix() for name in listed for parent in PurePosixPath(name).parents}
    inside = _below(folder, above)
    foreign = inside - set(listed) - above - {MARKER}
    if not files.is_remote(folder):
        foreign |= {name for name in above if os.path.islink(folder / name) and name != "."}
        foreign |= {name for name in inside & set(listed) if os.path.isdir(folder / name)}
    return sorted(foreign)


@contextlib.contextmanager
def whole_folder(
    directory: os.PathLike[str] | str, kind: str, names: Collection[str], last: str
) -> Iterator[epath.Path]:
    """A folder to write `names` into that becomes `directory` when the block ends without error.

    Locally it is renamed into place, and a link is followed. An object store cannot rename: there
    the block must write the file `last`, one of `names`, last, and readers must refuse a folder
    without it. An earlier folder is replaced if it holds nothing but files of this `kind` that its
    marker lists.

    Raises `UserError` as `check_whole` does, or when the place cannot be written.
    """
    check_whole(directory, kind)
    with files.writing(directory):
        if files.is_remote(directory):
            with _in_store(epath.Path(directory), kind, names, last) as folder:
                yield folder
            return
        final = Path(os.path.realpath(directory))
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name[:40]}."))
        try:
            work = temporary / "new"
            work.mkdir()  # not the temporary folder: mkdtemp makes it readable by us alone
            yield epath.Path(work)
            _write_marker(work, {kind: names})
            for path in work.rglob("*"):
                _sync(path)
            check_whole(directory, kind)  # the block may have taken minutes
            _replace(final, work, temporary / "old")
        finally:
            if final.exists() or not (temporary / "old").exists():  # else it is the only copy
                shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _in_store(
    target: epath.Path, kind: str, names: Collection[str], last: str
) -> Iterator[epath.Path]:
    earlier = owned(target).get(kind, frozenset())
    _write_marker(target, {kind: earlier | set(names)})
    (target / last).unlink(missing_ok=True)  # first: no half passes for a whole
    for name in sorted(earlier - {last}):
        (target / name).unlink(missing_ok=True)
    yield target
    _write_marker(target, {kind: names})


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)  # delayed allocation reports a full disk only here
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(final: Path, new: Path, old: Path) -> None:
    """Puts the folder `new` in place of `final`, which moves to `old` if it exists."""
    if not final.exists():
        os.rename(new, final)
        return
    os.rename(final, old)
    try:
        os.rename(new, final)
    except BaseException:
        os.rename(old, final)
        raise


def check_apart(output: str, what: str, other: str) -> None:
    """Raises `UserError` if folder `output` is, holds or lies in `other`, through links too.

    what: the flag or key that names `other`.
    """
    if files.is_remote(output) != files.is_remote(other):
        return
    for inner, outer, how in ((output, other, "inside"), (other, output, "around")):
        if _lies_in(inner, outer):
            same = _lies_in(outer, inner)
            raise UserError(
                f"--output {output}: is {'the same folder as' if same else how} {what} {other}, "
                "which is only read: choose another folder"
            )


def _lies_in(inner: str, outer: str) -> bool:
    """Whether the folder `inner` is `outer` or below it."""
    if files.is_remote(inner):
        parts, above = (PurePosixPath(path.partition("://")[2]).parts for path in (inner, outer))
        return parts[: len(above)] == above
    start, place = Path(os.path.realpath(inner)), os.path.realpath(outer)
    if not os.path.exists(place):
        return False
    return any(p.exists() and os.path.samefile(p, place) for p in (start, *start.parents))
