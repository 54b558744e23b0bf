"""A lock file that lets one training at a time write to a workdir.

The file names process, machine and start time of its holder. On the same machine the process is
looked up, and the lock of a dead one is free at once. On another machine only the heartbeat
counts: the holder renews the file every `BEAT` seconds, and a process that finds it unchanged for
`EXPIRES` seconds takes over. The clocks of two machines are compared only for files many minutes
old.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

from segdiff_jax.errors import UserError
from segdiff_jax.files import is_remote, reading, writing

log = logging.getLogger(__name__)

NAME = "lock.json"
BEAT = 10.0  # seconds
EXPIRES = 60.0  # seconds without a beat
_LONG_AGO = 900.0  # seconds; clocks are assumed to differ by less
_LOOK = 1.0  # seconds between looks at a lock that may be dead
_BEGINS = b'{"id": "'  # every lock


@contextlib.contextmanager
def held(folder: str) -> Iterator[Callable[[], None]]:
    """Hold the lock of a folder, made where missing, for as long as the block runs.

    The block gets a function that raises `UserError` once another process has taken over, which
    happens when this one was suspended. Raises `UserError` when another training holds the folder.
    Waits, with a log line, for a lock whose holder may be gone. Removes folders that it made and
    that are still empty.
    """
    made, path, mine = _make(folder), epath.Path(folder) / NAME, _myself()
    over = threading.Event()
    try:
        _acquire(path, mine)
        beats = threading.Thread(target=_beat, args=(path, mine, over), daemon=True)
        beats.start()
        try:
            yield lambda: _check(path, mine)
        finally:
            over.set()
            beats.join(BEAT)  # no beat may follow, but a store that hangs is not waited for
            with contextlib.suppress(Exception):  # what is left expires
                if _holder(path).get("id") == mine["id"]:
                    path.unlink()
    finally:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()


def _check(path: epath.Path, mine: dict[str, Any]) -> None:
    holder: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # of a store that does not answer now
        holder = _holder(path)
    if holder.get("id", mine["id"]) != mine["id"]:
        raise UserError(
            f"{path.parent}: {_who(holder)} took over while nothing was heard of this one: "
            "nothing more is written here, see how that one goes"
        )


def _make(folder: str) -> list[Path]:
    """Make a local folder and return the folders that were missing, innermost first."""
    if is_remote(folder):
        return []
    path = Path(os.path.abspath(folder))
    missing = [p for p in (path, *path.parents) if not p.exists()]
    with writing(folder):
        path.mkdir(parents=True, exist_ok=True)
    return missing


def _acquire(path: epath.Path, mine: dict[str, Any]) -> None:
    seen: tuple[float, float] | None = None  # a beat, and since when it is unchanged
    while not _create(path, mine):
        holder, beat = _holder(path), _last_beat(path)
        if beat is None:
            continue  # released in this moment
        alive = _is_alive(holder)
        if alive or (seen is not None and seen[0] != beat):
            raise UserError(
                f"{path.parent}: another training is running there ({_who(holder)}): wait for it "
                f"or stop it, choose another --workdir, or, if that is wrong, remove {path}"
            )
        if seen is None and alive is None:
            log.info("%s: held by %s: waiting %.0f s for a sign of it", path, _who(holder), EXPIRES)
        seen = seen or (beat, time.monotonic())
        expired = time.monotonic() - seen[1] > EXPIRES or time.time() - beat > _LONG_AGO
        if alive is None and not expired:
            time.sleep(_LOOK)
            continue
        log.info("%s: left behind by %s, which is gone: taken over", path, _who(holder))
        if _last_beat(path) == beat:
            with writing(path):
                path.unlink(missing_ok=True)


def _create(path: epath.Path, content: dict[str, Any]) -> bool:
    """Write the file unless there is one."""
    with writing(path):
        try:
            if is_remote(path):
                if _holder(path):
                    return False  # not every store knows the condition of the next line
                _put(path, content, mode="create")
            else:
                with open(path, "xb") as file:
                    file.write(json.dumps(content).encode())
        except FileExistsError:  # perhaps by ourselves, if the store's answer was lost
            return _holder(path).get("id") == content["id"]
    return True


def _put(path: epath.Path, content: dict[str, Any], mode: str) -> None:
    data = json.dumps(content | {"beat": time.time()}).encode()
    filesystem, name = fsspec.core.url_to_fs(os.fspath(path))
    filesystem.pipe_file(name, data, mode=mode)


def _beat(path: epath.Path, mine: dict[str, Any], over: threading.Event) -> None:
    while not over.wait(BEAT):
        with contextlib.suppress(Exception):  # the next may get through
            holder = _holder(path)
            if holder.get("id", mine["id"]) != mine["id"]:
                return  # lost: `_check` tells
            if over.is_set():
                return
            if not holder:
                _create(path, mine)  # somebody removed it
            elif is_remote(path):
                _put(path, mine, mode="overwrite")
            else:
                os.utime(path)


def _last_beat(path: epath.Path) -> float | None:
    """Return the time of the last beat by the holder's clock; None if there is no lock."""
    if is_remote(path):
        holder = _holder(path)
        return float(holder.get("beat", 0)) if holder else None
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return None


def _holder(path: epath.Path) -> dict[str, Any]:
    """Return what the lock says, or {}. Raise `UserError` for a file of another kind."""
    try:
        with reading(path):
            data = path.read_bytes()
    except FileNotFoundError:
        return {}
    if not (data.startswith(_BEGINS) or _BEGINS.startswith(data)):
        raise UserError(
            f"{path}: is no lock of a training, which needs this name: move it away, or choose "
            "another --workdir"
        )
    try:
        return json.loads(data)
    except ValueError:  # not wholly written
        return {"host": "an unknown host"}


def _myself() -> dict[str, Any]:
    return {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "machine": _machine(),
        "process": _started(os.getpid()),
    }


def _who(holder: dict[str, Any]) -> str:
    return "process {pid} on {host} since {since}".format_map(
        {key: holder.get(key, "?") for key in ("pid", "host", "since")}
    )


def _is_alive(holder: dict[str, Any]) -> bool | None:
    """Return whether the holder is running; None where that cannot be seen from here."""
    machine = _machine()
    if not machine or holder.get("machine") != machine:
        return None
    started = _started(holder.get("pid"))
    return started is not None and started == holder.get("process")


def _machine() -> str:
    """Identify this boot of this machine, and its numbering of processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: Any) -> str | None:
    """Return when the process was started; None if it has ended. Process ids are reused."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
