"""Flags of the TPU compiler, which libtpu reads when it is loaded."""

import importlib.metadata
import os
from collections.abc import MutableMapping

_LIBTPU = "0.0.42."  # the versions in which the flag was tried: an unknown one ends the process
_TARGET = "xla_jf_convolution_performance_target"
# A product may take up to 1 / 0.95 of the time that XLA estimates for its fastest tiles. Those are
# unrolled into half as much code again, and compiling is generating code (docs/performance.md).
_SHARE = 0.95


def set_flags(environ: MutableMapping[str, str] = os.environ) -> None:
    """Asks for products that are nearly the fastest and compile in about half the time.

    To be called before JAX looks for devices. What `LIBTPU_INIT_ARGS` already says of the flag
    holds; without libtpu, or with one of another version, nothing is set.
    """
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return
    given = environ.get("LIBTPU_INIT_ARGS", "")
    if version.startswith(_LIBTPU) and _TARGET not in given:
        environ["LIBTPU_INIT_ARGS"] = f"{given} --{_TARGET}={_SHARE}".strip()
