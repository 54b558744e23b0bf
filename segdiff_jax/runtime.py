"""Process-wide JAX settings, made once by each entry point before the first computation."""

import logging
import os

import jax
from etils import epath

from segdiff_jax.files import is_remote
from segdiff_jax.training import processes


def start(workdir: str = "") -> None:
    """Turns on the persistent compilation cache, unless the environment already sets it up.

    It is the user's on this machine, or with a remote `workdir` a folder there: the machine that
    goes on after a preemption is a new one.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
        remote = str(epath.Path(workdir) / "compile_cache") if is_remote(workdir) else ""
        cache = remote or os.path.join(home, "segdiff_jax")
        jax.config.update("jax_compilation_cache_dir", cache)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def start_logging(times: bool = False, libraries: int = logging.ERROR) -> None:
    """The first process tells how the run goes, the others only what goes wrong with them.

    times: a clock before each line. libraries: the level of Orbax and Grain, who find it worth a
    warning that a checkpoint is only read. After `processes.join`.
    """
    first = processes.is_first()
    clock = "%(asctime)s " if times else ""
    name = "" if first else f"[process {processes.index()}] "
    level = logging.INFO if first else logging.WARNING
    # Imports may have set up a handler of their own.
    form = f"{clock}{name}%(message)s"
    logging.basicConfig(level=level, format=form, datefmt="%H:%M:%S", force=True)
    logging.getLogger("absl").setLevel(libraries)
