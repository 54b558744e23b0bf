"""What a training starts from: refused, or said, before anything is loaded or written."""

import json
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from small import changed

from segdiff_jax import cli, train
from segdiff_jax import config as configs
from segdiff_jax.config import DiffusionConfig
from segdiff_jax.errors import UserError
from segdiff_jax.training import origin
from segdiff_jax.weights import pretrained
from segdiff_jax.weights.pretrained import Pretrained

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SD2 = {"rescale_betas_zero_snr": False, "timestep_spacing": "leading"}
CONFIG = """
from segdiff_jax.config import Config, DataConfig, VAEConfig

def get_config():
    return Config(data=DataConfig(source="scenes", image_size=(16, 16)), vae=VAEConfig(steps=1))
"""


class Reached(Exception):
    """Nothing was refused, and the weights would be read now."""


@pytest.fixture(scope="module")
def exported(tiny_networks, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "sd"
    pretrained.save(Pretrained(*tiny_networks, DiffusionConfig(**SD2)), folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "sd"))


@pytest.fixture
def begin(micro_config, tmp_path, monkeypatch):
    """A function that starts a training from a folder, up to its weights."""

    def load(*_, **__):
        raise Reached

    def begin(folder, stage="diffusion", **diffusion):
        config = micro_config()
        config.stage, config.init_from, config.train.eval_every = stage, str(folder), 0
        for key, value in diffusion.items():
            setattr(config.diffusion, key, value)
        with monkeypatch.context() as patch, pytest.raises((Reached, UserError)) as caught:
            patch.setattr(pretrained, "load", load)
            workdir = Path(tempfile.mkdtemp(dir=tmp_path)) / "run"
            train.train(config, str(workdir))
        if isinstance(caught.value, UserError):
            assert "\n" not in str(caught.value) and not workdir.exists()
        return "" if isinstance(caught.value, Reached) else str(caught.value)

    return begin


def run(tmp_path, capsys, *flags) -> str:
    """The one line with which `python -m segdiff_jax.train` refuses."""
    (tmp_path / "config.py").write_text(CONFIG)
    argv = ["--config", str(tmp_path / "config.py"), "--workdir", str(tmp_path / "run"), *flags]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr("segdiff_jax.parallel.runtime.start", lambda *_: None)
        patch.setattr("segdiff_jax.parallel.runtime.start_logging", lambda **_: None)
        cli.run(train.main, argv)
    output = capsys.readouterr()
    assert caught.value.code == 2 and output.err.count("\n") == 1, output.err
    assert not (tmp_path / "run/config.json").exists()
    return output.err


def change(folder, file, **values):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("size", "flags", "says"),
    [
        ("96,100", [], "multiples of 8, the downsampling of model.preset='tiny'"),
        ("97,128", ["--config.model.preset=sd2"], "multiples of 8"),
        (
            "16,17",
            ["--config.init_from={folder}"],
            "multiples of 2, the downsampling of the VAE of",
        ),
        ("16,16", ["--config.model.preset=zzz"], "config.model.preset='zzz': choose one of"),
        ("20,20", ["--config.stage=vae"], "multiples of 8"),
    ],
)
def test_what_the_networks_cannot_do_is_refused_first(tmp_path, capsys, folder, size, flags, says):
    flags = [flag.format(folder=folder) for flag in flags]
    assert says in run(tmp_path, capsys, f"--config.data.image_size={size}", *flags)


def test_an_image_size_that_a_workdir_to_start_from_cannot_divide(tmp_path, capsys, trained):
    flags = [f"--config.init_from={trained}", "--config.data.image_size=16,17"]
    assert "multiples of 2, the downsampling of the VAE" in run(tmp_path, capsys, *flags)


def test_an_epsilon_model_goes_on_as_one_or_is_converted_by_saying_so(begin, folder):
    change(folder, "scheduler/scheduler_config.json", prediction_type="epsilon")
    refused = begin(folder)
    assert "was trained to predict 'epsilon'" in refused
    as_it_was = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    for key, value in as_it_was.items():
        assert f"--config.diffusion.{key}={value}" in refused
    assert "--config.diffusion.convert_prediction=true" in refused
    assert begin(folder, **as_it_was) == ""
    assert begin(folder, convert_prediction=True) == ""


def test_what_the_run_overrides_is_one_line_of_the_log(begin, folder, caplog):
    caplog.set_level("INFO")
    assert begin(folder, beta_start=0.001) == ""
    (line,) = [m for m in caplog.messages if "was trained with" in m]
    before, now = line.split("; this run uses ")
    for shown, values in ((before, (0.00085, "leading", False)), (now, (0.001, "trailing", True))):
        for key, value in zip(
            ("beta_start", "timestep_spacing", "rescale_betas_zero_snr"), values, strict=True
        ):
            assert f"{key}={value}" in shown
    assert "beta_end" not in line and "steps_offset" not in line

    caplog.clear()
    assert begin(folder, **SD2) == ""
    assert not any("was trained with" in m for m in caplog.messages)


@pytest.mark.parametrize(
    "values",
    [
        {"trained_betas": [0.1, 0.2]},
        {"clip_sample": True},
        {"thresholding": True},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_end": -0.1},
        {"num_train_timesteps": "many"},
    ],
)
def test_a_schedule_that_cannot_work_is_refused(begin, folder, values):
    change(folder, "scheduler/scheduler_config.json", **values)
    ((key, value),) = values.items()
    assert f"scheduler_config.json: {key}={value!r}" in begin(folder)


def test_a_folder_without_a_schedule_is_taken_at_the_configs_word(begin, folder, caplog):
    shutil.rmtree(folder / "scheduler")
    assert begin(folder) == ""
    assert "has no scheduler/" in caplog.text and "prediction_type='v_prediction'" in caplog.text


def test_only_the_parts_that_a_stage_uses_are_looked_at(begin, folder):
    change(folder, "unet/config.json", addition_embed_type="text_time")
    assert "addition_embed_type" in begin(folder)
    assert begin(folder, stage="vae") == ""
    shutil.rmtree(folder / "tokenizer")
    shutil.rmtree(folder / "unet")
    assert "has no tokenizer" in begin(folder) or "has no unet" in begin(folder)
    assert begin(folder, stage="vae") == ""


def test_a_workdir_to_start_from_has_its_schedule_in_its_config(begin, trained):
    as_epsilon = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    assert "was trained to predict 'v_prediction'" in begin(trained, **as_epsilon)
    assert begin(trained, convert_prediction=True, **as_epsilon) == ""


def test_parts_of_two_models_are_refused(begin, folder):
    change(folder, "text_encoder/config.json", hidden_size=36)
    assert "text of width 32, but the text encoder's is 36" in begin(folder)


def test_weights_only_as_variants_are_chosen_by_a_key(
    folder, micro_config, tmp_path, capsys, set_up, tiny_networks
):
    plain = folder / WEIGHTS
    half = {k: v.astype(np.float16) for k, v in safetensors.numpy.load_file(plain).items()}
    safetensors.numpy.save_file(half, plain.with_name(f"{plain.stem}.fp16.safetensors"))
    plain.rename(plain.with_name(f"{plain.stem}.non_ema.safetensors"))
    start = f"--config.init_from={folder}"
    with pytest.raises(UserError, match="only the variants fp16, non_ema.*init_variant=fp16"):
        pretrained.load(folder, ("unet",))
    typo = run(tmp_path, capsys, start, "--config.init_variant=pf16")
    assert "no weights of the variant 'pf16', but fp16, non_ema, the plain files" in typo

    config = micro_config()
    config.init_from, config.init_variant, config.train.eval_every = str(folder), "fp16", 0
    config.prompts.templates = ("{class}",)  # the tokenizer knows no words, and 16 tokens are few
    started = jax.tree.leaves(set_up(config, tmp_path / "run").state.params)
    leaves = zip(started, jax.tree.leaves(nnx.state(tiny_networks[0])), strict=True)
    assert all(np.array_equal(a, np.asarray(b).astype(np.float16)) for a, b in leaves)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_named(folder, tmp_path, capsys, value):
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    tensors["conv_out.bias"][1] = value
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UserError, match="conv_out.bias holds NaN or infinity") as error:
        pretrained.load(folder)
    assert str(folder / WEIGHTS) in str(error.value)


def test_nothing_to_weigh_where_a_pass_shows_every_class(micro_config, tmp_path):
    config = micro_config()
    config.train.balance, config.codec.context = 0.5, "bound"
    config.codec.classes_per_pass = 25
    with pytest.raises(UserError, match=r"config\.train\.balance=0\.5: must be 0"):
        train.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_batches_of_the_stages_to_come_must_divide_over_the_devices(
    micro_config, tmp_path, monkeypatch
):
    asked, config = {}, micro_config()
    monkeypatch.setattr(
        "segdiff_jax.parallel.mesh.local_rows", lambda _, size, key: asked.update({key: size})
    )
    config.joint.steps, config.joint.batch_size = 1, 5
    origin.check_start(config, str(tmp_path))
    batches = {"config.train.batch_size": 4, "config.vae.batch_size": 4}
    assert asked == batches | {"config.joint.batch_size": 5}
    asked.clear()
    config.optimizer.accumulation = 2  # of the UNet's batches
    origin.check_start(config, str(tmp_path))
    micro = {"config.optimizer.accumulation": 2}
    assert asked == batches | {"config.joint.batch_size": 5} | micro
    asked.clear()
    config.stage = "vae"  # which no other follows
    origin.check_start(config, str(tmp_path))
    assert asked == {"config.vae.batch_size": 4}


def test_betas_that_leave_no_signal(begin, folder):
    assert "have no signal left" in begin(folder, beta_start=0.9, beta_end=0.9)


def test_config_may_differ_where_the_state_does_not_depend_on_it():
    stored = json.loads(json.dumps(configs.to_dict(configs.Config())))  # tuples are lists now
    current = configs.Config()
    current.train.steps = 7
    current.data.root = "/elsewhere"
    current.optimizer.learning_rate = 1.0
    current.model.dtype = "bfloat16"
    current.diffusion.timestep_spacing = "leading"
    current.mesh.fsdp = 4
    origin.check_config(stored, configs.to_dict(current))


@pytest.mark.parametrize(
    ("key", "before", "value"),
    [
        ("model.preset", "tiny", "sd2"),
        ("codec.context", "mean", "bound"),
        ("codec.classes_per_pass", 1, 4),
        ("diffusion.prediction_type", "v_prediction", "sample"),
        ("optimizer.ema_decay", 0.0, 0.999),
        ("stage", "diffusion", "vae"),
        ("seed", 0, 1),
    ],
)
def test_config_that_contradicts_the_checkpoint_names_the_key_and_both_values(key, before, value):
    stored, current = configs.Config(), changed(configs.Config(), key, value)
    with pytest.raises(UserError) as error:
        origin.check_config(*map(configs.to_dict, (stored, current)))
    assert f"config.{key} was {before!r} and is now {value!r}" in str(error.value)
    assert "\n" not in str(error.value)


def test_ema_decay_may_change_but_not_be_switched_off():
    stored, current = configs.to_dict(configs.Config()), configs.to_dict(configs.Config())
    stored["optimizer"]["ema_decay"], current["optimizer"]["ema_decay"] = 0.999, 0.99
    origin.check_config(stored, current)
    current["optimizer"]["ema_decay"] = 0.0
    with pytest.raises(UserError, match="optimizer.ema_decay"):
        origin.check_config(stored, current)
