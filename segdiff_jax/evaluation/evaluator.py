"""A model against a labelled dataset: predictions at native resolution, one confusion matrix."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from segdiff_jax import codec
from segdiff_jax.config import SamplerConfig
from segdiff_jax.data import geometry, label_summary
from segdiff_jax.data.sources.source import Source, count_ids
from segdiff_jax.evaluation import metrics, reconstruction
from segdiff_jax.inference.result import Segmentation
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.parallel import processes
from segdiff_jax.parallel.placement import equal_parts, multiple
from segdiff_jax.progress import Progress


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
    open_vocabulary: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Segments the images of `source` into its own vocabulary and counts what is right.

    The vocabulary is closed whatever `config.codec.closed` says, unless `open_vocabulary`: every
    annotated pixel has a class, so *other* can only be wrong.

    With several processes, all call this with the same arguments: each reads and scores its share
    of the images, and all get the same figures. The examples are process 0's.

    Args:
      limit: number of images, spread evenly over the source (neighbours are often frames of one
        video); None = all.
      seed: of the sampling noise. The result does not depend on how images are batched, nor on
        the number of devices.
      sampler: in place of segmenter.config.sampler.
      examples: number of images to keep for a report, spread evenly.
      ceiling: the ground truth through codec and VAE and back, in place of a prediction: what a
        perfect UNet would score. The summary then also says what the VAE leaves of the photos.
      open_vocabulary: pixels below `config.codec.threshold` are *other* and count as wrong.
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
    decoding = dataclasses.replace(segmenter.config.codec, closed=not open_vocabulary)
    decide = functools.partial(segmenter.segmentation, classes=source.vocabulary, decoding=decoding)
    total = len(source) if limit is None else min(limit, len(source))
    chosen = _spread(total, len(source))
    shown = set(_spread(min(examples, total), total))
    size = min(total, _images_per_call(segmenter, len(classes), sampler))
    matrix = np.zeros((len(classes), len(classes) + 1), np.int64)
    ids: Counter[int] = Counter()  # of the mask files: pixels
    kept: list[Example] = []
    photos: list[reconstruction.Sums] = []
    if not ceiling:
        segmenter.table(classes)  # what is wrong with the classes is wrong before the first image
    if progress:
        progress(0, total)
    for start in range(0, total, size):
        numbers = range(start, min(start + size, total))
        owners = [_owner(i, shown) for i in numbers]
        own = {i: source[chosen[i]] for i in numbers if owners[i - start] == processes.index()}
        # One shape, one compilation: the last chunk is filled up with its last image.
        full = [*range(len(numbers)), *[-1] * (size - len(numbers))]
        images = _fitted(own, owners, "image", segmenter)[full]
        spread = None
        if ceiling:
            labels = _fitted(own, owners, "labels", segmenter)[full]
            gray = _painted_and_back(segmenter, labels, len(classes), sampler)
            sizes = _of_all([r["image"].shape[:2] for r in own.values()], owners, np.zeros(2, int))
            photos += _photos_and_back(segmenter, images, sizes)
        else:
            names = [own[i]["name"] if i in own else f"image {chosen[i]}" for i in numbers]
            names += names[-1:] * (size - len(names))
            gray, spread = segmenter.unclipped_maps(list(images), classes, sampler, seed, names)
        for i, record in own.items():
            spread_i = spread[i - start] if spread is not None and sampler.ensemble > 1 else None
            example = _scored(decide, gray[i - start], spread_i, record)
            matrix += metrics.confusion(example.labels, example.prediction, len(classes))
            ids.update(record.get("ids") or count_ids(record["labels"]))
            if i in shown:
                kept.append(example)
        if progress:
            progress(numbers[-1] + 1, total)
    matrix = _summed(matrix)
    summary = _summary(matrix, segmenter, source, sampler, total, seed, ceiling)
    summary["settings"] |= {"closed": not open_vocabulary}
    if open_vocabulary:
        summary["settings"]["threshold"] = decoding.threshold
    summary["labels"] = label_summary.figures(source, _summed_ids(ids), total)
    return Result(matrix, summary | (reconstruction.summarize(photos) if photos else {}), kept)


def _owner(image: int, shown: Collection[int]) -> int:
    """The process that reads and scores an image; process 0 shows what is to be shown."""
    return 0 if image in shown else image % processes.count()


def _fitted(
    own: Mapping[int, Any], owners: Sequence[int], name: str, segmenter: Segmenter
) -> np.ndarray:
    """A chunk's "image" [I, h, w, 3] or "labels" [I, h, w] as the networks see them, in every host.

    own: the records that this one has read; owners: of each image of the chunk, the process.
    """
    data = segmenter.config.data
    fitted = [geometry.fit(record[name], data.image_size, data.fit) for record in own.values()]
    shape = (*data.image_size, 3) if name == "image" else data.image_size
    return _of_all(fitted, owners, np.zeros(shape, np.uint8))


def _of_all(own: Sequence[Any], owners: Sequence[int], empty: np.ndarray) -> np.ndarray:
    """An array for each image of a chunk, [I, ...], of which this process has its `own`."""
    rows = np.stack([empty] * max(map(owners.count, owners)))
    for row, value in zip(rows, own, strict=False):
        row[...] = value
    every = processes.stacked(rows)  # [processes, rows, ...]
    return every[owners, [owners[:i].count(owner) for i, owner in enumerate(owners)]]


def _summed_ids(ids: Mapping[int, int]) -> dict[int, int]:
    """{id of at most 16 bits: pixels} over all processes."""
    pixels = np.zeros(2**16, np.int64)
    pixels[list(ids)] = list(ids.values())
    everywhere = _summed(pixels)
    return {int(i): int(everywhere[i]) for i in np.flatnonzero(everywhere)}


def _scored(
    decide: Callable[..., Segmentation],
    gray: np.ndarray,
    spread: np.ndarray | None,
    record: Mapping[str, Any],
) -> Example:
    """What the maps [P, h, w] of an image say at its own size."""
    name, labels = record["name"], record["labels"]
    found = decide(gray, spread, record["image"])
    return Example(name, record["image"], labels, found.labels, found.uncertainty)


def _summed(matrix: np.ndarray) -> np.ndarray:
    """The sum over all processes of an int64 matrix; as bytes, since JAX would make it int32."""
    return processes.stacked(matrix.view(np.uint8)).view(np.int64).sum(0)


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
    segmenter: Segmenter, labels: np.ndarray, num_classes: int, sampler: SamplerConfig
) -> np.ndarray:
    """Labels [I, h, w] → the unclipped maps [I, P, h, w] that a perfect sampler would return."""
    config = segmenter.config
    height, width = config.data.image_size
    groups = codec.groups(num_classes, codec.group_size(num_classes, config.codec.classes_per_pass))
    painted = np.stack(
        [np.asarray(codec.encode(jnp.asarray(labels), jnp.asarray(ids))) for ids in groups], axis=1
    )
    jobs = painted.reshape(-1, height, width, 1)  # [I * P, h, w, 1]
    chunk = multiple(min(sampler.batch_size, len(jobs)), segmenter.mesh.size)
    pixels = (np.broadcast_to(p, (*p.shape[:3], 3)) for p in equal_parts(jobs, chunk))
    back = [np.asarray(codec.to_gray(jnp.asarray(segmenter.reconstruct(part)))) for part in pixels]
    return np.concatenate(back)[: len(jobs)].reshape(painted.shape)


def _photos_and_back(
    segmenter: Segmenter, images: np.ndarray, sizes: np.ndarray
) -> list[reconstruction.Sums]:
    """The first of `images` uint8 [I, h, w, 3] against themselves through the VAE.

    sizes: int [n, 2], of the photos they are made from; what is padding does not count.
    """
    pixels, data = np.asarray(codec.to_pixels(images)), segmenter.config.data
    decoded = segmenter.reconstruct(pixels)
    sums = []
    for native, before, after in zip(sizes.tolist(), pixels, decoded, strict=False):
        height, width = geometry.filled((native[0], native[1]), data.image_size, data.fit)
        shown = slice(height), slice(width)
        sums.append(reconstruction.compare(before[shown], after[shown]))
    return sums


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
        "fit": config.data.fit,
        "ceiling": ceiling,
    }
    figures = metrics.summarize(matrix, names, *split)
    if reasons := metrics.undefined(figures):
        figures["undefined"] = reasons
    return figures | {"images": images, "settings": settings}
