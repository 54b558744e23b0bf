"""Video: a clip's frames as photos, one after the other, and the overlay of all of them as a clip.

All frames are segmented with the same seed and so with the same noise: what stands still keeps its
labels. Colours are the classes', and the legend names all of them, for it must not jump either.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segdiff_jax.data.images import UnreadableError
from segdiff_jax.errors import UserError
from segdiff_jax.inference import pictures, writers
from segdiff_jax.inference.result import Segmentation
from segdiff_jax.text.vocabulary import Vocabulary

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
_ENCODERS = ("libx264", "libopenh264", "mpeg4")  # the first that the library was built with


def only(paths: Sequence[str]) -> bool:
    """Return whether `paths` are clips. Raise `UserError` if some are and others are not."""
    found = [path for path in paths if os.path.splitext(path)[1].lower() in SUFFIXES]
    if found and len(found) < len(paths):
        raise UserError(f"--images: {found[0]} is a clip, others are photos: give them one by one")
    return bool(found)


def library() -> Any:
    """Import PyAV. Raise `UserError` if the extra is not installed."""
    try:
        import av
    except ImportError as error:
        raise UserError("video needs PyAV: pip install 'segdiff_jax[video]'") from error
    return av


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    av = library()
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise UnreadableError(f"{path}: has no picture in it: give a video")
            yield container
    except av.error.FFmpegError as error:
        reason = " ".join(str(error.strerror or error).split())
        raise UnreadableError(f"{path}: cannot be read as a video ({reason})") from error


class Length(NamedTuple):
    """How long a clip is."""

    rate: Fraction  # frames a second
    frames: int  # in all, from 1 on


def look(path: str) -> Length:
    """Measure a clip. All of it is decoded, so that damage is known before any work."""
    with _opened(path) as container:
        stream = container.streams.video[0]
        rate = Fraction(stream.average_rate or stream.base_rate or 25)
    return Length(rate, sum(1 for _ in frames(path)))


def frames(path: str) -> Iterator[np.ndarray]:
    """Yield the frames of a clip, uint8 [H, W, 3], upright, all of the first one's size.

    Raise `UnreadableError` where the clip cannot be read, also in its midst.
    """
    size: tuple[int, int] | None = None
    with _opened(path) as container:
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
    colors = map(tuple, found.vocabulary.palette().tolist())
    legend = list(zip(found.classes, colors, strict=True))
    return np.asarray(pictures.with_legend(found.overlay(legend=False), legend))


class Summary:
    """What is said of a clip as a whole: `add` each frame's result, in order."""

    def __init__(self, classes: Vocabulary):
        self._classes, self._pixels = classes, np.zeros(len(classes), np.int64)
        self._before: np.ndarray | None = None
        self._changed: list[float] = []
        self._frames = 0

    def add(self, found: Segmentation) -> None:
        labels, count = found.labels, len(self._classes)
        self._pixels += np.bincount(labels.ravel(), minlength=count)[:count]
        if self._before is not None:
            self._changed.append(float((labels != self._before).mean()))
        self._before, self._frames = labels, self._frames + 1

    def figures(self) -> dict[str, Any]:
        """Return what the clip's description says of all frames together.

        flicker: the mean share of the pixels that have another label in the next frame, 0…1.
        """
        assert self._before is not None
        height, width = self._before.shape
        classes = writers.counted(self._classes, self._pixels, self._before.size * self._frames)
        flicker = float(np.mean(self._changed)) if self._changed else 0.0
        size = {"width": width, "height": height, "frames": self._frames}
        return size | {"flicker": flicker, "classes": classes}
