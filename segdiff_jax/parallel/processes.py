"""Processes of one run: joining, barriers, agreement, and a common end after a failure.

Barriers and messages go through the coordination service that process 0 runs for JAX, not through
devices: on a TPU, a collective that one process never enters blocks the others for ever.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # its client has no public name; Orbax takes the same way
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from segdiff_jax.errors import UserError
from segdiff_jax.waiting import PROCESS, Wait, bounded

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
LONGEST_WAIT = 4 * 3600  # seconds for a process that is `at_work`

_FAILED = "segdiff_jax/failed"  # key of the first failure: "code message"
_AT, _WORK = "segdiff_jax/at/", "segdiff_jax/work/"  # of each process: last barrier; see `at_work`
_SECONDS_BETWEEN_LOOKS = 1.0  # at that key; also how long a failing process 0 stays to be read
# The words of the CPU's collectives, of RPCs and of the service when another process is gone.
_GONE = re.compile(r"gloo|UNAVAILABLE|DEADLINE_EXCEEDED|heartbeat|coordination|socket", re.I)
_numbers = itertools.count()  # barriers are numbered: every process passes them in one order


def join() -> None:
    """Connect this process to the others of its run; call it before anything asks JAX for devices.

    On Cloud TPU (Compute Engine, GKE) JAX finds the others by itself. Elsewhere the environment
    names them: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID. Without either this process is alone. Raises `UserError` for half of them, and
    when the others do not come.
    """
    # JAX's preemption service would catch SIGTERM, also before the loop can act on it.
    jax.config.update("jax_enable_preemption_service", False)
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if len(given) == len(VARIABLES):
        address, *numbers = given.values()
        if not all(n.isdecimal() for n in numbers) or ":" not in address:
            raise UserError(
                f"{', '.join(f'{k}={v}' for k, v in given.items())}: "
                "give host:port, a number of processes and this one's number from 0"
            )
        size, number = map(int, numbers)
        if not number < size:
            raise UserError(f"JAX_PROCESS_ID={number}: of {size} processes the last is {size - 1}")
        missing = functools.partial(_not_joined, address, size, number)
        _initialize(missing, address, size, number, cluster_detection_method="deactivate")
    elif given:
        absent = next(name for name in VARIABLES if name not in given)
        raise UserError(f"{next(iter(given))} is set, but {absent} is not: set all or none")
    elif find_spec("libtpu") and "tpu" in (os.environ.get("JAX_PLATFORMS") or "tpu"):
        try:
            _initialize("the other workers of this TPU")
        except ValueError as error:
            if "coordinator_address" not in str(error):  # the sign of a machine without a cluster
                raise


def _initialize(whom: str | Callable[[], str], *arguments: Any, **options: Any) -> None:
    """Call `jax.distributed.initialize`, which would end the process with a stack of its own."""
    options |= {"initialization_timeout": LONGEST_WAIT}
    wait = Wait(whom, PROCESS, "start the same command in every process")
    bounded(lambda: jax.distributed.initialize(*arguments, **options), wait)


def _not_joined(address: str, size: int, number: int) -> str:
    """Name whom process `number` of `size` waits for, as far as it can know."""
    if number == 0:
        return "process 1" if size == 2 else f"some of the processes 1 to {size - 1}"
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
    except (OSError, ValueError, OverflowError):
        return f"process 0, which cannot be reached at {address}"
    return f"some of the other {size - 1} processes (process 0 is there)"


def count() -> int:
    return jax.process_count()


def index() -> int:
    return jax.process_index()


def is_first() -> bool:
    """Return whether this process writes what only one may write."""
    return index() == 0


def barrier() -> None:
    """Return when every process has come here.

    Raises `NoAnswer` for one that neither comes in time nor is `at_work`.
    """
    if count() == 1:
        return
    number = next(_numbers)
    _client().key_value_set(f"{_AT}{index()}", str(number), True)
    wait = Wait(lambda: _described(_absent(number)), PROCESS, "see what it does and its log")
    wait.watch(_signs_of_work(number))
    name = f"segdiff_jax/barrier/{number}"
    bounded(lambda: _client().wait_at_barrier(name, LONGEST_WAIT * 1000), wait)


@contextlib.contextmanager
def at_work(what: str) -> Iterator[None]:
    """Let the others wait on at a barrier, and tell why, while this process does long work.

    what: "compiles the step", as it goes on after "process 1, which".
    """
    if count() == 1:
        yield
        return
    key = f"{_WORK}{index()}"
    _client().key_value_set(key, what, True)
    try:
        yield
    finally:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the error in flight says more
            _client().key_value_delete(key)


def _absent(barrier: int) -> dict[int, str]:
    """Map the processes that have not come to a barrier yet to what each is at work with, or ""."""
    at, work = (
        {int(key.rsplit("/", 1)[1]): value for key, value in _client().key_value_dir_get(folder)}
        for folder in (_AT, _WORK)
    )
    return {n: work.get(n, "") for n in range(count()) if int(at.get(n, -1)) < barrier}


def _signs_of_work(barrier: int) -> Callable[[], int]:
    """Return a count that grows while all that have not come to `barrier` are at work."""
    looks = 0

    def signs() -> int:
        nonlocal looks
        looks += all(_absent(barrier).values())
        return looks

    return signs


def _described(absent: dict[int, str]) -> str:
    """Say for whom this process waits: the first few by number."""
    named = [f"process {n}" + (f", which {work}" if work else "") for n, work in absent.items()]
    return "; ".join(named[:4]) + (f" and {len(named) - 4} more" if len(named) > 4 else "")


def _client() -> Any:
    return distributed.global_state.client


def all_agree(flag: bool) -> bool:
    """Return whether `flag` is true in every process. All of them call this."""
    return bool(stacked(np.array(flag)).all())


def any_raised(flag: bool) -> Callable[[], bool]:
    """Start asking whether `flag` is true in some process; the function returned gives the answer.

    It comes from the devices behind the steps dispatched so far, and all processes get the same.
    """
    if count() == 1:
        return lambda: flag
    place, combine = _agreement()
    local = np.full(jax.local_device_count(), flag)
    answer = combine(jax.make_array_from_process_local_data(place, local, (jax.device_count(),)))
    return lambda: bool(answer)


@functools.cache
def _agreement() -> tuple[NamedSharding, Any]:
    mesh = Mesh(np.array(jax.devices()), ("device",))
    combine = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))
    return NamedSharding(mesh, P("device")), combine


def check_same(what: str, value: Any) -> None:
    """Raise `UserError` in every process where `value`, JSON, is not that of process 0.

    `what` names it for the user. All call this.
    """
    digest = hashlib.sha256(json.dumps(value).encode()).digest()
    found = stacked(np.frombuffer(digest, np.uint8))
    differing = [number for number, theirs in enumerate(found) if (theirs != found[0]).any()]
    if differing:
        raise UserError(
            f"process {differing[0]} has other {what} than process 0: run the same command on "
            "all machines, with files that all of them see, such as gs://..."
        )


def gathered(tree: Any) -> Any:
    """Gather the arrays of `tree`, wherever their shards are, whole in the memory of every host."""
    if count() == 1:
        return jax.device_get(tree)
    jax.block_until_ready(tree)
    barrier()  # as in `stacked`
    return multihost_utils.process_allgather(tree, tiled=True)


def stacked(values: np.ndarray) -> np.ndarray:
    """Stack the `values` [...] of every process: [processes, ...]. All of them call this."""
    if count() == 1:
        return values[None]
    barrier()  # collectives of the CPU wait half a minute only
    return np.asarray(multihost_utils.process_allgather(values))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """End all processes, with a clear line each, when the block raises in one or one dies.

    The exit code is that of the process that failed: a `UserError`'s, 130 for Ctrl-C, else 1.
    A process that dies without a word is noticed by its broken connections, and where collectives
    do not notice (TPU) after JAX's 100 seconds without a heartbeat.
    """
    if count() == 1:
        yield
        return
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(over,), daemon=True)
    watcher.start()
    try:
        yield
        barrier()  # process 0 may have files to write when the others are done
    except BaseException as error:
        over.set()
        _leave(error)
    over.set()
    watcher.join()
    jax.distributed.shutdown()


def _leave(error: BaseException) -> None:
    """Tell the others, print why and exit at once: atexit would wait for them for minutes."""
    notice = None
    if _is_loss(error):
        time.sleep(2 * _SECONDS_BETWEEN_LOOKS)  # the one that failed may be about to say why
        notice = _notice() or (1, _lost(error))
    elif isinstance(error, UserError | KeyboardInterrupt):
        code = error.exit_code if isinstance(error, UserError) else 130
        _tell(code, f"process {index()} stopped: {str(error) or 'interrupted'}")
        notice = (code, f"error: {error}" if code != 130 else "interrupted")
    else:
        _tell(1, f"process {index()} failed: {type(error).__name__}: {error}")
        traceback.print_exception(error)
        notice = (1, "")
    _exit(*notice)


def _is_loss(error: BaseException | None) -> bool:
    """Return whether the error, or one it came from, says that another process is gone."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) and _GONE.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _lost(error: object) -> str:
    reason = str(error).strip().splitlines()[0][:200]
    return (
        f"error: process {index()} lost another process of this run ({reason}): see "
        "the logs of the others, then run the same command in all to continue"
    )


def _watch(over: threading.Event) -> None:
    """Look for the failure of another process while this one may be waiting for it."""
    unanswered = 0
    while not over.wait(_SECONDS_BETWEEN_LOOKS):
        try:
            notice = _notice()
        except jax.errors.JaxRuntimeError as error:
            unanswered += 1  # process 0, which would answer, may be gone
            if unanswered < 10 or over.is_set():
                continue
            notice = (1, _lost(error))
        if notice is not None and not over.is_set():
            _exit(*notice)


def _notice() -> tuple[int, str] | None:
    """Return exit code and message of the first failure that some process told of."""
    try:
        told = _client().key_value_try_get(_FAILED)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise
    code, message = told.split(" ", 1)
    return int(code), f"error: {message}"


def _tell(code: int, message: str) -> None:
    line = " ".join(message.split())
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # told already, or nobody there
        _client().key_value_set(_FAILED, f"{code} {line}")
        if is_first():
            time.sleep(2 * _SECONDS_BETWEEN_LOOKS)  # the message goes with this process


def _exit(code: int, message: str) -> None:
    if message:
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
