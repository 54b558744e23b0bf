"""Classes of a photo that compete in the diffusion stage: the loss, its rows, whole trainings."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_e2e import B, C, K, make_batch
from test_run import same_bits, state_of
from test_step import SmallUNet
from test_telemetry import read_scalars

from segdiff_jax import aot, codec
from segdiff_jax.config import Config, NoiseConfig, OptimizerConfig, TrainConfig, validate
from segdiff_jax.diffusion import schedule as schedules
from segdiff_jax.errors import UserError
from segdiff_jax.models import linear_decoder
from segdiff_jax.models.vae import encode_latents
from segdiff_jax.parallel import mesh as meshes
from segdiff_jax.text.conditioning import PromptTable
from segdiff_jax.train import train
from segdiff_jax.training import losses
from segdiff_jax.training.step import diffusion_step, init_state

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def parts(tiny_networks):
    """(unet, frozen networks with a linear decoder of their latents)."""
    vae = tiny_networks[1]
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(K, 7, 5)), jnp.float32)
    channels, factor = vae.config.latent_channels, vae.config.downsampling
    kernel = jnp.asarray(rng.normal(0, 0.1, (3, 3, channels, factor**2)), jnp.float32)
    decoder = linear_decoder.LinearDecoder(kernel, jnp.zeros(factor**2))
    schedule = schedules.make_schedule(Config().diffusion)
    table = PromptTable(hidden, hidden[:, 0])
    return SmallUNet(nnx.Rngs(0)), losses.Frozen(vae, schedule, table, decoder)


def make_config(**train):
    defaults = {"batch_size": B, "classes": C, "label_weight": 0.5, "terminal_share": 0.5}
    return Config(
        noise=NoiseConfig(kind="gaussian"),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, clip_norm=1e9),
        train=TrainConfig(**defaults | train),
    )


def drawn_for(batch, vae):
    factor, channels = vae.config.downsampling, vae.config.latent_channels
    height, width = (n // factor for n in batch["labels"].shape[1:])
    noise = jax.random.normal(jax.random.key(1), (B, height, width, channels))
    return losses.Corruption(jnp.array([999, 500, 20, 999]), noise)


def weights_of(batch, vae, balance=0.0):
    latents = losses.latent_weights(losses.by_pass(batch), vae.config.downsampling, balance)
    return losses.JointWeights(
        latents.reshape(B, C, *latents.shape[1:]), losses.label_weights(batch)
    )


def as_cached(batch, vae):
    """The batch as the latent cache gives it."""
    factor, ids = vae.config.downsampling, np.maximum(batch["class_ids"], 0)
    repeated = jnp.asarray(np.repeat(batch["labels"], C, axis=0))
    flat = jnp.asarray(ids.reshape(-1, 1))
    masks = encode_latents(vae, codec.mask_images(repeated, flat))
    shown = jax.vmap(codec.latent_shown, (0, 0, None))(repeated, flat, factor)
    return {
        "image_latents": encode_latents(vae, codec.to_pixels(batch["image"])),
        "valid": codec.latent_valid(jnp.asarray(batch["labels"]), factor),
        "labels": batch["labels"],
        "class_ids": batch["class_ids"],
        "mask_latents": masks.reshape(B, C, *masks.shape[1:]),
        "shown": shown.reshape(B, C, *shown.shape[1:]),
    }


def test_it_is_the_loss_of_each_pass_and_that_on_the_labels_of_all(parts):
    unet, frozen = parts
    batch, config = make_batch(), make_config()
    drawn, weights = drawn_for(batch, frozen.vae), weights_of(batch, frozen.vae)
    photo = encode_latents(frozen.vae, codec.to_pixels(batch["image"]))
    error, maps = 0.0, []
    for slot, ids in enumerate(batch["class_ids"].T):  # by hand, a class of all photos at a time
        asked = jnp.asarray(np.maximum(ids, 0))
        masks = codec.mask_images(jnp.asarray(batch["labels"]), asked[:, None])
        clean = encode_latents(frozen.vae, masks)
        noisy = schedules.add_noise(frozen.schedule, clean, drawn.noise, drawn.timesteps)
        target = schedules.velocity(frozen.schedule, clean, drawn.noise, drawn.timesteps)
        sample = jnp.concatenate([photo, noisy], -1)
        v = unet(sample, drawn.timesteps, frozen.table.hidden[asked], None)
        error += (weights.latents[:, slot] * jnp.square(v - target).mean(-1)).sum()
        a = frozen.schedule.alphas_cumprod[drawn.timesteps][:, None, None, None]
        maps.append(
            linear_decoder.decode(frozen.decoder, jnp.sqrt(a) * noisy - jnp.sqrt(1 - a) * v)
        )
    labels = losses.label_loss(jnp.stack(maps, 1), batch, weights.labels)
    found = losses.joint_loss(unet, frozen, batch, drawn, weights, config)
    np.testing.assert_allclose(found, error + 0.5 * labels, rtol=1e-4)


def test_empty_slots_and_ignored_pixels_count_for_nothing(parts):
    batch = make_batch()
    weights = weights_of(batch, parts[1].vae, balance=0.5)
    np.testing.assert_allclose(weights.latents.sum(), 1.0, rtol=1e-5)
    assert (weights.latents[batch["class_ids"] < 0] == 0).all()
    assert (weights.latents[3] == 0).all()  # a photo without a valid pixel


def test_the_cache_gives_the_same_loss(parts):
    unet, frozen = parts
    batch, config = make_batch(), make_config()
    batch["class_ids"][1] = [3, 1, 0]
    found = [
        losses.joint_loss(
            unet, frozen, b, drawn_for(batch, frozen.vae), weights_of(b, frozen.vae, 0.5), config
        )
        for b in (batch, as_cached(batch, frozen.vae))
    ]
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_micro_batches_make_the_same_step(parts):
    unet, frozen = parts
    (graph, params), (vae_graph, vae_params) = nnx.split(unet), nnx.split(frozen.vae)
    found = []
    for count in (1, 2):
        config = make_config()
        config.optimizer.accumulation = count
        step = jax.jit(diffusion_step(graph, vae_graph, config))
        batch = as_cached(make_batch(), frozen.vae)
        state, kept = init_state(params, config), frozen._replace(vae=vae_params)
        found.append(step(state, kept, batch, jax.random.key(0))[1])
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-4)


@pytest.mark.parametrize("cached", [True, False])
def test_a_training_goes_on_where_it_stopped(trained, micro_config, tmp_path, cached):
    config = micro_config()
    config.init_from, config.data.cache_latents = trained, cached
    changes = {"steps": 2, "classes": 2, "label_weight": 0.5, "eval_every": 0}
    config.train = dataclasses.replace(config.train, **changes)
    train(config, str(tmp_path / "two"))
    config.train = dataclasses.replace(config.train, steps=4, checkpoint_every=4)
    train(config, str(tmp_path / "two"))
    train(config, str(tmp_path / "four"))
    assert same_bits(*(state_of(str(tmp_path / name)) for name in ("two", "four")))
    scalars, mesh = read_scalars(Path(tmp_path / "four")), meshes.make_mesh(config.mesh)
    seconds, rate = (scalars[f"diffusion/{n}"][4] for n in ("step_seconds", "tflops_per_chip"))
    counted = aot.make_step(config, mesh).flops / mesh.size
    assert rate * 1e12 * seconds == pytest.approx(counted, rel=1e-3)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (
            "codec.classes_per_pass",
            0,
            "config.codec.classes_per_pass=0: must be 1 with config.train",
        ),
        ("train.label_weight", 0.0, "config.train.classes=3: must be 1 without config.train.label"),
    ],
)
def test_what_cannot_compete_is_refused(key, value, words):
    config = make_config()
    config.data.source = "scenes"
    config.vae.steps = 1
    group, name = key.split(".")
    setattr(getattr(config, group), name, value)
    with pytest.raises(UserError, match=words):
        validate(config)
