"""Reading and writing safetensors one tensor at a time, local or `gs://`.

Files are read by the safetensors library, from a copy on this disk where they are in a bucket. It
cannot write a tensor at a time, so the writing is here: 8 bytes little-endian header length, a JSON
header (name → dtype, shape, data_offsets), then the data.
"""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from segdiff_jax import files, stored
from segdiff_jax.errors import UserError

FLOATS = {  # what `write` can write
    "float32": ("F32", np.dtype(np.float32)),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "float16": ("F16", np.dtype(np.float16)),
}
_ALIGNMENT = 8
_PART = 16 << 20  # bytes of a copy in memory


@contextlib.contextmanager
def opened(paths: Sequence[epath.Path]) -> Iterator[list[Any]]:
    """Open each of `paths` as the library's `safe_open` does, its header checked.

    Raises `UserError` that names a file that is damaged, cut short or something else.
    """
    with contextlib.ExitStack() as stack:
        yield [_open(path, stack.enter_context(_on_disk(path)), stack) for path in paths]


def _open(path: epath.Path, local: str, stack: contextlib.ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(local, framework="np"))
    except SafetensorError as error:
        with open(local, "rb") as file:
            reason = stored.instead(file.read(stored.HEAD))
        damage = f"damaged or not a safetensors file ({error}): fetch it again"
        raise UserError(f"{path}: {reason or damage}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}): fetch it again") from error


@contextlib.contextmanager
def _on_disk(path: epath.Path) -> Iterator[str]:
    """Provide a local file with the contents of `path`, for as long as the block runs."""
    if not files.is_remote(path):
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory(prefix="segdiff.") as folder:
        copy = Path(folder) / path.name
        with files.reading(path), path.open("rb") as source, copy.open("wb") as target:
            while part := source.read(_PART):
                with files.writing(copy):  # a full disk here is no fault of the bucket
                    target.write(part)
                    target.flush()
        yield str(copy)


def write(
    path: epath.Path,
    tensors: Mapping[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]],
    dtype: str,
) -> None:
    """Write tensors (name → shape, function that makes the array) as `dtype`, one at a time.

    The bytes depend on names and values only. Not atomic: the caller writes into a folder that
    appears as a whole. Raises `UserError` when a finite value overflows `dtype`.
    """
    code, kind = FLOATS[dtype]
    names = sorted(tensors)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    offset = 0
    for name in names:
        shape, _ = tensors[name]
        end = offset + math.prod(shape) * kind.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with files.writing(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(as_stored(tensors[name][1](), dtype, f"{path.name}: {name}").tobytes())


def as_stored(array: np.ndarray, dtype: str, where: str) -> np.ndarray:
    """Return `array` as `dtype`. Raise `UserError` when a finite value overflows it."""
    with np.errstate(over="ignore"):
        found = np.asarray(array, FLOATS[dtype][1], order="C")
    if dtype == "float16" and not np.isfinite(found).all() and np.isfinite(array).all():
        raise UserError(f"{where} overflows float16: write bfloat16 or float32")
    return found
