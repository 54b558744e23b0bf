"""Process-wide JAX settings, made once by each entry point before the first computation."""

import logging
import os

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from segdiff_jax import waiting
from segdiff_jax.files import is_remote
from segdiff_jax.parallel import processes

log = logging.getLogger(__name__)


def start(workdir: str = "") -> None:
    """Turn on the persistent compilation cache, unless the environment already sets it up.

    The cache is the user's on this machine, or with a remote `workdir` a folder there, because the
    machine that resumes after a preemption is a new one. A cache that cannot be reached, now or
    later, is a warning, and the run goes on without it. Raises `UserError` for bad limits of
    `waiting`.
    """
    waiting.check_limits()
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if given is None:
        home = os.environ.get("XDG_CACHE_HOME", "")
        if not os.path.isabs(home):  # not set, or to be ignored, as its specification says
            home = os.path.expanduser("~/.cache")
        remote = str(epath.Path(workdir) / "compile_cache") if is_remote(workdir) else ""
        cache = remote or os.path.join(home, "segdiff_jax")
        jax.config.update("jax_compilation_cache_dir", cache)
    else:
        cache = given
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    if not cache or given and not _is_reached(cache):
        return  # a default cache lies where the run writes anyway, or at home
    if cache.startswith("gs://"):
        _leave_when_lost(cache)


def _is_reached(cache: str) -> bool:
    try:
        epath.Path(cache).mkdir(parents=True, exist_ok=True)  # as JAX does
        epath.Path(cache).exists()  # mkdir asks nothing of a store
    except Exception as error:  # of the system, of a store's client, or for an unknown one
        _go_without(cache, error)
        return False
    return True


def _leave_when_lost(cache: str) -> None:
    """Give up a compile cache that does not answer: JAX would look there for each program anew."""
    from segdiff_jax.gcs import FileSystem  # half a second

    own_bucket = cache.removeprefix("gs://").split("/")[0]

    def listen(bucket: str, error: Exception) -> None:
        if bucket == own_bucket:
            FileSystem.listeners.remove(listen)
            _go_without(cache, error)

    FileSystem.listeners.append(listen)


def _go_without(cache: str, error: Exception) -> None:
    jax.config.update("jax_compilation_cache_dir", None)
    # In the background, because the thread of the failed request may hold the cache's lock.
    waiting.in_background(compilation_cache.reset_cache)
    reason = " ".join(str(error).split())[:300] or repr(error)
    log.warning("compile cache %s: cannot be reached, going on without it: %s", cache, reason)


def start_logging(times: bool = False, libraries: int = logging.ERROR) -> None:
    """Let the first process log how the run goes, the others only what goes wrong with them.

    times: a clock before each line. libraries: the level of Orbax and Grain. After
    `processes.join`.
    """
    first = processes.is_first()
    clock = "%(asctime)s " if times else ""
    name = "" if first else f"[process {processes.index()}] "
    level = logging.INFO if first else logging.WARNING
    # Imports may have set up a handler of their own.
    form = f"{clock}{name}%(message)s"
    logging.basicConfig(level=level, format=form, datefmt="%H:%M:%S", force=True)
    logging.getLogger("absl").setLevel(libraries)
