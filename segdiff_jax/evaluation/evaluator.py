"""A model against a labelled dataset: predictions at native resolution, counted."""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from segdiff_jax import codec
from segdiff_jax.config import SamplerConfig
from segdiff_jax.data import geometry, label_summary
from segdiff_jax.data.sources.source import Source, count_ids, evenly
from segdiff_jax.evaluation import asked as asking
from segdiff_jax.evaluation import metrics, reconstruction
from segdiff_jax.evaluation.asked import Asked
from segdiff_jax.evaluation.parts import Part, Parts
from segdiff_jax.inference.result import Segmentation
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.parallel import processes
from segdiff_jax.parallel.placement import equal_parts, multiple
from segdiff_jax.progress import Progress


class Example(NamedTuple):
    """One evaluated image, to show."""

    name: str
    image: np.ndarray  # uint8 [H, W, 3]
    labels: np.ndarray  # uint8 or uint16 [H, W] as of `Source`
    prediction: np.ndarray  # int32 [H, W]
    uncertainty: np.ndarray | None  # float32 [H, W]; None for an ensemble of one


class Result(NamedTuple):
    confusion: np.ndarray  # int64 [K, K+1], see metrics.confusion
    summary: dict[str, Any]  # what metrics.json holds: figures, number of images, settings
    examples: list[Example]
    per_image: list[metrics.OfImage]  # in the order of the images, then of the classes


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
    synonyms: str = "mean",
    progress: Progress | None = None,
    keep: tuple[str, Mapping[str, Any]] | None = None,
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
      synonyms: one of `asked.SYNONYMS`.
      progress: called with (done, total) images.
      keep: a folder for what is done, and what tells this model and data from others, as JSON
        values. A stopped evaluation goes on from there; `parts.remove` when it is not needed.

    Returns:
      `Result`. Where the source names novel classes, the summary has the trained / novel split.

    Raises:
      UserError: an image or its labels cannot be read, or its maps are not finite; the message
        names the file. The model cannot tell the classes apart, or does not know them.
    """
    sampler = sampler or segmenter.config.sampler
    if ceiling:
        sampler = dataclasses.replace(sampler, ensemble=1, shortlist=0)
    asked = asking.of(source, "mean" if ceiling else synonyms)
    classes, num_classes = asked.vocabulary.classes, len(source.vocabulary)
    decoding = dataclasses.replace(segmenter.config.codec, closed=not open_vocabulary)
    decide = functools.partial(segmenter.segmentation, classes=asked.vocabulary, decoding=decoding)
    scored = functools.partial(_scored, decide, source, asked)
    total = len(source) if limit is None else min(limit, len(source))
    chosen = evenly(total, len(source))
    shown = set(evenly(min(examples, total), total))
    size = min(total, _images_per_call(segmenter, len(classes), sampler))
    sums = metrics.nothing(num_classes)
    ids: Counter[int] = Counter()  # of the mask files: pixels
    kept: list[Example] = []
    per_image: list[tuple[int, metrics.OfImage]] = []  # with the image's number
    photos: list[reconstruction.Sums] = []
    if not ceiling:
        segmenter.table(classes)  # what is wrong with the classes is wrong before the first image
    read = functools.partial(_read, source, segmenter.config.data.shortest)
    stored = None
    if keep and total and not ceiling:
        about = _settings(segmenter, sampler, seed, ceiling) | dict(keep[1])
        about |= {"open": open_vocabulary, "synonyms": synonyms}
        about |= {"threshold": decoding.threshold, "images": chosen, "shown": sorted(shown)}
        stored = Parts(keep[0], about, range(0, total, size))
    if progress:
        progress(0, total)
    for start in range(0, total, size):
        numbers = range(start, min(start + size, total))
        part, own = stored.load(start) if stored else None, {}
        if part is None:
            owners = [_owner(i, shown) for i in numbers]
            mine = [i for i in numbers if owners[i - start] == processes.index()]
            own = {i: read(chosen[i]) for i in mine}
            # One shape, one compilation: the last chunk is filled up with its last image.
            full = [*range(len(numbers)), *[-1] * (size - len(numbers))]
            images = _fitted(own, owners, "image", np.uint8, segmenter)[full]
            spread = None
            if ceiling:
                kind = codec.label_type(num_classes)
                labels = _fitted(own, owners, "labels", kind, segmenter)[full]
                gray = _painted_and_back(segmenter, labels, len(classes), sampler)
                sizes = [record["image"].shape[:2] for record in own.values()]
                natives = _of_all(sizes, owners, np.zeros(2, int))
                photos += _photos_and_back(segmenter, images, natives)
            else:
                names = [own[i]["name"] if i in own else f"image {chosen[i]}" for i in numbers]
                names += names[-1:] * (size - len(names))
                gray, spread = segmenter.unclipped_maps(list(images), classes, sampler, seed, names)
            uncertain = spread if sampler.ensemble > 1 else None
            part = _count(scored, own, start, gray, uncertain, shown, metrics.nothing(num_classes))
            if stored:
                stored.save(start, part)
        sums = metrics.Sums(*map(np.add, sums, part.sums))
        per_image += part.rows
        ids.update(part.ids)
        for i, (labels, uncertainty) in part.maps.items():
            record = own[i] if i in own else read(chosen[i])
            shown_as = record["name"], record["image"], record["labels"]
            kept.append(Example(*shown_as, labels, uncertainty))
        if progress:
            progress(numbers[-1] + 1, total)
    sums = metrics.Sums(*map(_summed, sums))
    summary = _summary(sums, segmenter, source, sampler, total, seed, ceiling)
    summary["settings"] |= {"closed": not open_vocabulary}
    if asked.vocabulary is not source.vocabulary:
        summary["settings"] |= {"classes_asked": len(classes), "synonyms": synonyms}
    if open_vocabulary:
        summary["settings"]["threshold"] = decoding.threshold
    summary["labels"] = label_summary.figures(source, _summed_ids(ids), total)
    summary |= reconstruction.summarize(photos) if photos else {}
    return Result(sums.confusion, summary, kept, _together(per_image))


def _owner(image: int, shown: Collection[int]) -> int:
    """The process that reads and scores an image; process 0 shows what is to be shown."""
    return 0 if image in shown else image % processes.count()


def _fitted(
    own: Mapping[int, Any], owners: Sequence[int], name: str, kind: type, segmenter: Segmenter
) -> np.ndarray:
    """A chunk's "image" [I, h, w, 3] or "labels" [I, h, w] as the networks see them, in every host.

    own: the records that this one has read; owners: of each image of the chunk, the process;
    kind: the type of the array's values.
    """
    data = segmenter.config.data
    fitted = [geometry.fit(record[name], data.image_size, data.fit) for record in own.values()]
    shape = (*data.image_size, 3) if name == "image" else data.image_size
    return _of_all(fitted, owners, np.zeros(shape, kind))


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


def _read(source: Source, shortest: int, index: int) -> dict[str, Any]:
    """A pair, shrunk to a shorter side of `shortest` pixels where that is set and exceeded."""
    record = source[index]
    height, width = record["labels"].shape
    if not 0 < shortest < min(height, width):
        return record
    size = tuple(round(side * shortest / min(height, width)) for side in (height, width))
    smaller = {name: geometry.resize(record[name], size) for name in ("image", "labels")}
    return {"ids": count_ids(record["labels"])} | record | smaller


def _count(
    scored: Callable[..., tuple[np.ndarray, np.ndarray | None, metrics.Sums, list[Any]]],
    own: Mapping[int, Any],
    start: int,
    gray: np.ndarray,
    spread: np.ndarray | None,
    shown: Collection[int],
    nothing: metrics.Sums,
) -> Part:
    """What the maps of a chunk, which begins with image `start`, add to the sums."""
    part = Part(nothing, [], Counter(), {})
    for i, record in own.items():
        uncertain = None if spread is None else spread[i - start]
        labels, uncertainty, sums, rows = scored(gray[i - start], uncertain, record, i % 2 == 0)
        part = part._replace(sums=metrics.Sums(*map(np.add, part.sums, sums)))
        part.rows.extend((i, row) for row in rows)
        part.ids.update(record.get("ids") or count_ids(record["labels"]))
        if i in shown:
            part.maps[i] = labels, uncertainty
    return part


def _scored(
    decide: Callable[..., Segmentation],
    source: Source,
    asked: Asked,
    gray: np.ndarray,
    spread: np.ndarray | None,
    record: Mapping[str, Any],
    held_out: bool,
) -> tuple[np.ndarray, np.ndarray | None, metrics.Sums, list[metrics.OfImage]]:
    """Labels and uncertainty that the maps [P, h, w] of an image mean at its own size, and what
    that adds to the sums."""
    found, truth = decide(gray, spread, record["image"]), record["labels"]
    names = source.vocabulary.names
    labels = asked.labels(found.labels)
    highest = asked.highest(found.network_scores.max((0, 1)), len(names))
    part = metrics.count(truth, labels, highest, found.confidence, found.uncertainty, held_out)
    rows = metrics.of_image(record["name"], part, highest, names)
    return labels, found.uncertainty, part, rows


def _together(rows: list[tuple[int, metrics.OfImage]]) -> list[metrics.OfImage]:
    """Those of all processes, in the order of the images."""
    own = json.dumps(rows).encode("ascii")
    longest = int(processes.stacked(np.array(len(own), np.int32)).max())
    padded = np.frombuffer(own.ljust(longest), np.uint8)  # JSON may end with blanks
    every = [row for text in processes.stacked(padded) for row in json.loads(text.tobytes())]
    return [metrics.OfImage(*row) for _, row in sorted(every, key=lambda pair: pair[0])]


def _summed(matrix: np.ndarray) -> np.ndarray:
    """The sum over all processes of an int64 matrix; as bytes, since JAX would make it int32."""
    return processes.stacked(matrix.view(np.uint8)).view(np.int64).sum(0)


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
    sums: metrics.Sums,
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
    settings = _settings(segmenter, sampler, seed, ceiling)
    figures = metrics.summarize(sums.confusion, names, *split)
    figures |= metrics.summarize_rest(sums, names)
    if reasons := metrics.undefined(figures, sampler.ensemble > 1):
        figures["undefined"] = reasons
    return figures | {"images": images, "settings": settings}


def _settings(
    segmenter: Segmenter, sampler: SamplerConfig, seed: int, ceiling: bool
) -> dict[str, Any]:
    config = segmenter.config
    return dataclasses.asdict(sampler) | {
        "seed": seed,
        "classes_per_pass": config.codec.classes_per_pass,
        "context": config.codec.context,
        "templates": list(config.prompts.templates),
        "image_size": list(config.data.image_size),
        "fit": config.data.fit,
        "shortest": config.data.shortest,
        "ceiling": ceiling,
    }
