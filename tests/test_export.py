"""`python -m segdiff_jax.export --format diffusers`: a folder that loads in torch and back here."""

import dataclasses
import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import safetensors.numpy

from segdiff_jax import cli, export, ownership
from segdiff_jax.config import Config, DataConfig
from segdiff_jax.errors import UserError
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.weights import workdir

CLASSES = ("plain red circle", "striped blue triangle", "background")
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setattr("segdiff_jax.parallel.runtime.start", lambda: None)


def run(checkpoint, output, *more):
    argv = ["--checkpoint", str(checkpoint), "--output", str(output), "--format", "diffusers"]
    export.main([*argv, *more])
    return Path(output)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    return run(trained, tmp_path_factory.mktemp("export") / "model")


def test_the_export_segments_like_the_run(trained, exported):
    photo = np.random.default_rng(0).integers(0, 256, (20, 28, 3), dtype=np.uint8)
    before, after = (Segmenter.load(str(p)) for p in (trained, exported))
    expected, found = before(photo, CLASSES, seed=3), after(photo, CLASSES, seed=3)
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert after.config == export.portable(before.config)
    assert after.config.codec == before.config.codec
    assert after.config.prompts == before.config.prompts
    assert after.trained.classes == before.trained.classes
    assert trained not in (exported / workdir.CLASSES).read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_of_the_export_is_byte_identical(trained, exported, dtype, tmp_path):
    first = exported
    if dtype != "float32":
        first = run(trained, tmp_path / "first", "--dtype", dtype)
    stored = {t.dtype.name for t in safetensors.numpy.load_file(first / UNET).values()}
    assert stored == {dtype}
    assert contents(run(first, tmp_path / "second", "--dtype", dtype)) == contents(first)


def test_verify_compares_the_networks_with_those_of_diffusers(
    exported, tmp_path, capsys, monkeypatch
):
    run(exported, tmp_path / "m", "--verify", "--dtype", "float16")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "verified" in line]
    assert float(line.split("diffusers ")[1].split()[0]) < 1e-4
    load = diffusers.AutoencoderKL.from_pretrained

    def other(*args, **options):
        vae = load(*args, **options)
        vae.decoder.conv_out.weight.data *= -1
        return vae

    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", other)
    with pytest.raises(SystemExit) as caught:
        run(exported, tmp_path / "m", "--verify")
    assert caught.value.code == 1 and "(vae decoder)" in capsys.readouterr().out
    monkeypatch.setattr("segdiff_jax.weights.verify.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--verify: torch and diffusers not installed: pip install"):
        run(exported, tmp_path / "n", "--verify")
    assert not (tmp_path / "n").exists()


def test_ema_or_raw_weights(trained, exported, tmp_path):
    assert contents(run(trained, tmp_path / "ema", "--weights", "ema")) == contents(exported)
    raw = contents(run(trained, tmp_path / "raw", "--weights", "raw"))
    different = {name for name in raw if raw[name] != contents(exported)[name]}
    assert different == {UNET}
    for flag, value in (("--weights", "raw"), ("--which", "best"), ("--which", "4")):
        with pytest.raises(UserError, match=f"an export is of one set.*leave {flag} out"):
            run(exported, tmp_path / "x", flag, value)
    assert not (tmp_path / "x").exists()


def test_ema_of_a_run_without(trained, tmp_path):
    config = workdir.read_config(trained)
    config.optimizer.ema_decay = 0.0
    workdir.write_config(str(tmp_path / "w"), config)
    with pytest.raises(UserError, match="trained without EMA: use --weights raw"):
        run(tmp_path / "w", tmp_path / "x", "--weights", "ema")


def test_paths_of_the_training_machine_stay_there():
    data = DataConfig(source="folder", root="/home/me/photos", vocabulary="/home/me/classes.txt")
    config = export.portable(Config(data=data, init_from="/home/me/run"))
    assert "/home/me" not in json.dumps(dataclasses.asdict(config))
    known = Config(
        data=DataConfig(root="gs://b/x", vocabulary="ade20k_150"), init_from="a/sd-2@fp16"
    )
    kept = export.portable(known)
    assert kept.data.root == "" and kept.data.vocabulary == "ade20k_150"
    assert kept.init_from == "a/sd-2@fp16"
    assert export.portable(kept) == kept


def test_model_card_says_what_the_model_is(tiny_networks, tiny_config, tmp_path):
    config = tiny_config(classes_per_pass=0, context="bound", logit_adjustment=0.75)
    config.init_from, config.data.vocabulary = "someone/sd-2@main", "ade20k_150"
    config.data.fit, config.sampler.ensemble, config.sampler.decoder = "stretch", 3, "joint"
    export.write_folder((*tiny_networks, config), tmp_path / "m")
    card = (tmp_path / "m" / "README.md").read_text()
    header = card.split("---\n")[1]
    assert "base_model: someone/sd-2\n" in header and "pipeline_tag: image-segm" in header
    for text in ("ade20k_150", "16 × 16", "stretched", "all of them", "bound", "0.75", "1 × 3"):
        assert text in card
    assert "`a photo of a {class}`" in card and "| decoder | joint |" in card
    assert f"takes {tiny_networks[0].config.in_channels} channels" in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "2"], "--steps: only --format stablehlo"),
        (["--verify", "--format", "stablehlo"], "--verify: only for a local folder"),
        (["--dtype", "int8"], "--dtype"),
        (["--checkpoint", "/no/such/run"], "/no/such/run: neither a training workdir"),
    ],
)
def test_bad_arguments_leave_nothing(arguments, message, exported, tmp_path, capsys):
    argv = ["--checkpoint", str(exported), "--output", str(tmp_path / "o")]
    with pytest.raises(SystemExit) as caught:
        cli.run(export.main, [*argv, "--format", "diffusers", *arguments])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def refused(capsys, checkpoint, output, *more):
    """The one line with which an export is refused; nothing beside it or in it has changed."""
    before = {path: path.is_file() and path.read_bytes() for path in output.parent.rglob("*")}
    argv = ["--checkpoint", str(checkpoint), "--output", str(output), "--format", "diffusers"]
    with pytest.raises(SystemExit) as caught:
        cli.run(export.main, [*argv, *more])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    after = {path: path.is_file() and path.read_bytes() for path in output.parent.rglob("*")}
    assert after == before
    return error


def test_the_list_of_files_is_that_of_the_files(exported):
    (listed,) = ownership.owned(exported).values()
    assert listed == set(contents(exported)) - {ownership.MARKER}


def test_only_an_export_that_this_command_wrote_is_replaced(exported, tmp_path, capsys):
    shutil.copytree(exported, tmp_path / "a" / "m")
    thesis = tmp_path / "a" / "m" / "unet" / "my thesis.txt"
    thesis.write_text("years")
    error = refused(capsys, exported, tmp_path / "a" / "m")
    assert f"{thesis}: is no part of the export" in error
    thesis.unlink()
    error = refused(capsys, exported, tmp_path / "a" / "m", "--format", "stablehlo")
    assert "holds diffusers files of segdiff_jax" in error
    run(exported, tmp_path / "a" / "m")


def test_what_the_export_is_made_from_is_never_the_output(exported, tmp_path, capsys):
    shutil.copytree(exported, tmp_path / "x" / "m")  # with its list: an export could replace it
    (tmp_path / "x" / "link").symlink_to("m")
    output = Path(f"{tmp_path}/x/link")
    assert "--checkpoint" in refused(capsys, tmp_path / "x" / "m", output)
    config = workdir.read_config(str(exported))
    config.init_from = str(tmp_path / "x" / "m")
    workdir.write_config(str(tmp_path / "w"), config)
    assert "the run's init_from" in refused(capsys, tmp_path / "w", output)
