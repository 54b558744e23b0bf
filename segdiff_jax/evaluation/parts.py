"""What an evaluation has counted so far, kept on disk, so that a stopped one goes on with it.

A part is what one process made of one chunk of images. Parts of an evaluation with other settings,
another model or other images are not used, but removed.
"""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from segdiff_jax import files, ownership
from segdiff_jax.evaluation import metrics
from segdiff_jax.parallel import processes

_KIND = "parts of an evaluation"
FOLDER = "parts"


class Part(NamedTuple):
    sums: metrics.Sums
    rows: list[tuple[int, metrics.OfImage]]  # with the image's number
    ids: Counter[int]  # of the mask files: pixels
    maps: dict[int, tuple[np.ndarray, np.ndarray | None]]  # labels, uncertainty of images to show


class Parts:
    """The parts in `folder` of the evaluation that `made_from` describes, JSON values."""

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
        """The part of the chunk that begins with image `start`, where all processes have theirs."""
        path = self._folder / self._name.format(start, processes.index())
        try:
            part = _from_bytes(path.read_bytes())
        except (OSError, ValueError, KeyError):
            part = None
        return part if processes.all_agree(part is not None) else None

    def save(self, start: int, part: Part) -> None:
        path = self._folder / self._name.format(start, processes.index())
        files.write_bytes(path, _to_bytes(part))


def remove(folder: str) -> None:
    """Removes the parts in `folder`, and that if nothing else is in it: the evaluation is done."""
    place = epath.Path(folder)
    if not processes.is_first() or not place.is_dir():
        return
    names = ownership.owned(folder).get(_KIND, frozenset())
    for name in names:
        (place / name).unlink(missing_ok=True)
    ownership.settle(folder, _KIND, names)
    if not any(place.iterdir()):
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
    rows = [(number, metrics.OfImage(*row)) for number, row in words["rows"]]
    return Part(sums, rows, Counter(dict(words["ids"])), maps)


def folder_of(output: str) -> str:
    return os.path.join(output, FOLDER)
