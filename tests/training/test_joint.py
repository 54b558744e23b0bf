"""The joint decoder's stage: where its gradient goes, what it learns, and what it leaves."""

import dataclasses
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import small
from commands import Run
from flax import nnx
from small import TEXT, B, C, H, SmallUNet, Steps, W, make_batch, make_config, make_frozen
from written import steps_of

from segdiff_jax import codec, export
from segdiff_jax.config import JointConfig, SamplerConfig
from segdiff_jax.errors import UserError
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.models.joint_decoder import LOGITS_PER_GRAY, JointDecoder
from segdiff_jax.train import train
from segdiff_jax.training import losses
from segdiff_jax.training.step import joint_step
from segdiff_jax.weights import loading, mask_decoders
from segdiff_jax.weights import workdir as workdirs

JOINT = JointConfig(steps=2, batch_size=2, classes=C)


@pytest.fixture(scope="module")
def run(tiny_networks):
    decoder, params = nnx.split(JointDecoder(TEXT, rngs=nnx.Rngs(1)))
    (unet, unet_params), (vae, vae_params) = map(
        nnx.split, (SmallUNet(nnx.Rngs(0)), tiny_networks[1])
    )
    make_step = lambda config: joint_step(decoder, unet, vae, config)  # noqa: E731
    return Steps(make_step, params, make_frozen(vae_params, unet=unet_params))


def test_a_new_one_has_the_loss_of_the_maps_and_no_gradient_reaches_the_unet(
    run, tiny_networks, monkeypatch
):
    vae, batch = tiny_networks[1], make_batch()
    frozen, graph = run.frozen._replace(vae=vae), nnx.graphdef(JointDecoder(TEXT, rngs=nnx.Rngs(1)))
    unet, unet_params = nnx.split(SmallUNet(nnx.Rngs(0)))
    factor, channels = vae.config.downsampling, vae.config.latent_channels
    noise = jax.random.normal(jax.random.key(0), (B, H // factor, W // factor, channels))
    weights, config = losses.label_weights(batch), make_config()

    def loss(params, unet_params):
        known = frozen._replace(unet=nnx.merge(unet, unet_params))
        decoder = nnx.merge(graph, params)
        return losses.joint_loss(decoder, known, batch, noise, weights, config)

    value, (own, others) = jax.value_and_grad(loss, (0, 1))(run.params, unet_params)
    monkeypatch.setattr(losses, "label_loss", lambda maps, *_: LOGITS_PER_GRAY * maps)
    logits = losses.e2e_loss(SmallUNet(nnx.Rngs(0)), frozen, batch, noise, weights, config)
    np.testing.assert_allclose(value, losses.mask_loss(logits, batch, weights), rtol=1e-5)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(own)) > 0
    assert all((g == 0).all() for g in jax.tree.leaves(others))


@pytest.mark.parametrize("start", ["gaussian", "multires", "zero"])
def test_it_learns_from_the_photo_what_the_maps_do_not_show(run, start):
    config, batch = make_config(learning_rate=1e-2), make_batch()
    config = dataclasses.replace(config, sampler=SamplerConfig(initial_noise=start))
    batch["labels"] = np.where(batch["labels"] == 255, 255, batch["labels"] % 2).astype(np.uint8)
    batch["image"] = np.repeat(np.where(batch["labels"] == 1, 220, 30)[..., None], 3, -1)
    batch["image"] = batch["image"].astype(np.uint8)
    batch["class_ids"] = np.tile(np.array([0, 1, -1], np.int32), (B, 1))
    found = [metrics["loss"] for _, metrics in run(config, [batch] * 30)]
    assert found[-1] < 0.3 * found[0]


def test_scores_mean_something_where_every_class_was_always_asked(run):
    """No pixel is ever none of the classes: as in a closed vocabulary."""
    config, batch = make_config(learning_rate=1e-2), make_batch()
    batch["labels"] = (batch["labels"] % 2).astype(np.uint8)
    batch["class_ids"] = np.tile(np.array([0, 1, -1], np.int32), (B, 1))
    state, _ = run(config, [batch] * 20)[-1]
    decoder = nnx.merge(nnx.graphdef(JointDecoder(TEXT, rngs=nnx.Rngs(1))), state.params)
    text = jnp.asarray(run.frozen.table.pooled)[jnp.asarray(batch["class_ids"][:, :2])]
    pixels = codec.to_pixels(batch["image"])
    logits = decoder.logits(pixels, text, jnp.zeros((B, 2, H, W)))
    assert 0.8 < float(jax.nn.sigmoid(logits).sum(1).mean()) < 1.2  # one of the two is right


@pytest.fixture(scope="module")
def finished(trained, micro_config, tmp_path_factory):
    """A training that went on to a joint decoder of two steps."""
    workdir = tmp_path_factory.mktemp("joint") / "run"
    shutil.copytree(trained, workdir)
    config = micro_config()
    config.joint = JOINT
    train(config, str(workdir))
    return str(workdir)


def joint_of(workdir) -> Path:
    """Return the folder of the joint decoder that goes with the newest checkpoint."""
    return Path(workdirs.joint_folder(workdir, steps_of(workdir)[-1]))


def test_a_decoder_that_is_asked_for_later_is_the_one_that_predicts_and_is_not_trained_again(
    finished, micro_config, tmp_path
):
    workdir, config = str(tmp_path / "run"), micro_config()
    shutil.copytree(finished, workdir)
    path = joint_of(workdir) / mask_decoders.JOINT
    decoder, steps = path.read_bytes(), steps_of(joint_of(workdir))
    assert steps == [2]
    before = workdirs.read_config(workdir)
    config.joint = JOINT
    config.sampler.decoder = "joint"
    config.optimizer.learning_rate = 2.0  # of the next step of the UNet, which does not come
    train(config, workdir)
    assert path.read_bytes() == decoder and steps_of(joint_of(workdir)) == steps
    expected = dataclasses.replace(before, joint=config.joint, sampler=config.sampler)
    assert workdirs.read_config(workdir) == expected
    assert Segmenter.load(workdir).config.sampler.decoder == "joint"


def test_the_decoder_of_a_unet_that_is_gone_goes_too(finished, micro_config, set_up, tmp_path):
    workdir, config = tmp_path / "run", micro_config()
    shutil.copytree(finished, workdir)
    *_, before, newest = steps_of(workdir)
    shutil.copytree(joint_of(workdir), workdir / "joint" / str(before))
    shutil.rmtree(workdir / "checkpoints" / str(newest))
    config.joint, config.train.eval_every = JOINT, 0
    set_up(config, workdir)
    assert [path.name for path in (workdir / "joint").iterdir()] == [str(before)]


def test_its_folder_is_no_start_of_another_training(finished, micro_config, tmp_path):
    config = micro_config()
    config.init_from = str(joint_of(finished))
    with pytest.raises(UserError, match=f"inside the workdir {finished}: give that as config.ini"):
        train(config, str(tmp_path / "run"))


@pytest.mark.slow
def test_what_is_advised_where_all_checkpoints_are_damaged_helps(finished, micro_config, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    folder = joint_of(workdir) / "checkpoints"
    for path in filter(Path.is_file, folder.rglob("*")):
        path.write_bytes(path.read_bytes()[:50])
    config = micro_config()
    config.joint = JointConfig(steps=3, batch_size=2, classes=C)
    with pytest.raises(UserError, match=f"{folder}: every checkpoint.* or remove this folder and"):
        train(config, str(workdir))
    shutil.rmtree(folder)
    train(config, str(workdir))
    assert steps_of(folder.parent)[-1] == 3


def test_a_unet_that_goes_on_gets_another_and_the_earlier_one_keeps_its_own(
    finished, micro_config, tmp_path
):
    workdir, before = tmp_path / "run", joint_of(finished)
    shutil.copytree(finished, workdir)
    config = micro_config()
    config.joint, config.train.steps = JOINT, config.train.steps + 1
    train(config, str(workdir))
    kept = workdir / "joint" / before.name / mask_decoders.JOINT
    assert kept.read_bytes() == (before / mask_decoders.JOINT).read_bytes()
    assert joint_of(workdir).name == str(config.train.steps)
    newest, earlier = (
        Segmenter.load(str(workdir), which).networks for which in ("newest", int(before.name))
    )
    kernels = [np.asarray(n._joint_head.kernel) for n in (newest, earlier)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0


def test_an_export_has_it_too_and_sharpens_as_the_training_does(finished, tmp_path):
    networks, decoders, _ = loading.load_networks(finished)
    assert decoders.joint is not None
    export.write_folder(
        networks, tmp_path / "model", trained=workdirs.read_classes(finished), decoders=decoders
    )
    models = [Segmenter.load(str(path)) for path in (finished, tmp_path / "model")]
    scores = []
    for model, decoder in ((models[0], "linear"), (models[0], "joint"), (models[1], "joint")):
        model.config.sampler.decoder = decoder
        scores.append(model(small.PHOTO, small.NAMES).scores)
    plain, *sharp = scores
    np.testing.assert_array_equal(*sharp)
    assert np.abs(sharp[0] - plain).max() > 1e-3


def test_a_checkpoint_from_before_it_is_decoded_without_it(finished, tmp_path, caplog):
    """Stopped on the way, or by --which: to be looked at all the same, and to be exported."""
    workdir, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(finished, workdir)
    config = workdirs.read_config(finished)
    config.sampler.decoder = "joint"
    workdirs.write_config(str(workdir), config)
    assert Segmenter.load(str(workdir)).config.sampler.decoder == "joint"
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not warned, "nor does it warn that what is read is not written to"

    shutil.rmtree(joint_of(workdir))
    argv = ["--checkpoint", str(workdir), "--output", str(model), "--format", "diffusers"]
    export.main(argv)
    for path in (workdir, model):
        found = Segmenter.load(str(path))
        assert found.config.sampler.decoder == "linear"
        assert found(small.PHOTO, ["background"]).scores.any()
    said = [r.getMessage() for r in caplog.records if "decoder" in r.getMessage()]
    assert len(said) == 2 and all("no joint decoder" in text and "linear" in text for text in said)

    (workdir / mask_decoders.LINEAR).unlink()
    assert Segmenter.load(str(workdir)).config.sampler.decoder == "vae"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_the_bytes_are_read_back_as_float32(dtype, tmp_path):
    decoder = JointDecoder(TEXT, rngs=nnx.Rngs(0))
    params = nnx.state(decoder)
    (tmp_path / mask_decoders.JOINT).write_bytes(mask_decoders.joint_to_bytes(params, dtype))
    read = nnx.state(mask_decoders.read_joint(tmp_path, TEXT))
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(read), strict=True):
        assert other.dtype == np.float32
        np.testing.assert_allclose(other, one, rtol=0.01, atol=1e-6)


def test_what_overflows_half_precision_is_not_written():
    decoder = JointDecoder(TEXT, rngs=nnx.Rngs(0))
    decoder.scale[...] = 1e6
    with pytest.raises(UserError, match=r"joint_decoder\.safetensors: scale overflows float16"):
        mask_decoders.joint_to_bytes(nnx.state(decoder), "float16")


def test_its_file_says_when_it_is_of_another_text_encoder(finished, tmp_path):
    path = joint_of(finished)
    width = loading.load_networks(finished)[0][2].config.hidden_size
    assert mask_decoders.read_joint(tmp_path, width) is None
    assert mask_decoders.read_joint(path, width).head().scale == pytest.approx(
        LOGITS_PER_GRAY, abs=0.1
    )
    with pytest.raises(UserError, match=r"joint_decoder\.safetensors: was not trai"):
        mask_decoders.read_joint(path, width + 1)


@pytest.mark.slow
def test_on_two_devices_as_on_one_and_with_a_unet_cut_over_two_processes(trained, tmp_path):
    flags = ["joint.steps=3", "joint.batch_size=4", "joint.classes=3", "optimizer.warmup_steps=1"]
    found = []
    cut = ["mesh.data=1", "mesh.fsdp=-1"]
    for devices, processes, mesh in ((1, 1, []), (2, 1, []), (4, 2, cut)):
        workdir = tmp_path / str(devices) / "run"
        shutil.copytree(trained, workdir)
        overrides = [f"--config.{flag}" for flag in flags + mesh]
        with Run(workdir, *overrides, devices=devices, processes=processes) as started:
            started.finished()
        found.append(safetensors.numpy.load_file(joint_of(workdir) / mask_decoders.JOINT))
    one, *others = found
    for other in others:
        for name, array in one.items():
            np.testing.assert_allclose(other[name], array, atol=1e-3)
