"""Process-wide JAX settings, made once by each entry point before the first computation."""

import os

import jax


def start() -> None:
    """Turns on the persistent compilation cache, unless the environment already names one."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.path.join(
            os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "segdiff_jax"
        )
        jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
