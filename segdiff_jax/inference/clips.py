"""Video: a clip's frames as photos, one after the other, and the overlay of all of them as a clip.

All frames are segmented with the same seed and so with the same noise: what stands still keeps its
labels. Colours are the classes', and the legend names all of them, for it must not jump either.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from segdiff_jax.data.images import UnreadableError
from segdiff_jax.errors import UserError
from segdiff_jax.inference import pictures
from segdiff_jax.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from segdiff_jax.inference.result import Segmentation

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
_ENCODERS = ("libx264", "libopenh264", "mpeg4")  # the first that the library was built with


def is_clip(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in SUFFIXES


def library() -> Any:
    """PyAV. Raises `UserError` where the extra is not installed."""
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
    rate: Fraction  # frames a second
    frames: int


def look(path: str) -> Length:
    """How long a clip is. Decodes all of it, so that what is damaged is known before any work."""
    with _opened(path) as container:
        stream = container.streams.video[0]
        rate = Fraction(stream.average_rate or stream.base_rate or 25)
    return Length(rate, sum(1 for _ in frames(path)))


def frames(path: str) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3], upright, all of the first frame's size.

    Raises `UnreadableError` where it cannot be read, also in its midst.
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
    """A function that appends a picture uint8 [H, W, 3], all of one size, to the clip at `path`."""
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


def overlay(found: "Segmentation") -> np.ndarray:
    """One picture of the clip, uint8 [H, W, 3]: the legend of all classes is below each."""
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

    def add(self, found: "Segmentation") -> None:
        labels, count = found.labels, len(self._classes)
        self._pixels += np.bincount(labels.ravel(), minlength=count)[:count]
        if self._before is not None:
            self._changed.append(float((labels != self._before).mean()))
        self._before, self._frames = labels, self._frames + 1

    def figures(self) -> dict[str, Any]:
        """flicker: the mean share of the pixels that have another label in the next frame."""
        assert self._before is not None
        height, width = self._before.shape
        classes = [
            {"id": i, "name": e.name, "synonyms": list(e.synonyms), "pixels": int(n)}
            | {"share": float(n / (self._before.size * self._frames))}
            for i, (e, n) in enumerate(zip(self._classes.classes, self._pixels, strict=True))
        ]
        flicker = float(np.mean(self._changed)) if self._changed else 0.0
        size = {"width": width, "height": height, "frames": self._frames}
        return size | {"flicker": flicker, "classes": classes}
