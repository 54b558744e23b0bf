"""What the gray maps of an image say at its own size: scores, labels, uncertainty.

maps [P, h, w] at the networks' size
  → class_ranks                  [K, h, w]: above 1 and below 0 too; of tiles, blended (`tiles`)
  → winners.largest              the best at each pixel [H, W], in blocks: memory stays flat
  → labels, uncertainty [H, W]   → masks, overlay, RLE, polygons, files
"""

import base64
import functools
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from segdiff_jax import codec, files
from segdiff_jax.config import CodecConfig
from segdiff_jax.data import geometry
from segdiff_jax.errors import UserError
from segdiff_jax.inference import pictures, regions, winners
from segdiff_jax.text.vocabulary import Vocabulary, same_name, shorten

# How much a score may move for what lies beyond [0, 1]: it decides between equal scores only, and
# a score that is equal to the threshold still reaches it.
_TIE = 1e-4
_NOTEBOOK = 640  # pixels of the longer side of the overlay in a notebook


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation:
    """What one photo [H, W] gave, asked for K classes."""

    photo: np.ndarray  # uint8 [H, W, 3], RGB
    labels: np.ndarray  # int32 [H, W]: index into `classes`, or `codec.ignore_label(K)`
    # float32 [H, W], 0 = unanimous: the spread of the ensemble for the winning class, in units of
    # the gray map's range. None for one sample.
    uncertainty: np.ndarray | None
    vocabulary: Vocabulary  # the classes that were asked for, with synonyms and colours
    network_scores: np.ndarray  # float32 [h, w, K] in [0, 1] at the networks' size, no padding
    confidence: np.ndarray  # float32 [H, W] in [0, 1]: the highest score, to four decimals

    @property
    def classes(self) -> tuple[str, ...]:
        return self.vocabulary.names

    @functools.cached_property
    def scores(self) -> np.ndarray:
        """float32 [H, W, K] in [0, 1]. Made when read: 150 classes of 12 megapixels take 7 GB."""
        return geometry.enlarge(self.network_scores, self.labels.shape)

    def shares(self) -> dict[str, float]:
        """Return the share of pixels, 0…1, of each class that is present, largest first."""
        return dict(self._shares)

    @functools.cached_property
    def _shares(self) -> dict[str, float]:
        pixels = np.bincount(self.labels.ravel(), minlength=len(self.classes))[: len(self.classes)]
        order = [i for i in np.argsort(-pixels, kind="stable") if pixels[i]]
        return {self.classes[i]: float(pixels[i] / self.labels.size) for i in order}

    def legend(self) -> dict[str, tuple[int, int, int]]:
        """Return the colour (RGB) of each class that is present, largest first."""
        colors = dict(zip(self.classes, self.vocabulary.palette().tolist(), strict=True))
        return {name: tuple(colors[name]) for name in self.shares()}

    def mask(self, name: str) -> np.ndarray:
        """Return where a class is, bool [H, W]. Raise `UserError` if it was not asked for."""
        for number, entry in enumerate(self.vocabulary.classes):
            if same_name(name) in map(same_name, entry.names):
                return self.labels == number
        raise UserError(f"{name!r}: is none of the classes {', '.join(self.classes)}")

    def overlay(self, alpha: float = 0.5, legend: bool = True) -> Image.Image:
        """Paint the labels over the photo. *Other* leaves the photo as it is.

        alpha: weight of the colours, 0…1. legend: name the classes present below the photo.
        """
        picture = pictures.overlay(self.photo, self.labels, self.vocabulary.palette(), alpha)
        return pictures.with_legend(picture, self.legend()) if legend else picture

    def rle(self) -> dict[str, dict[str, Any]]:
        """Return the mask of each class that is present as COCO's run-length encoding."""
        return {name: regions.rle(self.mask(name)) for name in self.shares()}

    def polygons(self) -> dict[str, list[np.ndarray]]:
        """Return the outlines of each class that is present, int [n, 2] of (x, y) along pixels.

        Outer rings run clockwise as one sees them, holes the other way round; filled by the
        even-odd rule they give the mask again.
        """
        return {name: regions.polygons(self.mask(name)) for name in self.shares()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one file, local or gs://: .png (class ids), .npz (scores) or .json (COCO).

        Raise `UserError` for another suffix, and if the file cannot be written.
        """
        from segdiff_jax.inference.formats import by_suffix

        files.write_bytes(path, by_suffix(os.fspath(path))(self))

    def __repr__(self) -> str:
        height, width = self.labels.shape
        shares = [f"{shorten(name)} {share:.1%}" for name, share in [*self.shares().items()][:8]]
        more = ", …" if len(self.shares()) > len(shares) else ""
        found = ", ".join(shares) + more or "nothing but *other*"
        classes = "1 class" if len(self.classes) == 1 else f"{len(self.classes)} classes"
        return f"Segmentation({height} × {width}, {classes}: {found})"

    def _repr_html_(self) -> str:
        picture = self.overlay(legend=False)
        picture.thumbnail((_NOTEBOOK, _NOTEBOOK))
        source = base64.b64encode(pictures.encode(picture, photo=True)).decode()
        return pictures.template("result.html").render(
            source=source, legend=self.legend(), shares=self.shares(), summary=repr(self)
        )


def from_maps(
    gray: np.ndarray,
    spread: np.ndarray | None,
    photo: np.ndarray,
    vocabulary: Vocabulary,
    settings: CodecConfig,
    fit: str,
) -> Segmentation:
    """Return what maps [P, h, w] and their spread say of a photo uint8 [H, W, 3], at its own size.

    settings: `classes_per_pass`, `threshold` and `closed` of it count. fit: as config.data.fit.
    """
    height, width = geometry.filled(photo.shape[:2], gray.shape[1:], fit)
    shown = slice(None), slice(height), slice(width)
    ranks = class_ranks(np.asarray(gray)[shown], vocabulary, settings)
    spread = None if spread is None else spread[shown]
    return from_ranks(ranks, spread, photo, vocabulary, settings)


def class_ranks(gray: np.ndarray, vocabulary: Vocabulary, settings: CodecConfig) -> np.ndarray:
    """Return `codec.ranks` [K, h, w] of each class in maps [P, h, w], adjusted by its share."""
    count = len(vocabulary)
    ranks = codec.ranks(gray, codec.group_size(count, settings.classes_per_pass))
    joined = np.moveaxis(codec.join_passes(ranks, count), -1, 0)
    if not settings.logit_adjustment:
        return joined
    tau = settings.logit_adjustment
    each = zip(joined, vocabulary.shares, strict=True)
    return np.stack([codec.adjusted(one, share, tau) for one, share in each])


def from_ranks(
    ranks: np.ndarray,
    spread: np.ndarray | None,
    photo: np.ndarray,
    vocabulary: Vocabulary,
    settings: CodecConfig,
) -> Segmentation:
    """Return what ranks [K, h, w] and the spread [P, h, w] say of a whole photo, at its own size.

    Scores are enlarged before the best is chosen. Where the best are equal, most often at 0 because
    every map is dark, the maps decide by what lies beyond [-1, 1] or beneath the levels
    (`codec.ranks`): in a closed vocabulary the class that is the nearest wins, not the first.
    """
    native = photo.shape[:2]
    scores, order = (np.empty(ranks.shape, np.float32) for _ in range(2))
    for rank, score, place in zip(ranks, scores, order, strict=True):
        np.clip(rank, 0.0, 1.0, out=score)
        beyond = rank - score
        place[...] = score + _TIE * beyond / (1.0 + np.abs(beyond))
    best, labels = winners.largest(order, native)
    uncertainty = None
    if spread is not None:
        group = codec.group_size(len(vocabulary), settings.classes_per_pass)
        uncertainty = winners.picked(spread, labels // group)  # of the pass that asked for it
    if not settings.closed:
        other = codec.ignore_label(len(vocabulary))
        np.copyto(labels, other, where=best < settings.threshold - _TIE)
    scores, best = np.moveaxis(scores, 0, -1), best.clip(0.0, 1.0)
    return Segmentation(photo, labels, uncertainty, vocabulary, scores, best)
