"""A model against a labelled dataset: predictions at native resolution, one confusion matrix."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from segdiff_jax import codec
from segdiff_jax.config import SamplerConfig
from segdiff_jax.data import transforms
from segdiff_jax.data.sources import Source
from segdiff_jax.evaluation import metrics, reconstruction
from segdiff_jax.progress import Progress
from segdiff_jax.segmenter import Segmenter, to_gray
from segdiff_jax.training.losses import to_pixels
from segdiff_jax.training.placement import equal_parts, multiple


class Example(NamedTuple):
    """One evaluated image, to show."""

    name: str
    image: np.ndarray  # uint8 [H, W, 3]
    labels: np.ndarray  # uint8 [H, W], 255 = not annotated
    prediction: np.ndarray  # int32 [H, W]
    uncertainty: np.ndarray | None  # float32 [H, W]; None for an ensemble of one


class Result(NamedTuple):
    confusion: np.ndarray  # int64 [K, K+1], see metrics.confusion
    summary: dict[str, Any]  # what metrics.json holds: figures, number of images, settings
    examples: list[Example]


def evaluate(
    segmenter: Segmenter,
    source: Source,
    *,
    limit: int | None = None,
    seed: int = 0,
    sampler: SamplerConfig | None = None,
    examples: int = 0,
    ceiling: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Segments the images of `source` into its own vocabulary and counts what is right.

    The vocabulary is closed whatever `config.codec.closed` says: every annotated pixel has a
    class, so *other* could only be wrong.

    Args:
      limit: number of images, spread evenly over the source (neighbours are often frames of one
        video); None = all.
      seed: of the sampling noise. The result does not depend on how images are batched, nor on
        the number of devices.
      sampler: in place of segmenter.config.sampler.
      examples: number of images to keep for a report, spread evenly.
      ceiling: the ground truth through codec and VAE and back, in place of a prediction: what a
        perfect UNet would score. The summary then also says what the VAE leaves of the photos.
      progress: called with (done, total) images.

    Returns:
      `Result`. Where the source names novel classes, the summary has the trained / novel split.

    Raises:
      UserError: an image or its labels cannot be read, or its maps are not finite; the message
        names the file. The model cannot tell the classes apart, or does not know them.
    """
    sampler = sampler or segmenter.config.sampler
    if ceiling:
        sampler = dataclasses.replace(sampler, ensemble=1, shortlist=0)
    classes = source.vocabulary.classes
    total = len(source) if limit is None else min(limit, len(source))
    chosen = _spread(total, len(source))
    shown = set(_spread(min(examples, total), total))
    size = min(total, _images_per_call(segmenter, len(classes), sampler))
    matrix = np.zeros((len(classes), len(classes) + 1), np.int64)
    kept: list[Example] = []
    photos: list[reconstruction.Sums] = []
    if not ceiling:
        segmenter.table(classes)  # what is wrong with the classes is wrong before the first image
    if progress:
        progress(0, total)
    for start in range(0, total, size):
        records = [source[i] for i in chosen[start : start + size]]
        full = records + records[-1:] * (size - len(records))  # one shape, one compilation
        spread = None
        if ceiling:
            gray = _painted_and_back(segmenter, [r["labels"] for r in full], len(classes), sampler)
            photos.append(_photos_and_back(segmenter, [r["image"] for r in full], len(records)))
        else:
            photos_of_call, names = [r["image"] for r in full], [r["name"] for r in full]
            gray, spread = segmenter.unclipped_maps(photos_of_call, classes, sampler, seed, names)
        for i, record in enumerate(records):
            spread_i = spread[i] if spread is not None and sampler.ensemble > 1 else None
            native = record["labels"].shape
            found = segmenter.segmentation(gray[i], spread_i, classes, native, 0.0, closed=True)
            matrix += metrics.confusion(record["labels"], found.labels, len(classes))
            if start + i in shown:
                kept.append(
                    Example(
                        record["name"],
                        record["image"],
                        record["labels"],
                        found.labels,
                        found.uncertainty,
                    )
                )
        if progress:
            progress(start + len(records), total)
    summary = _summary(matrix, segmenter, source, sampler, total, seed, ceiling)
    return Result(matrix, summary | (reconstruction.summarize(photos) if photos else {}), kept)


def _spread(count: int, length: int) -> list[int]:
    """`count` of the positions 0…length-1, evenly spaced; all of them for count = length."""
    return [i * length // count for i in range(count)]


def _images_per_call(segmenter: Segmenter, num_classes: int, sampler: SamplerConfig) -> int:
    """As many whole images as fill one compiled call of the UNet, at least one.

    Memory: the host holds the maps of one image, or of at most `sampler.batch_size` passes.
    """
    group = codec.group_size(num_classes, segmenter.config.codec.classes_per_pass)
    passes = codec.num_groups(num_classes, group)
    in_full = min(sampler.shortlist, passes) or passes  # passes that get the whole budget
    return max(1, sampler.batch_size // max(passes, in_full * sampler.ensemble))


def _painted_and_back(
    segmenter: Segmenter, labels: Sequence[np.ndarray], num_classes: int, sampler: SamplerConfig
) -> np.ndarray:
    """Label maps of any sizes → the unclipped maps [I, P, h, w] of a perfect sampler."""
    config = segmenter.config
    height, width = config.data.image_size
    groups = codec.groups(num_classes, codec.group_size(num_classes, config.codec.classes_per_pass))
    small = jnp.stack([transforms.resize_labels(one, (height, width)) for one in labels])
    painted = np.stack([np.asarray(codec.encode(small, ids)) for ids in groups], axis=1)
    jobs = painted.reshape(-1, height, width, 1)  # [I * P, h, w, 1]
    chunk = multiple(min(sampler.batch_size, len(jobs)), segmenter.mesh.size)
    pixels = (np.broadcast_to(p, (*p.shape[:3], 3)) for p in equal_parts(jobs, chunk))
    back = [np.asarray(to_gray(segmenter.reconstruct(part))) for part in pixels]
    return np.concatenate(back)[: len(jobs)].reshape(painted.shape)


def _photos_and_back(
    segmenter: Segmenter, images: Sequence[np.ndarray], count: int
) -> reconstruction.Sums:
    """The first `count` of `images` uint8 [H, W, 3] against themselves through the VAE."""
    size = segmenter.config.data.image_size
    fitted = np.stack([transforms.resize_image(image, size) for image in images])
    pixels = np.asarray(to_pixels(fitted))
    return reconstruction.compare(pixels[:count], segmenter.reconstruct(pixels)[:count])


def _summary(
    matrix: np.ndarray,
    segmenter: Segmenter,
    source: Source,
    sampler: SamplerConfig,
    images: int,
    seed: int,
    ceiling: bool,
) -> dict[str, Any]:
    names, novel = source.vocabulary.names, tuple(source.novel)
    trained = tuple(i for i in range(len(names)) if i not in set(novel))
    split = (trained, novel) if novel else (None, None)
    config = segmenter.config
    settings = dataclasses.asdict(sampler) | {
        "seed": seed,
        "classes_per_pass": config.codec.classes_per_pass,
        "context": config.codec.context,
        "image_size": list(config.data.image_size),
        "closed": True,
        "ceiling": ceiling,
    }
    figures = metrics.summarize(matrix, names, *split)
    return figures | {"images": images, "settings": settings}
