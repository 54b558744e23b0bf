"""A model against a labelled dataset: predictions at native resolution, counted.

images ─► chunks, of which each process reads its share
       ─► fitted views, in all processes
       ─► gray maps: sampled, or the ceiling's, painted from the labels
          (with `sampler.tiles` each photo goes through the segmenter by itself, in one process)
       ─► part: what the labels at each image's own size count, of the process's share
       ─► sums over the chunks, then over the processes ─► figures
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from segdiff_jax import codec, files
from segdiff_jax.data import geometry
from segdiff_jax.data.sources.source import count_ids, files_digest
from segdiff_jax.errors import UserError
from segdiff_jax.evaluation import metrics, parts, reconstruction
from segdiff_jax.evaluation import plan as plans
from segdiff_jax.evaluation.parts import Part, Parts
from segdiff_jax.evaluation.plan import Plan
from segdiff_jax.inference import pictures
from segdiff_jax.inference.result import Segmentation
from segdiff_jax.parallel import processes
from segdiff_jax.progress import Progress

Own = Mapping[int, Mapping[str, Any]]  # of a chunk, what this process has read, by image


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
    plan: Plan,
    progress: Progress | None = None,
    keep: tuple[str, Mapping[str, Any]] | None = None,
) -> Result:
    """Segment the images of a plan into their source's vocabulary and count what is right.

    With several processes, all call this with the same arguments: each reads and scores its share
    of the images, and all get the same figures. The examples are process 0's. The result depends
    neither on how images are batched nor on the number of devices.

    Args:
      progress: called with (done, total) images.
      keep: a folder for what is done, and what tells this model and data from others, as JSON
        values. A stopped evaluation goes on from there; `parts.remove` when it is not needed.

    Returns:
      `Result`. Where the source names novel classes, the summary has the trained / novel split; of
      a ceiling it also says what the VAE leaves of the photos.

    Raises:
      UserError: an image or its labels cannot be read, or its maps are not finite; the message
        names the file. The model cannot tell the classes apart, or does not know them. Windows
        are asked of several processes: the photos at their own size are where they were read.
    """
    if plan.in_tiles and processes.count() > 1:
        raise UserError(
            f"config.sampler.tiles={plan.sampling.tiles}: windows are evaluated by one process: "
            "start one, or leave them out"
        )
    if not plan.ceiling:  # what is wrong with the classes is wrong before the first image
        plan.segmenter.table(plan.asked.vocabulary.classes)
    stored = _stored(plan, *keep) if keep and not plan.ceiling else None
    counted, kept, photos = _run(plan, stored, progress or (lambda done, total: None))
    counted = parts.of_all_processes(counted)
    summary = plans.summary(plan, counted)
    summary |= reconstruction.summarize(photos) if photos else {}
    return Result(counted.sums.confusion, summary, kept, [row for _, row in counted.rows])


def _run(
    plan: Plan, stored: Parts | None, progress: Progress
) -> tuple[Part, list[Example], list[reconstruction.Sums]]:
    """Return this process's part of all chunks, its examples, and what the VAE leaves of photos."""
    total = len(plan.images)
    counted = parts.nothing(len(plan.source.vocabulary))
    examples: list[Example] = []
    photos: list[reconstruction.Sums] = []
    progress(0, total)
    for start in range(0, total, plan.at_once):
        chunk = range(start, min(start + plan.at_once, total))
        own: Own = {}
        part = stored.load(start) if stored else None
        gray: np.ndarray | None
        if part is None:
            own = {i: _read(plan, i) for i in chunk if plan.owner(i) == processes.index()}
            if plan.ceiling:  # the gray maps of a perfect sampler
                labels, count = _views(plan, chunk, own, "labels"), len(plan.asked.vocabulary)
                gray, spread = reconstruction.masks(plan.segmenter, labels, count), None
                photos += _reconstructed(plan, chunk, own)
            else:
                gray, spread = (None, None) if plan.in_tiles else _sampled(plan, chunk, own)
            part = _part(plan, chunk, own, gray, spread)
            if stored:
                stored.save(start, part)
        counted = parts.added(counted, part)
        for i, (labels, uncertainty) in part.maps.items():
            record = own[i] if i in own else _read(plan, i)
            shown_as = record["name"], record["image"], record["labels"]
            examples.append(Example(*shown_as, labels, uncertainty))
        progress(chunk[-1] + 1, total)
    return counted, examples, photos


def _stored(plan: Plan, folder: str, about: Mapping[str, Any]) -> Parts:
    """Open the parts in `folder` of this evaluation, of the model and data that `about` names.

    Names stay where weights, masks or classes are replaced, so what they hold counts too. Of files
    size and time do, those of every process, which all must find the same parts.
    """
    digest = np.frombuffer(bytes.fromhex(files_digest(plan.source)), np.uint8)
    config = plan.segmenter.config
    made_from = {
        **plans.settings(plan),
        **about,
        "weights": plan.segmenter.networks.checksum(),
        "config": [dataclasses.asdict(config.data), config.seed],
        "classes": [entry.names for entry in plan.asked.vocabulary.classes],
        "files": processes.stacked(digest).tolist(),
        "asked": [plan.asked.synonyms, dataclasses.asdict(plan.decoding)],
        "images": [plan.images, plan.shown, plan.predictions],
    }
    return Parts(folder, made_from, range(0, len(plan.images), plan.at_once))


def _read(plan: Plan, image: int) -> dict[str, Any]:
    """Read a pair, shrunk to `config.data.shortest` pixels where that is set and exceeded."""
    record, shortest = plan.source[plan.images[image]], plan.segmenter.config.data.shortest
    height, width = record["labels"].shape
    if not 0 < shortest < min(height, width):
        return record
    size = tuple(round(side * shortest / min(height, width)) for side in (height, width))
    smaller = {name: geometry.resize(record[name], size) for name in ("image", "labels")}
    return {"ids": count_ids(record["labels"])} | record | smaller


def _views(plan: Plan, chunk: range, own: Own, name: str) -> np.ndarray:
    """Fit each "image" [I, h, w, 3] or "labels" [I, h, w] to the networks, in all processes.

    I is `plan.at_once`, so that one compilation does: the last image fills up the last chunk.
    """
    data = plan.segmenter.config.data
    fitted = [geometry.fit(record[name], data.image_size, data.fit) for record in own.values()]
    empty = np.zeros((*data.image_size, 3), np.uint8)
    if name == "labels":
        empty = np.zeros(data.image_size, codec.label_type(len(plan.source.vocabulary)))
    every = _of_all(plan, chunk, fitted, empty)
    return every[np.minimum(np.arange(plan.at_once), len(every) - 1)]


def _of_all(plan: Plan, chunk: range, own: Sequence[Any], empty: np.ndarray) -> np.ndarray:
    """Gather an array for each image of a chunk, [I, ...], of which this process has its `own`."""
    owners = [plan.owner(i) for i in chunk]
    rows = np.stack([empty] * max(map(owners.count, owners)))
    for row, value in zip(rows, own, strict=False):
        row[...] = value
    every = processes.stacked(rows)  # [processes, rows, ...]
    return every[owners, [owners[:i].count(owner) for i, owner in enumerate(owners)]]


def _sampled(plan: Plan, chunk: range, own: Own) -> tuple[np.ndarray, np.ndarray | None]:
    """Sample the gray maps [I, P, h, w] of a chunk, and of an ensemble their spread."""
    names = [own[i]["name"] if i in own else f"image {plan.images[i]}" for i in chunk]
    names += names[-1:] * (plan.at_once - len(names))
    photos, classes = list(_views(plan, chunk, own, "image")), plan.asked.vocabulary.classes
    gray, spread = plan.segmenter.unclipped_maps(photos, classes, plan.sampling, plan.seed, names)
    return gray, spread if plan.sampling.ensemble > 1 else None


def _reconstructed(plan: Plan, chunk: range, own: Own) -> list[reconstruction.Sums]:
    """Compare each photo of a chunk with what the VAE leaves of it."""
    sizes = [record["image"].shape[:2] for record in own.values()]
    natives = _of_all(plan, chunk, sizes, np.zeros(2, int))
    return reconstruction.photos(plan.segmenter, _views(plan, chunk, own, "image"), natives)


def _part(
    plan: Plan, chunk: range, own: Own, gray: np.ndarray | None, spread: np.ndarray | None
) -> Part:
    """Count what the maps of a chunk mean for the images that this process has read.

    Without maps, the segmenter is asked for each photo by itself, in windows.
    """
    part = parts.nothing(len(plan.source.vocabulary))
    for i, record in own.items():
        if gray is None:
            found = _in_tiles(plan, record)
        else:
            found = plan.segmenter.segmentation(
                gray[i - chunk.start],
                None if spread is None else spread[i - chunk.start],
                record["image"],
                plan.asked.vocabulary,
                plan.decoding,
            )
        part = parts.added(part, _of_image(plan, i, record, found))
    return part


def _in_tiles(plan: Plan, record: Mapping[str, Any]) -> Segmentation:
    asked = plan.asked.vocabulary, plan.sampling, plan.decoding, plan.seed
    try:
        return plan.segmenter.in_tiles(record["image"], *asked)
    except UserError as error:
        raise UserError(f"{record['name']}: {error}") from error


def _of_image(plan: Plan, image: int, record: Mapping[str, Any], found: Segmentation) -> Part:
    """Count what was found in an image, at its own size."""
    asked, names, truth = plan.asked, plan.source.vocabulary.names, record["labels"]
    labels = asked.labels(found.labels)
    if plan.predictions:
        data = pictures.label_png(labels, plan.source.vocabulary.palette())
        files.write_bytes(os.path.join(plan.predictions, f"{record['name']}.png"), data)
    highest = asked.highest(found.network_scores.max((0, 1)), len(names))
    held_out = image % 2 == 0
    sums = metrics.count(truth, labels, highest, found.confidence, found.uncertainty, held_out)
    rows = [(image, row) for row in metrics.of_image(record["name"], sums, highest, names)]
    ids = Counter(record.get("ids") or count_ids(truth))
    maps = {image: (labels, found.uncertainty)} if image in plan.shown else {}
    return Part(sums, rows, ids, maps)
