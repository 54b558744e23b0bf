"""Suite `predict`: the segmenter against the paper's pipeline, and against its own networks.

Random weights of the preset `small`: times do not depend on what the masks show.
"""

import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from segdiff_jax import files
from segdiff_jax.benchmarks import cpu, paper, photos, twins
from segdiff_jax.benchmarks.timing import Result, check_equal, in_turn, rate
from segdiff_jax.config import CodecConfig, Config, DataConfig, SamplerConfig, stored
from segdiff_jax.data import geometry
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.models import presets
from segdiff_jax.models.clip_text import CLIPText
from segdiff_jax.models.joint_decoder import JointDecoder
from segdiff_jax.models.linear_decoder import LinearDecoder
from segdiff_jax.models.unet import UNet
from segdiff_jax.models.vae import VAE
from segdiff_jax.text import vocabulary
from segdiff_jax.text.tokenizer import train_tokenizer
from segdiff_jax.weights import pretrained
from segdiff_jax.weights.mask_decoders import Decoders
from segdiff_jax.weights.workdir import EXPORT_SETTINGS

_NAMES = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car"]
_NAMES += ["pedestrian", "cyclist"]
_CLASSES = vocabulary.from_names(_NAMES)
_NARROW = presets.Architecture(
    cpu.NARROW,
    cpu.NARROW_VAE,
    dataclasses.replace(
        presets.architecture("small").text_encoder, hidden_size=32, intermediate_size=32
    ),
)
_TOLERANCE = 1e-3
_IMPORTS = "import jax, flax.nnx"


def run(small: bool) -> Iterator[Result]:
    """Time the pipeline of the paper, start-up, many photos, a large photo, many classes."""
    with twins.cores(small), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        in_one = _model(CodecConfig(classes_per_pass=0), folder / "in-one-image", small)
        for steps in (2,) if small else (10, 50):
            yield from _paper(in_one, folder / "in-one-image", steps, small)
        model = _model(CodecConfig(), folder / "by-class", small)
        if not small:
            yield from _first_mask(model, folder)
        yield from _many_photos(model, folder / "photos", 3 if small else 60)
        yield from _large_photo(model, (300, 400) if small else (3000, 4000))
        yield from _shortlist(model, 12 if small else 150)
        # The last: with its decoders the model would rank shortlists in another way.
        yield _defaults(model, folder / "in-one-image", small)


def _model(decoding: CodecConfig, folder: Path, small: bool) -> Segmenter:
    """Make a segmenter with random weights, and write them to `folder` as an export."""
    preset = _NARROW if small else presets.architecture("small")
    words = ["a photo of a", *_NAMES, *(f"thing {i}" for i in range(10))]
    tokenizer = train_tokenizer(words, 1024, preset.text_encoder.max_position_embeddings)
    text = dataclasses.replace(preset.text_encoder, vocab_size=tokenizer.vocab_size)
    config = Config(
        data=DataConfig(source="scenes", image_size=(32, 48) if small else (96, 128)),
        codec=decoding,
        sampler=SamplerConfig(steps=10),
    )
    networks = (
        twins.filled(lambda: UNet(preset.unet, rngs=nnx.Rngs(0))),
        twins.filled(lambda: VAE(preset.vae, rngs=nnx.Rngs(0))),
        twins.filled(lambda: CLIPText(text, rngs=nnx.Rngs(0))),
        tokenizer,
    )
    parts = pretrained.Pretrained(*networks, config.diffusion)
    settings = {EXPORT_SETTINGS: files.to_json(stored(config))}
    pretrained.save(parts, folder, extra_files=settings, kind="diffusers")
    return Segmenter(*networks, config, trained=_CLASSES)


def _paper(model: Segmenter, folder: Path, steps: int, small: bool) -> Iterator[Result]:
    count, rounds = (2, 2) if small else (10, 3)
    photo = photos.drawn(*model.config.data.image_size)
    plain = dataclasses.replace(model.config.sampler, steps=steps, ensemble=count)
    aligning = dataclasses.replace(plain, align="affine")
    noise = twins.noise(model.encode(photo).latent.shape, count)
    theirs = paper.Pipeline(folder)
    name = f"the paper's pipeline, N = {count}, T = {steps}"
    # Before they are aligned: scipy stops after two iterations, ours goes on to the optimum.
    members = theirs.members(photo, _NAMES, noise, steps)
    middle = np.median(members.clip(-1, 1), axis=0)
    check_equal(name, model.maps([photo], _CLASSES.classes, plain, 0)[0][0, 0], middle, _TOLERANCE)
    model.maps([photo], _CLASSES.classes, aligning, 0)  # compiled
    yield in_turn(
        name,
        lambda: model.maps([photo], _CLASSES.classes, aligning, 0),
        lambda: paper.merged(theirs.members(photo, _NAMES, noise, steps)),
        rounds,
        0.6,
    )


def _defaults(model: Segmenter, folder: Path, small: bool) -> Result:
    """Time what configs/camvid.py does with a photo beside the paper's pipeline at its costliest.

    The masks are others; what each is worth on CamVid is in docs/results.md.
    """
    count, steps, rounds = (2, 2, 2) if small else (10, 50, 3)
    photo = photos.drawn(*model.config.data.image_size)
    shape = model.encode(photo).latent.shape
    noise = twins.noise(shape, count)
    width, channels = model.text_encoder.config.hidden_size, shape[-1]
    pixels = (photo.shape[0] // shape[0]) ** 2
    linear = LinearDecoder(jnp.full((3, 3, channels, pixels), 0.1), jnp.zeros(pixels))
    joint = twins.filled(lambda: JointDecoder(width, rngs=nnx.Rngs(0)))
    model.networks.add_decoders(Decoders(linear, joint=joint))
    once = dataclasses.replace(model.config.sampler, steps=1, ensemble=1, decoder="joint")
    theirs = paper.Pipeline(folder)
    model.maps([photo], _CLASSES.classes, once, 0)  # compiled
    return in_turn(
        f"configs/camvid.py's T = 1, N = 1, to the paper's N = {count}, T = {steps}",
        lambda: model.maps([photo], _CLASSES.classes, once, 0),
        lambda: paper.merged(theirs.members(photo, _NAMES, noise, steps)),
        rounds,
        0.02,
    )


def _first_mask(model: Segmenter, folder: Path) -> Iterator[Result]:
    """Time `predict` as a command, its programs in the cache, beside the imports it needs."""
    photo, output = folder / "photo.png", folder / "masks"
    Image.fromarray(photos.drawn(360, 480)).save(photo)
    command = [sys.executable, "-m", "segdiff_jax.predict", "--checkpoint", folder / "by-class"]
    command += ["--images", photo, "--classes", "; ".join(_NAMES[:4]), "--output", output]
    command += ["--format", "labels"]

    def start(arguments: list[object]) -> None:
        made = subprocess.run(list(map(str, arguments)), capture_output=True, text=True)
        if made.returncode:
            raise RuntimeError(f"{arguments}: {made.stderr[-2000:]}")

    start(command)
    written = np.asarray(Image.open(output / "photo_labels.png"))
    here = model(photo, _NAMES[:4]).labels
    share = float((written != here).mean())
    check_equal("first mask after start", [1 - share], [1.0], 0.01)  # ties of scores may differ
    yield in_turn(
        "first mask after start, to importing JAX and Flax",
        lambda: start(command),
        lambda: start([sys.executable, "-c", _IMPORTS]),
        5,
        4.0,
    )


def _many_photos(model: Segmenter, folder: Path, count: int) -> Iterator[Result]:
    """Time all that is no network: reading, resizing, scores, labels and their file."""
    folder.mkdir()
    paths = [folder / f"{i}.jpg" for i in range(count)]
    for seed, path in enumerate(paths):
        Image.fromarray(photos.drawn(360, 480, seed)).save(path, quality=90)
    images = [np.asarray(Image.open(path)) for path in paths]
    fitted = [_fitted(model, image) for image in images]

    def ours() -> None:
        for path, found in zip(paths, model.stream(paths, _CLASSES), strict=True):
            Image.fromarray(found.labels.astype(np.uint8)).save(path.with_suffix(".png"))

    def networks() -> None:
        for photo in fitted:
            model.maps([photo], _CLASSES.classes, model.config.sampler, 0)

    name = f"{count} photos of 480 × 360, 11 classes, to their networks' own time"
    of_whole, of_fitted = (
        model.maps([photo], _CLASSES.classes, model.config.sampler, 0)[0]
        for photo in (images[0], fitted[0])
    )
    check_equal(name, of_whole, of_fitted, _TOLERANCE)
    ours()
    found = in_turn(name, ours, networks, 3)
    yield found
    yield rate(f"{count} photos of 480 × 360, 11 classes", count, found.ours, "photos/s")


def _fitted(model: Segmenter, photo: np.ndarray) -> np.ndarray:
    data = model.config.data
    return geometry.fit(photo, data.image_size, data.fit)


def _large_photo(model: Segmenter, size: tuple[int, int]) -> Iterator[Result]:
    photo = photos.drawn(*size)
    fitted = _fitted(model, photo)
    sampler = dataclasses.replace(model.config.sampler, ensemble=2)
    networks = lambda image: model.maps([image], _CLASSES.classes, sampler, 0)  # noqa: E731
    name = f"{size[0] * size[1] / 1e6:.3g} megapixels, 11 classes, N = 2, to the networks' own time"
    check_equal(name, networks(photo), networks(fitted), _TOLERANCE)
    model(photo, _CLASSES, ensemble=2)
    yield in_turn(
        name, lambda: model(photo, _CLASSES, ensemble=2), lambda: networks(fitted), 3, 2.5
    )


def _shortlist(model: Segmenter, count: int) -> Iterator[Result]:
    """Time a shortlist of a tenth of the classes against the full budget for all of them."""
    photo = photos.drawn(*model.config.data.image_size)
    classes = vocabulary.from_names([f"thing {i}" for i in range(count)]).classes
    every = dataclasses.replace(model.config.sampler, steps=4)
    some = dataclasses.replace(every, shortlist=count // 10 + 1)
    maps = lambda sampler: model.maps([photo], classes, sampler, 0)[0][0]  # noqa: E731
    in_full, short = maps(every), maps(some)
    kept = short.max((1, 2)) > -1.0  # the others are darker than all
    name = f"{count} classes, a shortlist of {some.shortlist}, to all in full"
    check_equal(name, short[kept], in_full[kept], _TOLERANCE)
    yield in_turn(name, lambda: maps(some), lambda: maps(every), 3)
