"""What an evaluation counts: added up over images and processes, and kept until it is done.

A part is what one process made of some images. Those of a chunk are kept on disk, so that a stopped
evaluation goes on with them; those of other settings, another model or other images are removed.
"""

import hashlib
import io
import json
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from segdiff_jax import files, ownership
from segdiff_jax.evaluation import metrics
from segdiff_jax.parallel import processes

_KIND = "parts of an evaluation"


class Part(NamedTuple):
    sums: metrics.Sums
    rows: list[tuple[int, metrics.OfImage]]  # with the image's number
    ids: Counter[int]  # of the mask files: pixels
    maps: dict[int, tuple[np.ndarray, np.ndarray | None]]  # labels, uncertainty of images to show


def nothing(num_classes: int) -> Part:
    """Return the part of no image."""
    return Part(metrics.nothing(num_classes), [], Counter(), {})


def added(one: Part, other: Part) -> Part:
    """Add the part of other images."""
    sums = metrics.added(one.sums, other.sums)
    return Part(sums, one.rows + other.rows, one.ids + other.ids, one.maps | other.maps)


def of_all_processes(own: Part) -> Part:
    """Add the parts of all processes, rows in the order of the images. Maps stay where they are."""
    sums = metrics.Sums(*map(_summed, own.sums))
    pixels: np.ndarray = np.zeros(2**16, np.int64)  # of ids, which have at most 16 bits
    pixels[list(own.ids)] = list(own.ids.values())
    pixels = _summed(pixels)
    ids = Counter({int(i): int(pixels[i]) for i in np.flatnonzero(pixels)})
    return Part(sums, _rows_of_all(own.rows), ids, own.maps)


def _summed(own: np.ndarray) -> np.ndarray:
    """Sum an int64 array over all processes; as bytes, since JAX would make it int32."""
    return processes.stacked(own.view(np.uint8)).view(np.int64).sum(0)


def _rows_of_all(own: list[tuple[int, metrics.OfImage]]) -> list[tuple[int, metrics.OfImage]]:
    data = json.dumps(own).encode("ascii")
    longest = int(processes.stacked(np.array(len(data), np.int32)).max())
    padded = np.frombuffer(data.ljust(longest), np.uint8)  # JSON may end with blanks
    every = [row for text in processes.stacked(padded) for row in json.loads(text.tobytes())]
    every.sort(key=lambda pair: pair[0])
    return [(image, metrics.OfImage(*row)) for image, row in every]


class Parts:
    """The parts in `folder` of the evaluation that `made_from` describes in JSON values."""

    def __init__(self, folder: str, made_from: Mapping[str, Any], starts: Sequence[int]):
        text = json.dumps(made_from, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        every = range(processes.count())
        self._folder = epath.Path(folder)
        self._name = f"{digest}-{{:07d}}-{{}}.npz"
        self._names = [self._name.format(start, process) for start in starts for process in every]
        if processes.is_first():
            for stale in ownership.owned(folder).get(_KIND, frozenset()) - set(self._names):
                (self._folder / stale).unlink(missing_ok=True)
            ownership.claim(folder, _KIND, self._names)
        processes.barrier()

    def load(self, start: int) -> Part | None:
        """Return the part of the chunk that begins with image `start`, if all processes have it."""
        path = self._folder / self._name.format(start, processes.index())
        try:
            part = _from_bytes(path.read_bytes())
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            part = None  # not there, or damaged
        return part if processes.all_agree(part is not None) else None

    def save(self, start: int, part: Part) -> None:
        path = self._folder / self._name.format(start, processes.index())
        files.write_bytes(path, _to_bytes(part))


def remove(folder: str) -> None:
    """Remove the parts in `folder`, and that if nothing else is in it: the evaluation is done."""
    place = epath.Path(folder)
    if not processes.is_first() or not place.is_dir():
        return
    names = ownership.owned(folder).get(_KIND, frozenset())
    for name in names:
        (place / name).unlink(missing_ok=True)
    ownership.release_unwritten(folder, _KIND, names)
    if place.is_dir() and not any(place.iterdir()):  # a bucket has no empty folders
        place.rmdir()


def _to_bytes(part: Part) -> bytes:
    arrays = {f"sums_{name}": value for name, value in part.sums._asdict().items()}
    for number, (labels, uncertainty) in part.maps.items():
        arrays[f"labels_{number}"] = labels
        if uncertainty is not None:
            arrays[f"uncertainty_{number}"] = uncertainty
    words = json.dumps({"rows": part.rows, "ids": list(part.ids.items())})
    buffer = io.BytesIO()
    np.savez_compressed(buffer, words=np.frombuffer(words.encode(), np.uint8), **arrays)
    return buffer.getvalue()


def _from_bytes(data: bytes) -> Part:
    with np.load(io.BytesIO(data)) as arrays:
        words = json.loads(arrays["words"].tobytes())
        sums = metrics.Sums(**{name: arrays[f"sums_{name}"] for name in metrics.Sums._fields})
        shown = [name.removeprefix("labels_") for name in arrays if name.startswith("labels_")]
        maps = {int(n): (arrays[f"labels_{n}"], arrays.get(f"uncertainty_{n}")) for n in shown}
    rows = [(image, metrics.OfImage(*row)) for image, row in words["rows"]]
    return Part(sums, rows, Counter(dict(words["ids"])), maps)


def folder_of(output: str) -> str:
    """Name the folder for the parts of an evaluation that writes to `output`."""
    return os.path.join(output, "parts")
