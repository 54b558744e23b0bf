"""Whole trainings, minute ones: what they leave, how they end, how they go on."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from small import PHOTO, changed
from written import read_scalars, same_bits, state_of, steps_of

from segdiff_jax import __version__, aot, codec, ownership
from segdiff_jax.data import latent_cache, pipeline
from segdiff_jax.data.sources.scenes import vocabulary
from segdiff_jax.errors import UserError
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.parallel import mesh as meshes
from segdiff_jax.text.vocabulary import from_names
from segdiff_jax.train import train
from segdiff_jax.training import run as runs
from segdiff_jax.weights import loading, pretrained
from segdiff_jax.weights import workdir as workdirs


def copy_at_step_2(trained, folder):
    """A copy of the run as it was when step 2 was done."""
    workdir = str(folder / "run [0-9]*#%20")
    shutil.copytree(trained, workdir)
    for step in (4, 6):
        shutil.rmtree(f"{workdir}/checkpoints/{step}")
    return workdir


def contents(folder):
    """A digest of each file, by its name in the folder."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()  # noqa: E731
    return {str(path.relative_to(folder)): digest(path) for path in files}


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
        patch.setattr("segdiff_jax.data.sources.scenes.vocabulary", lambda: from_names(names[::-1]))
        train(config, workdir)
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
    mesh = meshes.make_mesh(config.mesh)
    seconds = scalars["diffusion/step_seconds"][6]
    per_chip = scalars["diffusion/tflops_per_chip"][6] * 1e12 * seconds
    expected = aot.make_step(config, mesh).flops / mesh.size
    assert expected > 1e6 and per_chip == pytest.approx(expected, rel=1e-3)


def test_the_vae_stage_scales_its_latents_to_unit_variance(trained, micro_config):
    config = micro_config()
    vae = pretrained.load(f"{trained}/pretrained", ("vae",)).vae
    source = runs.open_source(config.data, "train", config.seed)
    config = pipeline.with_batch_size(config, 64)
    batch = next(pipeline.train_batches(source, config, config.seed))
    masks = codec.mask_images(batch["labels"], batch["class_ids"])
    pixels = np.concatenate([codec.to_pixels(batch["image"]), masks])
    graph, params = nnx.split(vae)
    mean, _ = jax.jit(lambda p, x: nnx.merge(graph, p).encode(x))(params, pixels)
    assert np.std(mean) * vae.config.scaling_factor == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    ("unet", "version", "says"),
    [
        ({"a_new_option": 3}, "99.0", "unet.a_new_option: unknown key.*written by version 99.0"),
        ({"a_new_option": 3}, None, "unet.a_new_option: unknown key"),
        ({"heads": "two"}, None, "unet.heads='two': must be tuple"),
        ({"heads": [7]}, None, "heads=7 does not divide 32 channels"),
        ({"heads": [1, 1]}, None, "heads has 2 levels instead of 1"),
        ({"norm_epsilon": -1}, None, "unet.norm_epsilon=-1.0: must be at least"),
    ],
)
def test_the_architecture_in_a_checkpoint_is_checked(trained, tmp_path, unet, version, says):
    workdir = str(tmp_path / "run")
    shutil.copytree(trained, workdir)
    for path in Path(workdir).glob("checkpoints/*/metadata/metadata"):
        stored = json.loads(path.read_text())
        assert stored["user"]["segdiff_jax_version"] == __version__
        stored["user"]["unet"] |= unet
        stored["user"]["segdiff_jax_version"] = version
        path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=says) as error:
        Segmenter.load(workdir)
    assert workdir in str(error.value) and "\n" not in str(error.value)


def test_a_workdir_of_the_version_before_is_read(trained, tmp_path):
    path = tmp_path / "config.json"
    values = json.loads(Path(trained, "config.json").read_text())
    assert values.pop("segdiff_jax_version") == __version__
    del values["init_variant"], values["vae"]["final_fraction"]
    path.write_text(json.dumps(values))
    assert workdirs.read_config(str(tmp_path)) == workdirs.read_config(trained)


def test_the_trained_model_segments(model):
    assert model.checkpoint_step == 6
    # All classes, as in validation: that is compiled already.
    found = model(PHOTO, vocabulary().classes, closed=True)
    assert found.labels.shape == (20, 30) and len(np.unique(found.labels)) > 1
    assert np.isfinite(found.scores).all() and found.scores.std() > 0


def test_the_moving_average_is_what_segments(model, trained):
    state = state_of(trained)
    assert same_bits(model.networks.unet_params, state.ema)
    assert not same_bits(state.ema, state.params)


def test_a_finished_run_is_left_as_it_is(trained, micro_config, tmp_path, monkeypatch, caplog):
    workdir = shutil.copytree(trained, str(tmp_path / "run"))
    before = contents(workdir)
    monkeypatch.setattr(runs, "loop", lambda *_: pytest.fail("trained again"))
    caplog.set_level(logging.INFO, "segdiff_jax")
    config = micro_config()
    config.train.steps, config.train.eval_every = 3, 0
    train(config, workdir)
    assert contents(workdir) == before
    assert "nothing to do" in caplog.text and "resuming" not in caplog.text
    assert "has done 6 steps, and config.train.steps is 3: raise it" in caplog.text


def test_a_second_training_in_the_same_workdir_is_refused(
    trained, micro_config, tmp_path, monkeypatch
):
    workdir, config, seen = str(tmp_path / "run"), micro_config(), []
    shutil.copytree(trained, workdir)
    config.train.steps, config.train.eval_every = 9, 0

    def run(*_):
        seen.append(contents(workdir))
        with pytest.raises(UserError, match=f"process {os.getpid()} on .* since .*--workdir"):
            train(config, workdir)
        seen.append(contents(workdir))
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "loop", run)
    with pytest.raises(KeyboardInterrupt):
        train(config, workdir)
    during, after = seen
    assert during == after and during.keys() - contents(workdir) == {"lock.json"}


def files_of_the_user(folder, kind, trained):
    folder.mkdir()
    if kind == "exported model":
        shutil.copytree(f"{trained}/pretrained", folder, dirs_exist_ok=True)
        config = workdirs.to_dict(workdirs.read_config(trained))
        (folder / "segdiff.json").write_text(json.dumps(config))
    elif kind == "Stable Diffusion folder":
        shutil.copytree(f"{trained}/pretrained", folder, dirs_exist_ok=True)
    elif kind == "folder of images":
        (folder / "IMG_1.JPG").write_bytes(b"")
    elif kind == "data set":
        (folder / "train" / "images").mkdir(parents=True)
        (folder / "classes.txt").write_text("sky")
    elif kind == "holds checkpoints but no config.json":
        shutil.copytree(f"{trained}/checkpoints", folder / "checkpoints")


KINDS = ("exported model", "Stable Diffusion folder", "folder of images", "data set")


@pytest.mark.parametrize("kind", [*KINDS, "holds checkpoints but no config.json"])
def test_a_folder_of_another_kind_is_no_workdir(trained, micro_config, tmp_path, kind):
    folder = tmp_path / "theirs"
    files_of_the_user(folder, kind, trained)
    before = contents(folder)
    with pytest.raises(UserError, match=f"--workdir {folder}: .*{kind}.*another --workdir"):
        train(micro_config(), str(folder))
    assert contents(folder) == before


def test_files_of_the_user_in_a_new_workdir_are_no_obstacle(micro_config, tmp_path, set_up):
    for name in ("logs/1.txt", "tensorboard/old", "notes.txt", ".DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    set_up(micro_config(), tmp_path)
    assert before.items() <= contents(tmp_path).items()
    assert "tensorboard" not in listed(tmp_path) and "config.json" in listed(tmp_path)


def listed(workdir):
    return ownership.owned(workdir).get("workdir")


def test_the_marker_of_a_workdir_lists_what_a_run_wrote_there(trained):
    for folder in (trained, f"{trained}/vae"):
        assert listed(folder) == set(os.listdir(folder)) - {ownership.MARKER}


@pytest.mark.parametrize("name", ["config.json", "classes.json", "tensorboard"])
def test_a_file_of_the_user_under_a_name_of_a_run_stays(micro_config, tmp_path, name):
    workdir = str(tmp_path)
    path = Path(workdir, name)
    path.write_text("mine")
    with pytest.raises(UserError, match=name) as error:
        train(micro_config(), workdir)
    assert "\n" not in str(error.value)
    assert os.listdir(workdir) == [name] and path.read_text() == "mine"


def test_a_folder_of_the_user_is_not_taken_for_a_later_part_of_the_run(
    trained, micro_config, tmp_path
):
    workdir, config = copy_at_step_2(trained, tmp_path), micro_config()
    Path(workdir, "latents").mkdir()
    Path(workdir, "latents", "notes.txt").write_text("mine")
    config.data.cache_latents, before = True, contents(workdir)
    with pytest.raises(UserError, match="latents: would be replaced") as error:
        train(config, workdir)
    assert "\n" not in str(error.value) and contents(workdir) == before


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("init_from", "no/such", "no/such"),
        (
            "init_from",
            "{trained}/checkpoints/4",
            "inside the workdir .*: give that as config.init_from",
        ),
        ("data.source", "ade20k", "data.root|no such|ADE"),
        ("mesh.data", 3, "devices"),
    ],
)
def test_a_start_that_cannot_be_leaves_nothing(trained, micro_config, tmp_path, key, value, words):
    value = value.format(trained=trained) if isinstance(value, str) else value
    config = changed(micro_config(), key, value)
    config.data.root = str(tmp_path / "nowhere")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for workdir in (tmp_path / "new" / "run", tmp_path / "mine"):
        with pytest.raises(UserError, match=words) as error:
            train(config, str(workdir))
        assert "\n" not in str(error.value)
    assert contents(tmp_path).keys() == {"mine/notes.txt"}
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("workdir", ["", " "])
def test_an_empty_workdir_is_refused(micro_config, monkeypatch, tmp_path, workdir):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--workdir is empty"):
        train(micro_config(), workdir)
    assert not os.listdir(tmp_path)


@pytest.fixture(scope="module")
def scored(trained, tmp_path_factory):
    """A copy of the run in which validation was best at step 2."""
    workdir = str(tmp_path_factory.mktemp("scored") / "run")
    shutil.copytree(trained, workdir)
    for step, score in ((2, 0.9), (4, float("nan")), (6, 0.5)):
        path = Path(workdir, "checkpoints", str(step), "metrics", "metrics")
        path.write_text(json.dumps({"miou_present": score}))
    return workdir


def test_any_checkpoint_can_be_asked_for(scored, trained):
    best, fourth = Segmenter.load(scored, "best"), Segmenter.load(scored, "4")
    assert (best.checkpoint_step, fourth.checkpoint_step) == (2, 4)
    assert same_bits(best.networks.unet_params, state_of(trained, 2).ema)
    with pytest.raises(UserError, match=r"no checkpoint of step 5 \(there are: 2, 4, 6\)"):
        Segmenter.load(scored, 5)
    with pytest.raises(UserError, match="newest, best or the step"):
        Segmenter.load(scored, "latest")
    for step in (2, 4, 6):
        path = Path(scored, "checkpoints", str(step), "metrics", "metrics")
        path.write_text("{}" if step < 6 else '{"mi')
    with pytest.raises(UserError, match="no validation was recorded .*2, 4, 6"):
        Segmenter.load(scored, "best")


@pytest.mark.parametrize(
    ("inside", "which"),
    [
        ("checkpoints", ""),
        ("checkpoints/4", ", with --which 4"),
        ("checkpoints/4/state/", ", with --which 4"),
        ("pretrained", ""),
        ("pretrained/vae", ""),
        ("vae", ""),
        ("config.json", ""),
    ],
)
def test_what_lies_inside_a_workdir_names_it(trained, inside, which, monkeypatch):
    with pytest.raises(
        UserError,
        match=re.escape(f"is inside the workdir {trained}: give that as --checkpoint{which}"),
    ):
        Segmenter.load(f"{trained}/{inside}")
    monkeypatch.chdir(f"{trained}/{inside}".removesuffix("/config.json"))
    if inside.startswith("checkpoints"):
        with pytest.raises(UserError, match=re.escape(f"inside the workdir {trained}")):
            Segmenter.load(".")


def test_interrupted_and_resumed_is_bit_for_bit_uninterrupted(
    trained, micro_config, tmp_path, interrupted
):
    """In a workdir of a version that kept no list of its files, with one of the user beside."""
    config, workdir = micro_config(), copy_at_step_2(trained, tmp_path)
    os.remove(f"{workdir}/{ownership.MARKER}")
    Path(workdir, "latents").mkdir()
    Path(workdir, "notes.txt").write_text("mine")
    config.train.eval_every, config.train.checkpoint_every = 0, 100
    with interrupted(4):
        train(config, workdir)
    assert steps_of(workdir) == [2, 4]

    train(config, workdir)
    assert steps_of(workdir) == [2, 4, 6]
    assert same_bits(state_of(workdir), state_of(trained))
    assert listed(workdir) == listed(trained) | {"latents"}


def test_a_signal_in_the_first_stage_ends_the_command_and_the_next_goes_on(
    micro_config, trained, tmp_path, interrupted, monkeypatch, caplog
):
    """The stage goes on by itself, which is the same, and then in the command that began it."""

    def second_stage(*_):
        raise KeyboardInterrupt

    config, workdir = micro_config(), str(tmp_path / "run")
    alone, vae = dataclasses.replace(config, stage="vae"), f"{workdir}/vae"
    monkeypatch.setattr(runs.conditioning, "encode_prompts", second_stage)
    with interrupted(1, "vae"):
        train(config, workdir)
    assert steps_of(vae) == [1] and not Path(workdir, "pretrained").exists()
    train(alone, vae)
    assert steps_of(vae) == [1, 2, 3]
    found, expected = (contents(f"{w}/pretrained") for w in (vae, f"{trained}/vae"))
    assert found == expected and "vae/diffusion_pytorch_model.safetensors" in found

    before = contents(vae)
    caplog.set_level(logging.INFO, "segdiff_jax")
    with pytest.raises(KeyboardInterrupt):
        train(config, workdir)
    assert "the vae stage has done 3 steps" in caplog.text and "nothing to do" not in caplog.text
    train(alone, vae)
    assert "nothing to do: the vae stage has done 3 steps" in caplog.text
    assert contents(vae) == before

    alone.vae.steps = 4
    train(alone, vae)
    assert steps_of(vae)[-1] == 4
    old, new = (pretrained.load(f"{w}/pretrained", ("vae",)).vae for w in (workdir, vae))
    assert not same_bits(nnx.state(old), nnx.state(new))


def test_a_changed_architecture_or_seed_is_refused_and_nothing_is_written(trained, micro_config):
    before = contents(trained)
    for key, value in (("seed", 1), ("model.preset", "tiny"), ("codec.context", "bound")):
        with pytest.raises(UserError, match=f"config.{key}"):
            train(changed(micro_config(), key, value), trained)
    assert contents(trained) == before


def test_starting_from_a_trained_workdir_continues_with_its_weights(
    trained, micro_config, tmp_path, set_up
):
    config = micro_config()
    config.init_from, config.train.eval_every = trained, 0
    started = set_up(config, tmp_path / "run").state
    assert int(started.step) == 0
    assert same_bits(started.params, state_of(trained).ema)
    assert same_bits(started.ema, started.params)


def test_going_on_does_not_read_what_init_from_gave(trained, micro_config, tmp_path, set_up):
    config, workdir = micro_config(), copy_at_step_2(trained, tmp_path)
    config.init_from, config.train.eval_every = str(tmp_path / "moved away"), 0
    started = set_up(config, workdir).state
    assert int(started.step) == 2
    assert same_bits(started.params, state_of(trained, 2).params)


def test_the_data_goes_on_where_it_was_with_another_batch_size(
    trained, micro_config, tmp_path, set_up
):
    config, workdir = micro_config(), copy_at_step_2(trained, tmp_path)
    config.train.batch_size, config.train.eval_every = 8, 0
    started = set_up(config, workdir)
    with contextlib.closing(started.batches) as batches:
        batch = next(batches)
    source = runs.open_source(config.data, "train", config.seed)
    expected = next(pipeline.train_batches(source, config, config.seed, start=2 * 4))
    assert started.metadata["next_example"] == 8 and batch.keys() == expected.keys()
    assert all(np.array_equal(batch[key], expected[key]) for key in batch)


def test_training_from_cached_latents_is_the_same_training(
    trained, micro_config, tmp_path, monkeypatch
):
    config, workdir = micro_config(), copy_at_step_2(trained, tmp_path)
    config.data.cache_latents, config.train.eval_every = True, 0
    shutil.rmtree(f"{workdir}/tensorboard")
    monkeypatch.setattr(
        "segdiff_jax.data.pipeline.train_batches", lambda *_: pytest.fail("read pixels")
    )
    train(config, workdir)
    found, pixels = (read_scalars(Path(w))["diffusion/loss"] for w in (workdir, trained))
    assert sorted(found) == [3, 4, 5, 6] and len(set(found.values())) == 4
    np.testing.assert_allclose(list(found.values()), [pixels[s] for s in found], rtol=1e-5)

    monkeypatch.setattr(latent_cache, "build", lambda *_: pytest.fail("built again"))
    vae = loading.load_frozen(f"{workdir}/pretrained", "float32")[0]
    source = runs.open_source(config.data, "train", config.seed)
    assert len(latent_cache.open_or_build(source, vae, config, f"{workdir}/latents")) == 32
