"""Writing results: a reader never meets half a file, and a failure is one clear line.

Local files are written beside their target and renamed into place. An object in `gs://` appears
only when its upload is complete, so it is written directly. What a store refuses, its client
(gcsfs) tries again for half a minute; what fails then is a `UserError` that names the object. A
store that does not answer at all is one after the time that `waiting` allows.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

from segdiff_jax.errors import UserError

# gcsfs, which epath uses, reads these when it is first needed. It would ask for the kind of bucket
# over gRPC, which loses minutes where only HTTP gets through, and remember listings, although other
# processes of a run write to the same folders. Its errors reach the user as ours, not as log lines.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
for _name in ("gs", "gcs"):  # imported when first needed: half a second
    fsspec.register_implementation(_name, "segdiff_jax.gcs.FileSystem", clobber=True)
for _name in ("gcsfs", "fsspec"):  # the latter tells of every object it opens
    logging.getLogger(_name).setLevel(logging.CRITICAL)

_STORE_CLIENTS = ("gcsfs", "aiohttp", "requests", "google")  # whose own exceptions may come through


def is_remote(path: os.PathLike[str] | str) -> bool:
    """Whether `path` is an object store URI such as `gs://bucket/x`, not a local file."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def writing(path: os.PathLike[str] | str) -> Iterator[None]:
    """Turns what goes wrong with a disk or an object store into a `UserError` that names `path`."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not _from_store(error):
            raise
        raise _explain(path, error) from error


@contextlib.contextmanager
def reading(path: os.PathLike[str] | str) -> Iterator[None]:
    """Turns an object store's refusal to read `path` into a `UserError` that names it.

    A missing object still is a `FileNotFoundError`, and errors of local files pass as they are.
    """
    try:
        yield
    except Exception as error:
        if not is_remote(path) or isinstance(error, FileNotFoundError):
            raise
        if not isinstance(error, OSError) and not _from_store(error):
            raise
        raise UserError(f"cannot read {os.fspath(path)}: {_store_reason(error)}") from error


def _from_store(error: Exception) -> bool:
    return type(error).__module__.split(".")[0] in _STORE_CLIENTS


def _store_reason(error: Exception) -> str:
    return f"{_one_line(error)}: check the network and your access to the bucket, then try again"


def write_bytes(path: os.PathLike[str] | str, data: bytes) -> None:
    """Writes `data` to `path` (local or `gs://`), whole or not at all; makes missing folders.

    Raises `UserError` when the disk is full or the place cannot be written. The previous file, if
    any, is then untouched and nothing else is left behind.
    """
    with writing(path):
        if is_remote(path):
            epath.Path(path).write_bytes(data)
        else:
            _write_local(Path(path), data)


def write_text(path: os.PathLike[str] | str, text: str) -> None:
    """`write_bytes` of `text` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: os.PathLike[str] | str, value: Any) -> None:
    """`write_bytes` of `value` as indented JSON. NaN and infinity raise `ValueError`: not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def check_writable(directory: os.PathLike[str] | str) -> None:
    """Makes `directory` and proves that a file can be written there, before hours of work.

    Raises `UserError` otherwise. Existing files are not touched.
    """
    with writing(directory):
        if is_remote(directory):
            folder = epath.Path(directory)
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".segdiff_write_test_{os.getpid()}"
            probe.write_bytes(b"x")
            probe.unlink()
        else:
            Path(directory).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory) as file:
                file.write(b"x")


@contextlib.contextmanager
def whole_folder(
    directory: os.PathLike[str] | str, last: str, others: Collection[str]
) -> Iterator[epath.Path]:
    """A folder to write into that becomes `directory` only when the block ends without error.

    Locally it is renamed into place. An object store cannot rename: there the block must write the
    file `last` last, and readers must refuse a folder without it. An earlier `directory` that
    holds nothing but `last` and `others` is replaced.

    Raises `UserError` if it holds anything else, or the place cannot be written.
    """
    with writing(directory):
        target = epath.Path(directory)
        earlier = target.exists()
        foreign = {path.name for path in target.iterdir()} - {last, *others} if earlier else set()
        if foreign:
            raise UserError(
                f"{target / min(foreign)}: is no part of an export: choose another folder"
            )
        if is_remote(directory):
            if earlier:
                (target / last).unlink(missing_ok=True)  # first: no half passes for a whole
                target.rmtree()
            yield target
            return
        final = Path(os.path.abspath(directory))
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name[:100]}."))
        try:
            work = temporary / "new"
            work.mkdir()  # not the temporary folder: mkdtemp makes it readable by us alone
            yield epath.Path(work)
            for path in work.rglob("*"):
                _sync(path)
            _replace(final, work, temporary / "old")
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


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


def _write_local(path: Path, data: bytes) -> None:
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(data)  # a device or pipe such as /dev/stdout: not to be renamed over
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # delayed allocation reports a full disk only here
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only we can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _explain(path: os.PathLike[str] | str, error: Exception) -> UserError:
    place = os.fspath(path)
    if is_remote(path):
        return UserError(f"cannot write {place}: {_store_reason(error)}")
    mends = {
        errno.ENOSPC: "the disk is full: free some space or choose another place",
        errno.EDQUOT: "the disk quota is used up: free some space or choose another place",
        errno.EACCES: "permission denied: choose a place you may write to",
        errno.EPERM: "permission denied: choose a place you may write to",
        errno.EROFS: "the file system is read-only: choose another place",
        errno.EISDIR: "it is a directory: choose another name or remove it",
        errno.ENOTDIR: "part of the path is a file, not a directory: choose another place",
        errno.EEXIST: "it is a file, not a directory: choose another name or remove it",
        errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    }
    reason = (
        mends.get(getattr(error, "errno", None) or 0) or f"{_one_line(error)}: choose another place"
    )
    return UserError(f"cannot write {place}: {reason}")


def _one_line(error: Exception) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error) or repr(error)).split())
