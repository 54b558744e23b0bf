"""A store that answers at first and then no more: checkpoints end, the compile cache is left."""

import os
import subprocess
import sys
import textwrap

from emulator import BUCKET, Fault

SAVE = """
    import sys
    from segdiff_jax import cli, waiting
    from segdiff_jax.weights.checkpoint import Checkpoints
    import jax.numpy as jnp

    waiting.FIRST_WORD, waiting.NEXT_WORD = 1.0, 1.0

    def main(argv):
        with Checkpoints("gs://bucket/run/checkpoints") as checkpoints:
            checkpoints.save(1, {"params": {"a": jnp.ones((300, 300))}}, {})
            checkpoints.wait()

    cli.run(main)
"""


def start(script, **environment):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_checkpoint_that_is_never_taken(gcs):
    def chunks(method, path):
        return method == "POST" and "ocdbt" in path

    with gcs.failing(Fault("hang", chunks, float("inf"))):
        ended = start(SAVE, SEGDIFF_NETWORK_TIMEOUT="4")
    assert ended.returncode == os.EX_TEMPFAIL, ended.stderr
    lines = ended.stderr.splitlines()
    place = "gs://bucket/run/checkpoints"
    assert lines[-1].startswith(f"error: {place}: no answer for ")
    assert [line for line in lines if line.startswith(f"waiting for {place} for ")]
    assert "Traceback" not in ended.stderr


COMPILE = """
    import time
    import jax, jax.numpy as jnp
    from segdiff_jax.parallel import runtime

    runtime.start()
    start = time.monotonic()
    for factor in range(8):
        jax.jit(lambda x: factor * x + 1)(jnp.ones(3))
    assert time.monotonic() - start < 15
    print("done")
"""


def test_a_compile_cache_that_falls_silent(gcs):
    cache = f"gs://{BUCKET}/cache"
    chosen = {"JAX_COMPILATION_CACHE_DIR": cache, "SEGDIFF_NETWORK_TIMEOUT": "2"}
    chosen["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    programs = Fault("hang", lambda _, path: "jit_" in path, float("inf"))
    with gcs.failing(programs):
        ended = start(COMPILE, **chosen)
    assert ended.returncode == 0 and ended.stdout == "done\n", ended.stderr
    assert ended.stderr.count("going on without it") == 1
    assert f"compile cache {cache}: cannot be reached, going on without it: " in ended.stderr
    assert programs.seen
