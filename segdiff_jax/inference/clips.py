"""Video: a clip's frames as photos, one after the other, and the overlay of all of them as a clip.

All frames are segmented with the same seed and so with the same noise: what stands still keeps its
labels. Colours are the classes', and the legend names all of them, for it must not jump either.
"""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from segdiff_jax import codec, files, ownership
from segdiff_jax.data.images import UnreadableError
from segdiff_jax.errors import UserError
from segdiff_jax.inference import pictures, writers
from segdiff_jax.inference.photos import Photos
from segdiff_jax.inference.result import Segmentation
from segdiff_jax.text.vocabulary import Vocabulary

_ENCODERS = ("libx264", "libopenh264", "mpeg4")  # the first that the library was built with


def library() -> Any:
    """Import PyAV. Raise `UserError` if the extra is not installed."""
    try:
        import av
    except ImportError as error:
        raise UserError("video needs PyAV: pip install 'segdiff_jax[video]'") from error
    return av


@contextlib.contextmanager
def _opened(path: str, read: Photos) -> Iterator[Any]:
    av = library()
    try:
        with av.open(read.local(path)) as container:
            if not container.streams.video:
                raise UnreadableError(f"{path}: has no picture in it: give a video")
            stream = container.streams.video[0]
            if stream.width * stream.height > read.max_pixels:
                raise read.too_large(path)
            yield container
    except av.error.FFmpegError as error:
        reason = " ".join(str(error.strerror or error).split())
        raise UnreadableError(f"{path}: cannot be read as a video ({reason})") from error


def look(path: str, read: Photos) -> tuple[Fraction, int]:
    """Return how many frames a second a clip has, and how many in all.

    All of it is decoded, so that damage is known before any work. Raise as `frames` does.
    """
    with _opened(path, read) as container:
        stream = container.streams.video[0]
        rate = Fraction(stream.average_rate or stream.base_rate or 25)
    return rate, sum(1 for _ in frames(path, read))


def frames(path: str, read: Photos) -> Iterator[np.ndarray]:
    """Yield the frames of a clip, uint8 [H, W, 3], upright, all of the first one's size.

    Raise `UnreadableError` where the clip cannot be read, also in its midst.
    """
    size: tuple[int, int] | None = None
    with _opened(path, read) as container:
        for frame in container.decode(video=0):
            pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
            size = size or pixels.shape[:2]
            if pixels.shape[:2] != size:
                raise UnreadableError(f"{path}: its frames change their size: cut it there")
            yield np.ascontiguousarray(pixels)
    if size is None:
        raise UnreadableError(f"{path}: no frames in it: give a whole video")


@contextlib.contextmanager
def writer(path: Path, rate: Fraction) -> Iterator[Callable[[np.ndarray], None]]:
    """Give a function that appends pictures uint8 [H, W, 3], all of one size, to a clip."""
    av = library()
    encoder = next(name for name in _ENCODERS if name in av.codecs_available)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(encoder, rate=rate)
        stream.pix_fmt = "yuv420p"

        def append(picture: np.ndarray) -> None:
            even = [(0, n % 2) for n in picture.shape[:2]]  # colours are stored for 2 × 2 pixels
            picture = np.pad(picture, (*even, (0, 0)), mode="edge")
            if not stream.codec_context.is_open:
                stream.height, stream.width = picture.shape[:2]
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)

        yield append
        for packet in stream.encode():
            container.mux(packet)


def overlay(found: Segmentation) -> np.ndarray:
    """Make one picture of the clip, uint8 [H, W, 3], with all classes in the legend below it."""
    legend = dict(zip(found.classes, found.vocabulary.palette().tolist(), strict=True))
    return np.asarray(pictures.with_legend(found.overlay(legend=False), legend))


class Summary:
    """What is said of a clip as a whole: `add` each frame's result, in order."""

    def __init__(self, classes: Vocabulary):
        self._classes = classes
        self._pixels = np.zeros(codec.ignore_label(len(classes)) + 1, np.int64)
        self._before: np.ndarray | None = None
        self._changed: list[float] = []
        self._frames = 0

    def add(self, found: Segmentation) -> None:
        labels = found.labels
        self._pixels += np.bincount(labels.ravel(), minlength=len(self._pixels))
        if self._before is not None:
            self._changed.append(float((labels != self._before).mean()))
        self._before, self._frames = labels, self._frames + 1

    def figures(self) -> dict[str, Any]:
        """Return what the clip's description says of all frames together.

        flicker: the mean share of the pixels that have another label in the next frame, 0…1.
        """
        assert self._before is not None
        height, width = self._before.shape
        flicker = float(np.mean(self._changed)) if self._changed else 0.0
        size = {"width": width, "height": height, "frames": self._frames}
        return size | {"flicker": flicker} | writers.counted(self._classes, self._pixels)


class Clip(NamedTuple):
    """A clip that is to be segmented."""

    path: str  # as the user named it
    name: str  # of its results
    rate: Fraction  # frames a second
    frames: int  # in all, from 1 on


def outputs(clips: Collection[Clip], kinds: Sequence[str], count: int) -> list[str]:
    """Return all files that may be written for `clips` and `count` classes."""
    own = [f"{clip.name}{end}" for clip in clips for end in ("_overlay.mp4", ".json")]
    return own + writers.outputs(names_of_frames(clips, kinds), kinds, count)


def names_of_frames(clips: Collection[Clip], kinds: Sequence[str]) -> list[str]:
    """Return what the results of each frame are called; [] where there are no `kinds` of them."""
    counts = {clip.name: clip.frames if kinds else 0 for clip in clips}
    return [f"{name}_{n:06}" for name, count in counts.items() for n in range(1, count + 1)]


def write(
    output: str,
    clip: Clip,
    results: Iterable[Segmentation],
    kinds: Sequence[str],
    settings: Mapping[str, Any],
) -> None:
    """Write O/<name>_overlay.mp4 and O/<name>.json, and the files of each frame in its `kinds`.

    results: of each frame. What an earlier run wrote of frames that are none now is removed.
    """
    names, summary = names_of_frames([clip], kinds), None
    with tempfile.TemporaryDirectory(prefix="segdiff_") as folder:
        place = Path(folder, "clip.mp4")
        with writer(place, clip.rate) as append:
            for number, found in enumerate(results, 1):
                append(overlay(found))
                summary = summary or Summary(found.vocabulary)
                summary.add(found)
                if kinds:
                    path = f"{clip.path}#{number}"
                    writers.write(output, names[number - 1], path, found, settings, kinds)
        files.write_bytes(os.path.join(output, f"{clip.name}_overlay.mp4"), place.read_bytes())
    assert summary is not None  # a clip without frames is unreadable
    of_frames = {kind: [f"{name}.json" for name in names] for kind in kinds}
    said = {
        "image": clip.path,
        "frames_per_second": float(clip.rate),
        **summary.figures(),
        "files": {"overlay": f"{clip.name}_overlay.mp4", **of_frames},
        "settings": dict(settings),
    }
    files.write_json(os.path.join(output, f"{clip.name}.json"), said)
    for name in _frames_before(output, clip.name) - set(names):
        writers.remove(output, name)


def _frames_before(output: str, name: str) -> set[str]:
    """Return the frames of a clip that O holds, also of runs before: not photos of such names."""
    found = set()
    for file in ownership.owned(output).get(writers.KIND, ()):
        frame = re.fullmatch(rf"({re.escape(name)}_0*(\d+))\.json", file)
        if frame is None:
            continue
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            image = json.loads(epath.Path(output, file).read_bytes())["image"]
            if image.endswith(f"#{frame[2]}"):
                found.add(frame[1])
    return found
