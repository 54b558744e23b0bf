"""The code in docs/pytorch.md, run as it stands on exports, gives the masks of the Segmenter."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image

from segdiff_jax import export
from segdiff_jax.diffusion import sampler as sampler_lib
from segdiff_jax.inference.result import from_ranks
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.models.joint_decoder import JointDecoder
from segdiff_jax.models.linear_decoder import LinearDecoder
from segdiff_jax.text import vocabulary
from segdiff_jax.weights import loading
from segdiff_jax.weights.mask_decoders import Decoders

DOC = Path(__file__).parents[1] / "docs" / "pytorch.md"
CLASSES = ["sky", "building, edifice", "road"]


@pytest.fixture(scope="module")
def blocks():
    """The document's Python: functions, their use, and the StableHLO sampler."""
    found = re.findall(r"^```python\n(.*?)^```", DOC.read_text(), re.DOTALL | re.MULTILINE)
    assert len(found) == 3
    return found


def compare(blocks, networks, tmp_path, ensemble=1, decoders=None, trained=None):
    """Exports `networks`, runs the document on it and returns both sides' labels and scores."""
    *modules, config = networks
    export.write_folder((*modules, config), tmp_path / "model", trained=trained, decoders=decoders)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 26, 3), np.uint8))
    photo.save(tmp_path / "photo.png")
    names: dict = {}
    exec(blocks[0], names)
    exec(blocks[1], names)
    written = np.asarray(Image.open(tmp_path / "labels.png"))
    assert written.shape == (40, 26) and set(np.unique(written)) <= {0, 1, 2, 255}

    segmenter = Segmenter(*networks, trained=trained)
    if decoders:
        segmenter.networks.add_decoders(decoders)
    channels, factor = modules[1].config.latent_channels, modules[1].config.downsampling
    shape = (*(n // factor for n in config.data.image_size), channels)
    keys = sampler_lib.member_keys(jax.random.key(4), ensemble)
    noise = np.stack([sampler_lib.initial_noise(key, shape) for key in keys])
    noise = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    ours = segmenter(np.asarray(photo), CLASSES, ensemble=ensemble, seed=4)
    labels, scores = names["segment"](names["model"], photo, CLASSES, noise)
    return ours, labels.numpy(), scores.numpy().transpose(1, 2, 0)


def check(ours, labels, scores, config):
    error = np.linalg.norm(scores - ours.scores) / np.linalg.norm(ours.scores)
    print(f"scores {error:.1e}, labels differ at {(labels != ours.labels).mean():.4f}")
    assert error <= 1e-3
    best = np.sort(scores, -1)
    alone = best[..., -1] - best[..., -2] > 1e-5  # no tie, which rounding may decide either way
    assert alone.mean() > 0.5
    np.testing.assert_array_equal(labels[alone], ours.labels[alone])
    assert (labels == ours.labels).mean() > 0.99, "ties go by the maps beyond [-1, 1]"
    expected = from_ranks(
        scores.transpose(2, 0, 1), None, ours.photo, ours.vocabulary, config.codec
    )
    np.testing.assert_array_equal(labels[alone], expected.labels[alone])
    assert len(np.unique(labels)) > 1, "a constant mask would pass"


def test_a_trained_model_paints_the_same_masks_in_torch(trained, blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (*modules, config), *_ = loading.load_networks(trained)
    steps = dataclasses.replace(config.sampler, steps=4)
    # Training was short: the best of three bad scores, or else every pixel would be *other*.
    codec = dataclasses.replace(config.codec, closed=True)
    config = dataclasses.replace(config, sampler=steps, codec=codec)
    check(*compare(blocks, (*modules, config), tmp_path, ensemble=2), config)


@pytest.mark.parametrize(("group", "context"), [(0, "mean"), (2, "bound")])
def test_several_classes_per_pass(
    group, context, blocks, tiny_networks, tiny_config, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = tiny_config(classes_per_pass=group, context=context, threshold=0.4)
    check(*compare(blocks, (*tiny_networks, config), tmp_path), config)


def test_classes_that_were_rare_in_training_are_raised(
    blocks, tiny_networks, tiny_config, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = tiny_config(classes_per_pass=1, closed=True, logit_adjustment=0.75)
    trained = vocabulary.from_names(["Sky", "house, building", "pole"])
    trained = dataclasses.replace(trained, shares=(0.3, 0.25, 0.28))
    ours, labels, scores = compare(blocks, (*tiny_networks, config), tmp_path, trained=trained)
    check(ours, labels, scores, config)
    settings = dataclasses.replace(config.codec, logit_adjustment=0.0)
    plain = Segmenter(*tiny_networks, dataclasses.replace(config, codec=settings))
    assert (plain(ours.photo, CLASSES, seed=4).labels != ours.labels).any()


@pytest.mark.parametrize("decoder", ["linear", "joint"])
def test_decoders_in_the_place_of_the_vaes(
    decoder, blocks, tiny_networks, tiny_config, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = tiny_config(classes_per_pass=1, closed=True)
    config.sampler.decoder = decoder
    vae, text_encoder = (network.config for network in tiny_networks[1:3])
    rng, pixels = np.random.default_rng(0), vae.downsampling**2
    kernel = rng.normal(0, 0.1, (3, 3, vae.latent_channels, pixels)).astype(np.float32)
    joint = JointDecoder(text_encoder.hidden_size, rngs=nnx.Rngs(0))
    joint.query.kernel[...] = jnp.asarray(rng.normal(0, 0.01, joint.query.kernel.shape))
    decoders = Decoders(LinearDecoder(kernel, np.zeros(pixels, np.float32)), joint=joint)
    check(*compare(blocks, (*tiny_networks, config), tmp_path, 2, decoders), config)


def test_the_stablehlo_sampler(blocks, make_segmenter, tmp_path, monkeypatch):
    from segdiff_jax.inference import stablehlo

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stablehlo, "_LIMIT", 1000)  # weights beside: the longer way
    model = make_segmenter()
    stablehlo.write(model, "sampler", model.config.sampler)
    np.save("context.npy", np.ones((2, 16, 32), np.float32))
    names: dict = {}
    exec(blocks[2], names)
    assert names["maps"].shape == (2, 16, 16) and np.abs(names["maps"]).max() <= 1
