"""A whole model, random and small enough to compile in seconds."""

import dataclasses
import functools
import io
import logging
import os
import struct
import textwrap
import time
import zlib
from pathlib import Path

import filelock
import pytest
from commands import CONFIG
from jaxtyping import install_import_hook

from segdiff_jax import waiting

# Before anything imports jax: CPU unless told otherwise, compilations kept between test runs, and
# XLA without its slow passes, since tests compile much and compute little.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

# Types and shapes are checked at every call of the mathematics (`segdiff_jax/shapes.py`).
install_import_hook(
    ["segdiff_jax.codec", "segdiff_jax.diffusion", "segdiff_jax.models"], "beartype.beartype"
)

IMAGE_SIZE = (16, 16)


@pytest.fixture(scope="session")
def tiny_networks():
    """(unet, vae, text_encoder, tokenizer): one level, 4 latent channels at f = 2, all random."""

    from segdiff_jax.models import presets
    from segdiff_jax.models.clip_text import CLIPText
    from segdiff_jax.models.unet import UNet
    from segdiff_jax.models.vae import VAE
    from segdiff_jax.text.tokenizer import train_tokenizer

    tiny = presets.architecture("tiny")
    tokenizer = train_tokenizer(["a photo of a sky, building, road"], 600, 16)
    unet_config = dataclasses.replace(
        tiny.unet,
        in_channels=8,
        out_channels=4,
        block_out_channels=(16,),
        cross_attention=(True,),
        heads=(2,),
        norm_groups=8,
        cross_attention_dim=32,
    )
    vae_config = dataclasses.replace(
        tiny.vae, latent_channels=4, block_out_channels=(8, 8), scaling_factor=1.0
    )
    text_config = dataclasses.replace(
        tiny.text_encoder,
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        max_position_embeddings=tokenizer.model_max_length,
    )
    unet = _filled(functools.partial(UNet, unet_config))
    vae = _filled(functools.partial(VAE, vae_config))
    text_encoder = _filled(functools.partial(CLIPText, text_config))
    return unet, vae, text_encoder, tokenizer


def _filled(build):
    """A module whose weights come from numpy: compiling the real initialisers takes a minute."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from segdiff_jax.weights.tensors import shapes_of

    graph, shapes = nnx.split(shapes_of(build))
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        if leaf.ndim > 1:
            fan_in = np.prod(leaf.shape[:-1]) if "embed" not in str(path) else 1
            return jnp.asarray(rng.normal(0, fan_in**-0.5, leaf.shape), leaf.dtype)
        return jnp.ones(leaf.shape) if "scale" in str(path) else jnp.zeros(leaf.shape)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, shapes))


@pytest.fixture(scope="session")
def tiny_config():
    """A function of codec fields that makes the Config of `tiny_networks`: one step, N = 1."""
    from segdiff_jax.config import CodecConfig, Config, DataConfig, SamplerConfig, VAEConfig

    return lambda **codec: Config(
        data=DataConfig(source="scenes", image_size=IMAGE_SIZE),
        codec=CodecConfig(**codec),
        sampler=SamplerConfig(steps=1, batch_size=4),
        vae=VAEConfig(steps=1),
    )


@pytest.fixture(scope="session")
def make_segmenter(tiny_networks, tiny_config):
    """A function of a `Config` (default: one class per pass) that makes a Segmenter."""
    from segdiff_jax.inference.segmenter import Segmenter

    return lambda config=None: Segmenter(*tiny_networks, config or tiny_config())


@pytest.fixture(scope="session")
def bomb():
    """A PNG file of 70 bytes whose header says 30,000 × 30,000 pixels."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("1", (1, 1)).save(buffer, "PNG")
    small = buffer.getvalue()
    header = b"IHDR" + struct.pack(">II", 30_000, 30_000) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """What a command leaves in its process, and its process is that of all tests here.

    Its log would go to a stream that is closed; a call that was given up and still runs would make
    the next `cli.run` end the process.
    """
    yield
    for handler in logging.root.handlers[:]:
        if type(handler) is logging.StreamHandler:  # pytest's own are of classes below it
            logging.root.removeHandler(handler)
    end = time.monotonic() + 10
    while waiting.left_behind() and time.monotonic() < end:
        time.sleep(0.01)
    assert not waiting.left_behind(), "a call that was given up still runs"


@pytest.fixture
def optimized():
    """XLA with all of its passes: for a test that computes more than it compiles."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def micro_config():
    """A function that makes the Config of `trained`: both stages, from nothing, in seconds."""
    from segdiff_jax.config import TrainConfig, VAEConfig, validate

    names: dict = {}
    exec(textwrap.dedent(CONFIG), names)

    def make():
        config = names["get_config"]()
        config.train = TrainConfig(
            steps=6, batch_size=4, checkpoint_every=2, log_every=1, eval_every=6, eval_examples=2
        )
        config.vae = VAEConfig(steps=3, batch_size=4)
        return validate(config)

    return make


@pytest.fixture(scope="session")
def trained(micro_config, tmp_path_factory):
    """The workdir of a finished training with `micro_config`. Not to be written to."""
    from segdiff_jax.train import train

    # What libraries take for patterns, escapes or the end of a name is part of this one.
    folder = tmp_path_factory.getbasetemp() / "trained [x] 10%20*?#é"
    if "PYTEST_XDIST_WORKER" in os.environ:  # one training for all processes of the tests
        folder = tmp_path_factory.getbasetemp().parent / folder.name
    with filelock.FileLock(folder.with_suffix(".lock")):
        if not (folder / "done").exists():
            train(micro_config(), str(folder / "run"))
            (folder / "done").touch()
    return str(folder / "run")


@pytest.fixture
def place(tmp_path, tiny_networks, tiny_config, monkeypatch):
    """A folder with w, a workdir of the tiny networks, and two photos in the folder in."""
    import numpy as np
    from PIL import Image

    from segdiff_jax.weights import loading, workdir
    from segdiff_jax.weights.mask_decoders import Decoders

    def load(path, which):
        networks = (*tiny_networks, workdir.read_config(path))
        return networks, Decoders(), {"newest": 6, "best": 2}[which]

    monkeypatch.setattr(loading, "load_networks", load)
    monkeypatch.setattr("segdiff_jax.parallel.runtime.start", lambda: None)
    workdir.write_config(str(tmp_path / "w"), tiny_config())
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for name, size in (("a.png", (20, 28)), ("b.bmp", (24, 18))):
        photo = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(photo).save(tmp_path / "in" / name)
    return tmp_path


@pytest.fixture
def run_predict(place, capsys):
    """A function that runs `predict` on photos below `place` and returns what it printed."""
    from segdiff_jax import cli, predict

    def run(*flags, images=("in",), classes="sky; building, edifice; road", output="o", code=0):
        argv = ["--checkpoint", str(place / "w"), "--output", str(place / output), *flags]
        places = (image if "://" in image else str(place / image) for image in images)
        argv += ["--classes", classes, "--images", *places]
        with pytest.raises(SystemExit) as caught:
            cli.run(predict.main, argv)
        printed = capsys.readouterr()
        assert caught.value.code == code, printed.err
        return printed

    return run


@pytest.fixture
def refused(run_predict):
    """A function that runs `predict` as `run_predict`, for a fault told in one line: that line."""

    def run(*flags, **options):
        error = run_predict(*flags, code=2, **options).err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return run
