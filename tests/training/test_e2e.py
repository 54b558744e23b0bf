"""The single-step stage: its loss against torch, where the gradient goes, whole trainings."""

import dataclasses
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import torch
from commands import Run
from flax import nnx
from small import B, C, H, SmallUNet, W, changed, make_batch, make_config, unet_steps
from written import read_scalars, same_bits, state_of, steps_of

from segdiff_jax import cli, codec, export
from segdiff_jax import config as configs
from segdiff_jax.config import Config, E2EConfig
from segdiff_jax.errors import UserError
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.models import linear_decoder
from segdiff_jax.models.linear_decoder import LinearDecoder
from segdiff_jax.models.vae import encode_latents
from segdiff_jax.train import train
from segdiff_jax.training import losses
from segdiff_jax.training.step import e2e_step
from segdiff_jax.weights import loading, mask_decoders
from segdiff_jax.weights import workdir as workdirs


def torch_loss(maps, batch, loss):
    """Pixel by pixel and class by class, with torch's own cross-entropies."""
    entropies, dices = [], []
    for gray, labels, ids in zip(maps, batch["labels"], batch["class_ids"], strict=True):
        gray, ids, valid = gray[: (ids >= 0).sum()], ids[ids >= 0], torch.tensor(labels != 255)
        truth = torch.stack([torch.tensor(labels == class_id) for class_id in ids]).float()
        if loss is losses.label_loss:
            logits = torch.cat([torch.zeros_like(gray[:1]), losses.LOGITS_PER_GRAY * gray])
            target = torch.cat([1 - truth.sum(0, keepdim=True), truth]).argmax(0)
            entropy = torch.nn.functional.cross_entropy(
                logits[None], target[None], reduction="none"
            )[0]
            shares = logits.softmax(0)[1:]
        else:
            entropy = torch.nn.functional.binary_cross_entropy_with_logits(
                gray, truth, reduction="none"
            ).sum(0)
            shares = gray.sigmoid()
        entropies.append(entropy[valid])
        for share, shown in zip(shares[:, valid], truth[:, valid], strict=True):
            if shown.any():
                dices.append(1 - 2 * (share * shown).sum() / (share.sum() + shown.sum()))
    return torch.cat(entropies).mean() + torch.stack(dices).mean()


LABEL_LOSSES = [(losses.label_loss, 0.7), (losses.mask_loss, 3.0)]  # and the scale of its maps


@pytest.mark.parametrize(("loss", "scale"), LABEL_LOSSES)
def test_losses_on_labels_and_their_gradients_are_those_of_torch(loss, scale):
    batch, rng = make_batch(), np.random.default_rng(1)
    maps = rng.normal(0, scale, (B, C, H, W)).astype(np.float32)
    weights = losses.label_weights(batch)
    found, gradient = jax.value_and_grad(loss)(jnp.asarray(maps), batch, weights)
    leaf = torch.tensor(maps, requires_grad=True)
    expected = torch_loss(leaf, batch, loss)
    expected.backward()
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, leaf.grad, rtol=1e-4, atol=1e-7)
    ignored = np.broadcast_to((batch["labels"] == 255)[:, None], gradient.shape)
    empty = batch["class_ids"] < 0
    assert (gradient[ignored] == 0).all() and (gradient[empty] == 0).all()
    absent = gradient[1, 1][batch["labels"][1] != 255]  # class 5 is nowhere: its map has to darken
    assert (absent > 0).all()


@pytest.mark.parametrize(("loss", "scale"), LABEL_LOSSES)
def test_in_16_bit_labels_255_is_a_class_like_any_other(loss, scale):
    batch, maps = make_batch(), np.random.default_rng(1).normal(0, scale, (B, C, H, W))
    labels, ids = batch["labels"].astype(np.uint16), batch["class_ids"]
    ignored, one, small, large = labels == 255, labels == 1, np.uint16(255), np.uint16(65535)
    labels = np.where(ignored, large, np.where(one, small, labels))
    renamed = {"labels": labels, "class_ids": np.where(ids == 1, 255, ids)}
    weights = [losses.label_weights(b) for b in (batch, renamed)]
    np.testing.assert_array_equal(weights[0].classes, weights[1].classes)
    expected, found = (loss(maps, b, w) for b, w in zip((batch, renamed), weights, strict=True))
    assert found == expected


def test_without_a_valid_pixel_there_is_no_loss():
    batch = make_batch()
    batch["labels"] = np.full_like(batch["labels"], 255)
    loss = lambda maps: losses.label_loss(maps, batch, losses.label_weights(batch))  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(jnp.ones((B, C, H, W)))
    assert value == 0 and (gradient == 0).all()


@pytest.fixture(scope="module")
def run(tiny_networks):
    return unet_steps(e2e_step, tiny_networks[1])


@pytest.mark.parametrize("decoder", ["vae", "linear"])
def test_the_loss_is_of_what_one_step_of_the_sampler_shows(run, tiny_networks, decoder):
    frozen, vae, batch = run.frozen, tiny_networks[1], make_batch()
    unet = SmallUNet(nnx.Rngs(0))
    channels, pixels = vae.config.latent_channels, vae.config.downsampling**2
    kernel = np.random.default_rng(2).normal(0, 0.3, (3, 3, channels, pixels))
    linear = LinearDecoder(jnp.asarray(kernel, jnp.float32), jnp.zeros(pixels))
    latent = encode_latents(vae, codec.to_pixels(batch["image"]))
    maps = []
    for ids in batch["class_ids"].T:
        text = frozen.table.hidden[np.maximum(ids, 0)]
        sample = jnp.concatenate([latent, jnp.zeros_like(latent)], -1)
        x0 = -unet(sample, jnp.full(B, 999), text, None)  # v of zeros at zero SNR
        x0 *= jnp.sqrt(frozen.schedule.final_alpha_cumprod)  # as DDIM ends
        by_vae = lambda x0: vae.decode(x0 / vae.config.scaling_factor).mean(-1)  # noqa: E731
        maps.append(by_vae(x0) if decoder == "vae" else linear_decoder.decode(linear, x0))
    expected = losses.label_loss(jnp.stack(maps, 1), batch, losses.label_weights(batch))
    if decoder == "linear":
        frozen = frozen._replace(decoder=linear)
    config = make_config(E2EConfig(classes=C, decoder=decoder))
    ((_, metrics),) = run(config, [batch], frozen=frozen)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)


def test_the_gradient_goes_through_the_decoder_to_the_unet_and_no_further(run):
    batch, config, before = make_batch(), make_config(), jax.tree.map(np.array, run.frozen)
    ((state, metrics),) = run(config, [batch])
    assert metrics["gradient_norm"] > 0
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(run.params), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() > 0
    assert same_bits(jax.tree.map(np.asarray, run.frozen), before)
    # Another decoder, another gradient: it is on the way.
    other = run.frozen._replace(vae=jax.tree.map(lambda p: p * 1.1, run.frozen.vae))
    ((_, changed),) = run(config, [batch], frozen=other)
    assert abs(changed["gradient_norm"] / metrics["gradient_norm"] - 1) > 1e-3


@pytest.mark.parametrize(
    "same",
    [{"accumulation": 2}, pytest.param({"remat": True}, marks=pytest.mark.slow)],
    ids=str,
)
def test_micro_batches_and_remat_make_the_same_step(run, same):
    e2e = E2EConfig(classes=C, noise="gaussian")
    ((_, expected),) = run(make_config(e2e), [make_batch()])
    ((_, found),) = run(make_config(e2e, **same), [make_batch()])
    for name in ("loss", "gradient_norm", "update_norm"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4)


@pytest.mark.slow
def test_gaussian_noise_is_new_in_each_step_and_zeros_are_the_same(run):
    for noise, count in (("gaussian", 3), ("zero", 1)):
        config = make_config(E2EConfig(classes=C, noise=noise), learning_rate=0.0)
        found = run(config, [make_batch()] * 3)
        assert len({metrics["loss"] for _, metrics in found}) == count


# Whole trainings.


@pytest.fixture(scope="module")
def e2e_config(trained, micro_config):
    """A function that makes the config of a single-step training that goes on from `trained`."""

    def make(**changes):
        config = micro_config()
        config.stage, config.init_from = "e2e", trained
        config.train = dataclasses.replace(config.train, steps=4, eval_every=4, balance=0.5)
        return dataclasses.replace(config, **changes)

    return make


@pytest.fixture(scope="module")
def finished(e2e_config, tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("e2e") / "run")
    train(e2e_config(), workdir)
    return workdir


def test_it_begins_with_the_weights_of_the_training_and_takes_over_what_is_frozen(
    finished, trained
):
    stored = workdirs.read_config(finished)
    assert stored.sampler.initial_noise == "zero" and stored.sampler.steps == 1
    frozen = [loading.load_frozen(f"{w}/pretrained", jnp.float32)[0] for w in (finished, trained)]
    assert same_bits(*(nnx.state(vae) for vae in frozen))
    learnt, start = (jax.tree.leaves(state_of(w).params) for w in (finished, trained))
    far = [float(np.abs(np.asarray(a - b)).max()) for a, b in zip(learnt, start, strict=True)]
    assert 0 < max(far) < 0.1  # four steps of at most a thousandth, and the average's lag


@pytest.fixture(scope="module")
def model(finished):
    return Segmenter.load(finished)


def test_it_validates_from_zeros_as_it_predicts(finished, model):
    scalars = read_scalars(Path(finished))
    assert np.isfinite(scalars["validation/miou_present"][4])
    first, second = (model(small.PHOTO, small.NAMES, seed=seed).scores for seed in (0, 1))
    np.testing.assert_array_equal(first, second)  # no noise, no seed
    for more in ({"steps": 2}, {"ensemble": 2}):
        with pytest.raises(UserError, match="config.sampler.initial_noise='zero'"):
            model(small.PHOTO, small.NAMES, **more)


def test_an_export_of_it_starts_from_zeros_too(finished, model, tmp_path):
    networks, *_ = loading.load_networks(finished)
    export.write_folder(networks, tmp_path / "model", trained=workdirs.read_classes(finished))
    models = model, Segmenter.load(str(tmp_path / "model"))
    np.testing.assert_array_equal(*(m(small.PHOTO, small.NAMES).scores for m in models))
    assert "| starts from | zeros |" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.slow
def test_interrupted_and_resumed_is_bit_for_bit_uninterrupted(
    finished, e2e_config, interrupted, tmp_path
):
    workdir = str(tmp_path / "run")
    shutil.copytree(finished, workdir)
    shutil.rmtree(f"{workdir}/checkpoints/4")
    config = e2e_config()
    config.train = dataclasses.replace(config.train, eval_every=0, checkpoint_every=100)
    with interrupted(3, "e2e"):
        train(config, workdir)
    train(config, workdir)
    assert steps_of(workdir) == [2, 3, 4]
    assert same_bits(state_of(workdir), state_of(finished))


def test_a_training_through_the_linear_decoder_fits_it_first(e2e_config, tmp_path):
    config, workdir = e2e_config(e2e=E2EConfig(classes=C, decoder="linear")), str(tmp_path / "run")
    config.train = dataclasses.replace(config.train, steps=1, eval_every=0)
    train(config, workdir)
    vae = loading.load_frozen(f"{workdir}/pretrained", jnp.float32)[0]
    assert mask_decoders.read_linear(workdir, vae.config) is not None
    assert np.isfinite(read_scalars(Path(workdir))["e2e/loss"][1])


@pytest.mark.slow
def test_the_loss_falls_on_four_scenes(micro_config, tmp_path):
    base = micro_config()  # but with a decoder that can show a mask, as a real start has
    base.data.scenes = dataclasses.replace(base.data.scenes, train_examples=4)
    base.vae = dataclasses.replace(base.vae, steps=300)
    base.train = dataclasses.replace(base.train, eval_every=0)
    train(base, str(tmp_path / "base"))
    config = dataclasses.replace(base, stage="e2e", init_from=str(tmp_path / "base"))
    config.train = dataclasses.replace(config.train, steps=40, checkpoint_every=40)
    config.optimizer = dataclasses.replace(config.optimizer, learning_rate=5e-3)
    train(config, str(tmp_path / "run"))
    found = read_scalars(tmp_path / "run")["e2e/loss"]
    first, last = (np.mean([found[s] for s in range(a, a + 5)]) for a in (1, 36))
    assert last < 0.8 * first


@pytest.mark.slow
def test_on_two_devices_as_on_one(trained, tmp_path):
    flags = ("stage=e2e", f"init_from={trained}", "train.steps=3", "e2e.classes=3")
    found = []
    for devices in (1, 2):
        (tmp_path / str(devices)).mkdir()
        workdir = tmp_path / str(devices) / "run"
        overrides = [f"--config.{flag}" for flag in flags]
        with Run(workdir, *overrides, devices=devices) as started:
            started.finished()
        found.append(state_of(workdir))
    one, two = (jax.tree.leaves(state.params) for state in found)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)  # Adam's first steps are of the gradient's sign
    losses_of = [read_scalars(tmp_path / d / "run")["e2e/loss"] for d in ("1", "2")]
    np.testing.assert_allclose(*([o[s] for s in (1, 2, 3)] for o in losses_of), rtol=1e-4)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("init_from", "", "config.init_from is empty.*name its workdir or export"),
        ("init_from", "{trained}/vae", "this is one of the VAE stage"),
        ("init_from", "{trained}/pretrained", "is inside the workdir .*: give that as config"),
        ("init_from", "./no/such", "goes on from a diffusion training: ./no/such: neither"),
        ("codec.context", "bound", "with config.codec.context='bound', this one has 'mean'"),
        ("codec.classes_per_pass", 0, "config.codec.classes_per_pass=0: must be 1"),
    ],
)
def test_a_start_that_cannot_be_is_refused(e2e_config, trained, tmp_path, key, value, words):
    value = value.format(trained=trained) if isinstance(value, str) else value
    config = changed(e2e_config(), key, value)
    with pytest.raises(UserError, match=words) as error:
        configs.validate(config)
        train(config, str(tmp_path / "run"))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("train.balance=0.5", "config.train.balance: plays no part in the e2e stage"),
        ("data.cache_latents=true", "config.data.cache_latents: plays no part"),
        ("sampler.steps=4", "config.sampler.steps: plays no part"),
        ("sampler.initial_noise=zero", "set config.e2e.noise"),
        ("e2e.classes=0", "config.e2e.classes=0: must be at least 1"),
    ],
)
def test_keys_that_say_nothing_about_the_stage_are_refused(flag, words):
    config = Config(stage="e2e", init_from="w")
    config.data.source = "scenes"
    with pytest.raises(UserError, match=re.escape(words)):
        cli.override_config(config, [f"--config.{flag}"])
