"""Suite `input`: how many training examples a core makes, from JPEGs and from the latent cache.

Images/s are of processor time, so that they are per core whatever else the machine does. The ratio
is to Pillow's decoding of the same files, which no pipeline can do without.
"""

import dataclasses
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flax import nnx
from PIL import Image

from segdiff_jax.benchmarks import photos
from segdiff_jax.benchmarks.timing import Ratio, Result, check_equal, in_turn, rate
from segdiff_jax.config import AugmentConfig, Config, DataConfig, TrainConfig
from segdiff_jax.data import latent_cache, latents, pipeline, transforms
from segdiff_jax.data.sources.source import open_source
from segdiff_jax.models import presets
from segdiff_jax.models.vae import VAE

_CLASSES = 11
_CROP = AugmentConfig(min_scale=1.0, max_scale=2.0, color_jitter=0.2)


def run(small: bool) -> Iterator[Result]:
    """Time photos of CamVid's size, then 512-pixel crops of 1,000-pixel photos."""
    cases = {
        "480 × 360, as CamVid": ((360, 480), DataConfig(image_size=(96, 128))),
        "512-pixel crops of 1000 × 750": (
            (750, 1000),
            DataConfig(image_size=(512, 512), augment=_CROP),
        ),
    }
    for name, (size, data) in cases.items():
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary) / "data"
            _write(root, size if not small else (size[0] // 4, size[1] // 4), 4 if small else 64)
            if small:
                data = dataclasses.replace(data, image_size=(32, 32))
            data = dataclasses.replace(data, root=str(root))
            config = Config(data=data, train=TrainConfig(batch_size=1))
            yield from _pipeline(name, config, small)
            if data.augment.min_scale == data.augment.max_scale:  # nothing but flips is cached
                yield from _cache(name, config, str(Path(temporary) / "cache"), small)


def _write(root: Path, size: tuple[int, int], count: int) -> None:
    """Write a folder of JPEGs that compress about as photos do, and of masks with areas."""
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("".join(f"class {i}\n" for i in range(_CLASSES)))
    height, width = size
    for i in range(count):
        photo = photos.drawn(height, width, i, block=16, grain=0)
        Image.fromarray(photo).save(root / "images" / f"{i:03}.jpg", quality=90)
        areas = rng.integers(0, _CLASSES, (height // 60 + 2, width // 60 + 2), np.uint8)
        mask = Image.fromarray(areas).resize((width, height), Image.Resampling.NEAREST)
        mask.save(root / "masks" / f"{i:03}.png")


def _pipeline(name: str, config: Config, small: bool) -> Iterator[Result]:
    source = open_source(config.data, "train", 0)
    folders = (Path(config.data.root, kind) for kind in ("images", "masks"))
    pairs = list(zip(*(sorted(folder.iterdir()) for folder in folders), strict=True))
    count, rounds = _examples(small)

    def decode() -> list[tuple[np.ndarray, ...]]:
        chosen = (pairs[i % len(pairs)] for i in range(count))
        return [tuple(np.asarray(Image.open(path)) for path in pair) for pair in chosen]

    for number, decoded in enumerate(decode()[: len(pairs)]):
        record = source[number]
        check_equal(name, (record["image"], record["labels"]), decoded, 0.0)
    found = in_turn(
        f"input, {name}, to decoding alone, processor time",
        lambda: _take(pipeline.train_batches(source, config, seed=0), count),
        decode,
        rounds,
    )
    yield from _of_processors(found, f"input, {name}", count)
    records = [source[i] for i in range(len(source))]
    rng = np.random.default_rng(0)

    def augment() -> None:
        for i in range(count):
            record = records[i % len(records)]
            transforms.augment(record["image"], record["labels"], rng, config.data)

    augmented = in_turn(
        f"augmentation, {name}, to decoding alone, processor time", augment, decode, rounds
    )
    yield dataclasses.replace(augmented, ratio=augmented.cpu)


def _cache(name: str, config: Config, folder: str, small: bool) -> Iterator[Result]:
    """Time latents of the preset `small`, which the networks are given in place of pixels."""
    vae = VAE(presets.architecture("small").vae, rngs=nnx.Rngs(0))
    source = open_source(config.data, "train", 0)
    cached = latent_cache.open_or_build(source, vae, config, folder)
    count, rounds = _examples(small)
    makers = (
        lambda: latents.train_batches(cached, config, seed=0),
        lambda: pipeline.train_batches(source, config, seed=0),
    )
    ours, theirs = (_take(make(), 1)["class_ids"] for make in makers)
    check_equal(name, ours, theirs, 0.0)
    found = in_turn(
        f"latent cache, {name}, to the pipeline, processor time",
        lambda: _take(makers[0](), count),
        lambda: _take(makers[1](), count),
        rounds,
    )
    yield from _of_processors(found, f"latent cache, {name}", count)


def _of_processors(found: Ratio, name: str, count: int) -> Iterator[Result]:
    yield dataclasses.replace(found, ratio=found.cpu)
    yield rate(name, count, found.ours_cpu, "images/s per core")


def _examples(small: bool) -> tuple[int, int]:
    """Return how many examples a round has, and how many rounds.

    What the pipeline's threads have made ahead when a round ends is counted too. They are at most
    16, two for each core, with two examples each in their buffer: less than a twentieth.
    """
    return (4, 2) if small else (64 * min(16, 2 * (os.cpu_count() or 1)), 3)


def _take(batches: pipeline.TrainBatches, count: int) -> dict[str, np.ndarray]:
    try:
        for _ in range(count):
            last = next(batches)
        return last
    finally:
        batches.close()
