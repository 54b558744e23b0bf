"""Reading and writing safetensors one tensor at a time, whole or sharded, local or `gs://`.

The format: 8 bytes little-endian header length, a JSON header (name → dtype, shape, data_offsets),
then the data. The safetensors library maps or copies whole files and reads no object store; here
one tensor is in memory at a time, and every way a file can be broken is a `UserError` naming it.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from etils import epath

from segdiff_jax import files, stored
from segdiff_jax.errors import UserError

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
}
FLOATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # what `write` can write
_NAMES = (  # how weights are published, best first; the last three are indices over shards
    r"{stem}{variant}\.safetensors",
    r"{stem}\.safetensors\.index{variant}\.json",
    r"{stem}\.safetensors{variant}\.index\.json",  # older diffusers
    r"{stem}{variant}\.safetensors\.index\.json",  # huggingface_hub's own
)
_MAX_HEADER = 100_000_000  # the library's own limit
_ALIGNMENT = 8
_BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies. `begin` and `end` count bytes from the start of the file."""

    file: epath.Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def find(folder: epath.Path, stem: str, variant: str | None) -> list[epath.Path]:
    """The files that hold the weights `stem` of a component, in order: see `_NAMES`.

    Without a variant the plain files are preferred, then whichever single variant is there: all of
    them end up as float32. With one the plain files are taken where it is missing, for many are of
    the UNet alone; the log says so. Raises `UserError` when there are none, or only pickles.
    """
    with files.reading(folder):
        names = sorted(path.name for path in folder.iterdir())
        present = _variants(stem, names)
        if not present:
            raise _no_weights(folder, names)
        wanted = variant or ""
        if variant is None and "" not in present:
            if len(present) > 1:
                raise UserError(
                    f"{folder}: there are only the variants {', '.join(sorted(present))}: "
                    f"choose one, for a training with --config.init_variant={min(present)}"
                )
            (wanted,) = present
        if wanted not in present and "" in present:
            log.info("%s: has no variant %s, its plain files are read", folder, wanted)
            wanted = ""
        if wanted not in present:
            others = ", ".join(sorted(name or "the plain files" for name in present))
            raise UserError(f"{folder}: {variant}: there is no such variant, but {others}: choose")
        path = folder / present[wanted]
        return [path] if path.suffix == ".safetensors" else _shards(path)


def are_there(folder: epath.Path, stem: str, variant: str | None) -> bool:
    """Whether the weights are there as `variant`, or as whichever `find` takes without one."""
    try:
        if variant and variant not in variants(folder, stem):
            return False
        return bool(find(folder, stem, variant))
    except (UserError, FileNotFoundError):
        return False


def variants(folder: epath.Path, stem: str) -> list[str]:
    """The variants that `find` can choose from, "" for the plain files."""
    with files.reading(folder):
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(_variants(stem, names))


def patterns(stem: str, variant: str | None) -> list[str]:
    """Shell patterns of the files that may hold the weights, but for indices; "*" is any variant.

    Without a variant they match the plain files alone.
    """
    count = "-?????-of-?????"
    if variant is None:
        return [f"{stem}.safetensors", f"{stem}{count}.safetensors"]
    names = (f".{variant}", f".{variant}{count}", f"{count}.{variant}")
    return [f"{stem}{name}.safetensors" for name in names]


def _variants(stem: str, names: Collection[str]) -> dict[str, str]:
    """Variant ("" for none) → the file among `names` to start from."""
    found: dict[str, str] = {}
    for pattern in _NAMES:
        compiled = re.compile(pattern.format(stem=re.escape(stem), variant=r"(?:\.(\w+))?"))
        for match in filter(None, map(compiled.fullmatch, names)):
            found.setdefault(match[1] or "", match[0])
    return found


def _no_weights(folder: epath.Path, names: list[str]) -> UserError:
    pickles = [n for n in sorted(names) if n.endswith((".bin", ".ckpt", ".pt", ".pth"))]
    if pickles:
        return UserError(
            f"{folder / pickles[0]}: pickled weights can run code and are not read: "
            "convert them to safetensors"
        )
    return UserError(f"{folder}: no .safetensors weights, or shards without index: fetch it again")


def _shards(index: epath.Path) -> list[epath.Path]:
    values = stored.parse_object(index.read_bytes(), index)
    try:
        shards = sorted(set(values["weight_map"].values()))
        plain = all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in shards)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of safetensors shards: fetch it again") from error
    if not plain or not shards:
        raise UserError(f"{index}: must name .safetensors files beside it: fetch it again")
    for name in shards:
        if not (index.parent / name).exists():
            raise UserError(f"{index.parent / name}: this shard is missing: fetch it again")
    return [index.parent / name for name in shards]


def read_header(path: epath.Path) -> dict[str, Entry]:
    """The tensors of one file by name. Raises `UserError` if it is damaged or cut short."""
    try:
        with files.reading(path):
            size = path.stat().length
            with path.open("rb") as file:
                start = file.read(8)
                length = int.from_bytes(start, "little") if len(start) == 8 else -1
                if not 2 <= length <= min(_MAX_HEADER, size - 8):
                    reason = stored.instead(start + file.read(stored.HEAD))
                    if reason:
                        raise UserError(f"{path}: {reason}")
                    raise UserError(f"{path}: damaged or not a safetensors file: fetch it again")
                header = json.loads(file.read(length))
        data = 8 + length
        entries = {
            name: Entry(
                path,
                value["dtype"],
                tuple(int(n) for n in value["shape"]),
                *(data + int(offset) for offset in value["data_offsets"]),
            )
            for name, value in header.items()
            if name != "__metadata__"
        }
    except _BROKEN as error:
        raise UserError(f"{path}: cannot be read as safetensors: fetch it again") from error
    expected = data
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        known = _DTYPES.get(entry.dtype)
        bytes_ = entry.end - entry.begin
        if entry.begin != expected or bytes_ < 0 or min(entry.shape, default=0) < 0:
            raise UserError(f"{path}: damaged header (offsets do not join): fetch it again")
        if known is not None and bytes_ != math.prod(entry.shape) * known.itemsize:
            raise UserError(f"{path}: damaged header (sizes do not fit): fetch it again")
        expected = entry.end
    if expected != size:
        raise UserError(f"{path}: {size} bytes, but {expected} were written: fetch it again")
    return entries


def read(entries: Mapping[str, Entry]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every entry, in the order of the files, one in memory at a time."""
    by_file: dict[epath.Path, list[tuple[str, Entry]]] = {}
    for name, entry in entries.items():
        by_file.setdefault(entry.file, []).append((name, entry))
    for path, members in by_file.items():
        with files.reading(path), path.open("rb") as file:
            for name, entry in sorted(members, key=lambda member: member[1].begin):
                if entry.dtype not in _DTYPES:
                    raise UserError(
                        f"{path}: {name} is {entry.dtype}, which is not supported: "
                        f"use {', '.join(FLOATS.values())}"
                    )
                file.seek(entry.begin)
                data = file.read(entry.end - entry.begin)
                if len(data) != entry.end - entry.begin:
                    raise UserError(f"{path}: ends in the middle of {name}: fetch it again")
                yield name, np.frombuffer(data, _DTYPES[entry.dtype]).reshape(entry.shape)


def write(
    path: epath.Path,
    tensors: Mapping[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]],
    dtype: str,
) -> None:
    """Writes tensors (name → shape, function that makes the array) as `dtype`, one at a time.

    The bytes depend on names and values only. Not atomic: the caller writes into a folder that
    appears as a whole. Raises `UserError` when a finite value overflows `dtype`.
    """
    code = FLOATS[dtype]
    names = sorted(tensors)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    offset = 0
    for name in names:
        end = offset + math.prod(tensors[name][0]) * _DTYPES[code].itemsize
        dims = list(tensors[name][0])
        header[name] = {"dtype": code, "shape": dims, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with files.writing(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            shape, make = tensors[name]
            array = make()
            with np.errstate(over="ignore"):
                stored = np.ascontiguousarray(array, dtype=_DTYPES[code])
            if stored.shape != shape:
                raise ValueError(f"{name}: shape {stored.shape}, announced as {shape}")
            if code == "F16" and not np.isfinite(stored).all() and np.isfinite(array).all():
                raise UserError(f"{path.name}: {name} overflows float16: write bfloat16 or float32")
            file.write(stored.tobytes())
