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
import re
import secrets
import tempfile
from collections.abc import Iterator
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

_UNDECODED = re.compile("[\udc80-\udcff]")  # bytes of a file name that were no UTF-8
_STORE_CLIENTS = ("gcsfs", "aiohttp", "requests", "google")  # whose own exceptions may come through


def is_remote(path: os.PathLike[str] | str) -> bool:
    """Whether `path` is an object store URI such as `gs://bucket/x`, not a local file."""
    return "://" in os.fspath(path)


def check_scheme(path: os.PathLike[str] | str) -> None:
    """Raises `UserError` unless `path` is local or in `gs://`: no other store is read or written.

    Everything that opens a file passes here, and what a user gives is checked before any work.
    """
    text = os.fspath(path)
    if re.match("gs://[^/]", text):
        return
    if re.match("gs:/", text, re.IGNORECASE):
        raise UserError(f"{text}: a place in a bucket is written gs://BUCKET/PATH")
    if is_remote(text):
        scheme = text.partition("://")[0].lower()
        mends = {"file": "leave file:// out", "hf": "write OWNER/NAME for a model on Hugging Face"}
        mend = mends.get(scheme, "copy the files to such a place")
        raise UserError(f"{text}: {scheme}:// is not supported, only local paths and gs://: {mend}")


def shown(text: str) -> str:
    """`text` as UTF-8 can hold it: the bytes of a file name that are no UTF-8 become `\\xe9`."""
    visible = _UNDECODED.sub(lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", text)
    return visible.encode("utf-8", "backslashreplace").decode("utf-8")


@contextlib.contextmanager
def writing(path: os.PathLike[str] | str) -> Iterator[None]:
    """Turns what goes wrong with a disk or an object store into a `UserError` that names `path`."""
    check_scheme(path)
    try:
        yield
    except Exception as error:
        if not _of_disk_or_store(error):
            raise
        raise UserError(f"cannot write {os.fspath(path)}: {_reason(path, error)}") from error


@contextlib.contextmanager
def reading(path: os.PathLike[str] | str) -> Iterator[None]:
    """Turns an object store's refusal to read `path` into a `UserError` that names it.

    A missing object still is a `FileNotFoundError`, and errors of local files pass as they are.
    """
    check_scheme(path)
    try:
        yield
    except Exception as error:
        expected = isinstance(error, FileNotFoundError) or not _of_disk_or_store(error)
        if expected or not is_remote(path):
            raise
        raise UserError(f"cannot read {os.fspath(path)}: {_store_reason(error)}") from error


def _of_disk_or_store(error: Exception) -> bool:
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _STORE_CLIENTS


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
    """`write_bytes` of `text` in UTF-8; what UTF-8 cannot hold as `shown` says."""
    write_bytes(path, shown(text).encode("utf-8"))


def write_json(path: os.PathLike[str] | str, value: Any) -> None:
    """`write_bytes` of `to_json`."""
    write_text(path, to_json(value))


def to_json(value: Any) -> str:
    """`value` as indented JSON. NaN and infinity raise `ValueError`: they are not JSON.

    Bytes of file names that are no UTF-8 are visible, as in `shown`.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # `shown`, with its backslash escaped as strings in JSON have it.
    return _UNDECODED.sub(lambda found: f"\\\\x{ord(found[0]) - 0xDC00:02x}", text)


def check_place(directory: os.PathLike[str] | str) -> None:
    """Raises `UserError` where a folder cannot be made or written to, as far as looking tells.

    Writes nothing. Of an object store only the name is looked at.
    """
    check_scheme(directory)
    if is_remote(directory):
        return
    path = Path(os.path.abspath(directory))
    if broken := dangling(path):
        raise UserError(broken)
    with writing(directory):
        while not os.path.exists(path):
            path = path.parent
        if not os.path.isdir(path):
            code = errno.EEXIST if path == Path(os.path.abspath(directory)) else errno.ENOTDIR
            raise OSError(code, os.strerror(code))
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def dangling(path: os.PathLike[str] | str) -> str | None:
    """What is wrong where `path`, or a folder it lies in, is a link to nothing; else None."""
    place = Path(os.path.abspath(path))
    for part in () if is_remote(path) else (place, *place.parents):
        if os.path.islink(part) and not os.path.exists(part):
            return (
                f"{part}: a link to {os.readlink(part)}, which does not exist: "
                "mend the link or name another place"
            )
    return None


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


def _write_local(path: Path, data: bytes) -> None:
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(data)  # a device or pipe such as /dev/stdout: not to be renamed over
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".segdiff.{secrets.token_hex(4)}"
    # Not tempfile's, which we alone may read: what a plain file allows is up to the umask.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # delayed allocation reports a full disk only here
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _reason(path: os.PathLike[str] | str, error: Exception) -> str:
    """Say why `path` could not be written, and the mend."""
    if is_remote(path):
        return _store_reason(error)
    if broken := dangling(path):
        return broken
    mends = {
        errno.ENOSPC: "the disk is full: free some space or choose another place",
        errno.EDQUOT: "the disk quota is used up: free some space or choose another place",
        errno.EACCES: "permission denied: choose a place you may write to",
        errno.EPERM: "permission denied: choose a place you may write to",
        errno.EROFS: "the file system is read-only: choose another place",
        errno.EISDIR: "it is a directory: choose another name or remove it",
        errno.ENOTDIR: "part of the path is a file, not a directory: choose another place",
        errno.EEXIST: "it is a file, not a directory: choose another name or remove it",
        errno.EBUSY: "a disk is mounted there: name a folder inside it",
        errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    }
    code = getattr(error, "errno", None)
    return mends.get(code or 0, f"{_one_line(error)}: choose another place")


def _one_line(error: Exception) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error) or repr(error)).split())
