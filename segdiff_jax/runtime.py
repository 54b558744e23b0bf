"""Process-wide JAX settings, made once by each entry point before the first computation."""

import os

import jax


def start() -> None:
    """Turns on the persistent compilation cache, unless the environment already sets it up."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.path.join(
            os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "segdiff_jax"
        )
        jax.config.update("jax_compilation_cache_dir", cache)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
