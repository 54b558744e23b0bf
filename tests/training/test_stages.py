"""Whole trainings, minute ones: what they leave, how they end, how they go on."""

import functools
import hashlib
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from test_telemetry import read_scalars

from segdiff_jax import workdir as workdirs
from segdiff_jax.data import pipeline
from segdiff_jax.data.scenes import vocabulary
from segdiff_jax.data.vocabulary import from_names
from segdiff_jax.errors import UserError
from segdiff_jax.models import pretrained
from segdiff_jax.models.unet import UNet
from segdiff_jax.roofline import steps
from segdiff_jax.segmenter import Segmenter
from segdiff_jax.training import latent_cache, loop, losses, sharding, stages
from segdiff_jax.training.checkpoint import Checkpoints
from segdiff_jax.training.step import init_state
from segdiff_jax.training.telemetry import Telemetry


def steps_of(workdir):
    checkpoints = Checkpoints(Path(workdir) / "checkpoints", read_only=True)
    steps = checkpoints.steps()
    checkpoints.close()
    return steps


def state_of(workdir, step=None):
    config = workdirs.read_config(str(workdir))
    checkpoints = Checkpoints(Path(workdir) / "checkpoints", read_only=True)
    params = abstract_params(workdirs.unet_config_from(checkpoints.metadata()["unet"]))
    abstract = jax.eval_shape(lambda p: init_state(p, config), params)
    state, _ = checkpoints.restore(abstract, step)
    checkpoints.close()
    return state


@functools.cache
def abstract_params(architecture):
    return nnx.state(nnx.eval_shape(lambda: UNet(architecture, rngs=nnx.Rngs(0))))


def copy_at_step_2(trained, folder):
    """A copy of the run as it was when step 2 was done."""
    workdir = str(folder / "run")
    shutil.copytree(trained, workdir)
    for step in (4, 6):
        shutil.rmtree(f"{workdir}/checkpoints/{step}")
    return workdir


def same_bits(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves
    )


def contents(folder):
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_run_knows_its_classes_and_goes_on_with_no_others(
    trained, micro_config, tmp_path, caplog, monkeypatch
):
    for folder in (trained, f"{trained}/vae"):
        assert workdirs.read_classes(folder).classes == vocabulary().classes
    workdir = copy_at_step_2(trained, tmp_path)
    before = contents(workdir)
    names = [", ".join(entry.names) for entry in vocabulary().classes]
    cases = (
        (names[::-1], f"class 0 is '{vocabulary().names[-1]}', not '{vocabulary().names[0]}'"),
        (names[:-1], f"there are {len(names) - 1} classes, not {len(names)}"),
        ([*names[:-1], names[-1] + ", rest"], "other synonyms"),
    )
    for classes, words in cases:
        with pytest.raises(UserError, match=words) as caught:
            workdirs.settle_classes(workdir, from_names(classes), write=True)
        assert "--workdir" in str(caught.value) and contents(workdir) == before
    config = micro_config()
    with monkeypatch.context() as patch, pytest.raises(UserError, match="started with other"):
        patch.setattr("segdiff_jax.data.scenes.vocabulary", lambda: from_names(names[::-1]))
        stages.train(config, workdir)
    assert contents(workdir) == before
    os.remove(f"{workdir}/classes.json")
    with caplog.at_level("WARNING"):
        workdirs.settle_classes(workdir, from_names(names), write=True)
    assert "does not say which classes" in caplog.text
    assert workdirs.read_classes(workdir).names == vocabulary().names


def test_a_list_may_be_corrected_before_the_first_checkpoint(tmp_path):
    for names in (["sky", "raod"], ["sky", "road"]):
        workdirs.settle_classes(str(tmp_path), from_names(names), write=True)
        assert workdirs.read_classes(str(tmp_path)).names == tuple(names)


@pytest.fixture(scope="module")
def model(trained):
    return Segmenter.load(trained)


def test_a_finished_run_has_everything_that_is_needed_later(trained):
    assert steps_of(trained) == [2, 4, 6] and steps_of(f"{trained}/vae") == [2, 3]
    for folder in (trained, f"{trained}/vae"):
        parts = pretrained.load(f"{folder}/pretrained", ("vae", "text_encoder", "tokenizer"))
        assert None not in parts[1:4]
    assert workdirs.read_config(trained).stage == "diffusion"
    assert workdirs.read_config(f"{trained}/vae").stage == "vae"
    assert list(Path(trained).glob("tensorboard/diffusion/events*"))


def test_reported_flops_are_those_of_the_step_that_aot_reports(trained, micro_config):
    scalars, config = read_scalars(Path(trained)), micro_config()
    mesh = sharding.make_mesh(config.mesh)
    seconds = scalars["diffusion/step_seconds"][6]
    per_chip = scalars["diffusion/tflops_per_chip"][6] * 1e12 * seconds
    expected = steps.train_step(config, mesh).model_flops / mesh.size
    assert expected > 1e6 and per_chip == pytest.approx(expected, rel=1e-3)


def test_the_vae_stage_scales_its_latents_to_unit_variance(trained, micro_config):
    config = micro_config()
    vae = pretrained.load(f"{trained}/pretrained", ("vae",)).vae
    source = stages.open_source(config.data, "train", config.seed)
    batch = next(pipeline.train_batches(source, config, config.seed, batch_size=64))
    masks = losses.mask_images(batch["labels"], batch["class_ids"])
    pixels = np.concatenate([losses.to_pixels(batch["image"]), masks])
    graph, params = nnx.split(vae)
    mean, _ = jax.jit(lambda p, x: nnx.merge(graph, p).encode(x))(params, pixels)
    assert np.std(mean) * vae.config.scaling_factor == pytest.approx(1, rel=1e-3)


def test_the_trained_model_segments(model):
    photo = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    # All classes, as in validation: that is compiled already.
    found = model(photo, vocabulary().classes, closed=True)
    assert found.labels.shape == (20, 30) and len(np.unique(found.labels)) > 1
    assert np.isfinite(found.scores).all() and found.scores.std() > 0


def test_the_moving_average_is_what_segments(model, trained):
    state = state_of(trained)
    assert same_bits(model._unet_params, state.ema)
    assert not same_bits(state.ema, state.params)


def test_a_finished_run_is_left_as_it_is(trained, micro_config, monkeypatch):
    before = contents(trained)
    monkeypatch.setattr(loop, "run", lambda *_: pytest.fail("trained again"))
    stages.train(micro_config(), trained)
    assert contents(trained) == before


def test_interrupted_and_resumed_is_bit_for_bit_uninterrupted(
    trained, micro_config, tmp_path, monkeypatch
):
    compiled, original = [], loop.compile_step
    monkeypatch.setattr(
        loop, "compile_step", lambda *args: compiled.append(original(*args)) or compiled[-1]
    )
    step, config, workdir = Telemetry.step, micro_config(), copy_at_step_2(trained, tmp_path)
    config.train.eval_every, config.train.checkpoint_every = 0, 100

    def interrupted(self, done, metrics):
        if done == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, done, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(Telemetry, "step", interrupted)
        with pytest.raises(loop.Stopped, match="stopped at step 4"):
            stages.train(config, workdir)
    assert steps_of(workdir) == [2, 4]

    stages.train(config, workdir)
    assert steps_of(workdir) == [2, 4, 6]
    assert same_bits(state_of(workdir), state_of(trained))
    assert [function._cache_size() for function in compiled] == [1, 1]


def test_not_finite_keeps_the_last_good_checkpoint(trained, micro_config, tmp_path, monkeypatch):
    workdir = str(tmp_path / "run")
    shutil.copytree(trained, workdir)
    config, encode_prompts = micro_config(), stages.conditioning.encode_prompts
    config.train.steps, config.train.eval_every, config.train.checkpoint_every = 9, 0, 1
    monkeypatch.setattr(
        stages.conditioning,
        "encode_prompts",
        lambda *args: jax.tree.map(lambda x: x * np.nan, encode_prompts(*args)),
    )
    with pytest.raises(UserError, match="not finite at step 7; checkpoint 6 is kept"):
        stages.train(config, workdir)
    assert steps_of(workdir) == [2, 4, 6]
    assert same_bits(state_of(workdir), state_of(trained))


def test_a_signal_in_the_first_stage_ends_the_command_and_the_next_goes_on(
    micro_config, trained, tmp_path, monkeypatch
):
    step = Telemetry.step

    def interrupted(self, done, metrics):
        if self.stage == "vae" and done == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, done, metrics)

    class Reached(Exception):
        pass

    def second_stage(*_):
        raise Reached

    config, workdir = micro_config(), str(tmp_path / "run")
    monkeypatch.setattr(stages.conditioning, "encode_prompts", second_stage)
    with monkeypatch.context() as patch:
        patch.setattr(Telemetry, "step", interrupted)
        with pytest.raises(loop.Stopped, match="stopped at step 1"):
            stages.train(config, workdir)
    assert steps_of(f"{workdir}/vae") == [1] and not Path(workdir, "pretrained").exists()
    with pytest.raises(Reached):
        stages.train(config, workdir)
    assert steps_of(f"{workdir}/vae") == [1, 2, 3]
    parts = [pretrained.load(f"{w}/pretrained", ("vae",)).vae for w in (workdir, trained)]
    assert same_bits(*(nnx.state(part) for part in parts)) and parts[0].config == parts[1].config


def test_a_changed_architecture_or_seed_is_refused_and_nothing_is_written(trained, micro_config):
    before = contents(trained)
    for key, value in (("seed", 1), ("model.preset", "tiny"), ("codec.context", "bound")):
        config = micro_config()
        *path, name = key.split(".")
        setattr(getattr(config, path[0]) if path else config, name, value)
        with pytest.raises(UserError, match=f"config.{key}"):
            stages.train(config, trained)
    assert contents(trained) == before


def test_starting_from_a_trained_workdir_continues_with_its_weights(
    trained, micro_config, tmp_path, monkeypatch
):
    started = []

    def run(config, workdir, step, state, *rest):
        started.append(jax.device_get(state))

    monkeypatch.setattr(loop, "run", run)
    config = micro_config()
    config.init_from, config.train.eval_every = trained, 0
    stages.train(config, str(tmp_path / "run"))
    assert int(started[0].step) == 0
    assert same_bits(started[0].params, jax.device_get(state_of(trained).ema))
    assert same_bits(started[0].ema, started[0].params)


def test_going_on_does_not_read_what_init_from_gave(trained, micro_config, tmp_path, monkeypatch):
    config, workdir = micro_config(), copy_at_step_2(trained, tmp_path)
    config.init_from, config.train.eval_every = str(tmp_path / "moved away"), 0
    started = []
    monkeypatch.setattr(loop, "run", lambda config, workdir, step, state, *_: started.append(state))
    stages.train(config, workdir)
    assert int(started[0].step) == 2
    assert same_bits(started[0].params, state_of(trained, 2).params)


def test_the_data_goes_on_where_it_was_with_another_batch_size(
    trained, micro_config, tmp_path, monkeypatch
):
    config, workdir = micro_config(), copy_at_step_2(trained, tmp_path)
    config.train.batch_size, config.train.eval_every = 8, 0
    taken = []

    def run(config, workdir, step, state, frozen, batches, mesh, checkpoints, metadata, *_):
        taken.append((metadata["next_example"], next(batches)))

    monkeypatch.setattr(loop, "run", run)
    stages.train(config, workdir)
    source = stages.open_source(config.data, "train", config.seed)
    expected = next(pipeline.train_batches(source, config, config.seed, start=2 * 4))
    (position, batch), *_ = taken
    assert position == 8 and batch.keys() == expected.keys()
    assert all(np.array_equal(batch[key], expected[key]) for key in batch)


def test_training_from_cached_latents_is_the_same_training(
    trained, micro_config, tmp_path, monkeypatch
):
    config, workdir = micro_config(), copy_at_step_2(trained, tmp_path)
    config.data.cache_latents, config.train.eval_every = True, 0
    seen, fetch = {}, Telemetry.fetch

    def recording(self):
        values = fetch(self)
        if values:
            seen[int(values["step"])] = values["loss"]
        return values

    monkeypatch.setattr(Telemetry, "fetch", recording)
    monkeypatch.setattr(stages.pipeline, "train_batches", lambda *_: pytest.fail("read pixels"))
    stages.train(config, workdir)
    from_pixels = read_scalars(Path(trained))["diffusion/loss"]
    assert sorted(seen) == [3, 4, 5, 6] and len(set(seen.values())) == 4
    expected = [from_pixels[step] for step in sorted(seen)]
    np.testing.assert_allclose([seen[step] for step in sorted(seen)], expected, rtol=1e-5)

    monkeypatch.setattr(latent_cache, "build", lambda *_: pytest.fail("built again"))
    vae = workdirs.load_frozen(f"{workdir}/pretrained", "float32")[0]
    source = stages.open_source(config.data, "train", config.seed)
    assert len(latent_cache.open_or_build(source, vae, config, f"{workdir}/latents")) == 32
