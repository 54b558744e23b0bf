"""`python -m segdiff_jax.evaluate`: what it writes, and what it says of bad input."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from segdiff_jax import cli, evaluate, workdir
from segdiff_jax.data import vocabulary

pytestmark = pytest.mark.usefixtures("fast_compile")

CONFIG = """
from segdiff_jax.config import Config, DataConfig, SamplerConfig, VAEConfig

def get_config():
    return Config(
        data=DataConfig(source="folder", root={root!r}, image_size=(16, 16)),
        sampler=SamplerConfig(steps=1, ensemble=2, batch_size=6),
        vae=VAEConfig(steps=1),
    )
"""


@pytest.fixture
def data(tmp_path):
    """Three pairs of 20×28 pixels; the class "road" never occurs."""
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    for folder in ("images", "masks"):
        (root / "val" / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("sky\nbuilding, edifice\nroad\n")
    for i in range(3):
        image = rng.integers(0, 256, (20, 28, 3), dtype=np.uint8)
        labels = rng.choice(np.array([0, 1, 255], np.uint8), (20, 28))
        Image.fromarray(image).save(root / "val" / "images" / f"p{i}.png")
        Image.fromarray(labels).save(root / "val" / "masks" / f"p{i}.png")
    return root


@pytest.fixture
def files(tmp_path, data, tiny_networks, tiny_config, monkeypatch):
    """A config file, and a workdir whose networks are the tiny ones."""
    (tmp_path / "config.py").write_text(CONFIG.format(root=str(data)))
    workdir.write_config(str(tmp_path / "w"), tiny_config())
    monkeypatch.setattr(
        workdir, "load_networks", lambda path: (*tiny_networks, workdir.read_config(path))
    )
    monkeypatch.setattr("segdiff_jax.runtime.start", lambda: None)
    return tmp_path


def _run(files, capsys, *more, config=True):
    argv = ["--checkpoint", str(files / "w"), "--output", str(files / "o"), *more]
    if config:
        argv += ["--config", str(files / "config.py")]
    with pytest.raises(SystemExit) as caught:
        cli.run(evaluate.main, argv)
    return caught.value.code, capsys.readouterr()


def test_writes_metrics_and_page(files, capsys):
    code, output = _run(files, capsys, "--rows", "2", "--seed", "3")
    assert code == 0, output.err
    values = json.loads((files / "o" / "metrics.json").read_text())
    assert set(values["per_class"]) == {"sky", "building", "road"}
    assert values["miou_present"] == pytest.approx(
        (values["per_class"]["sky"] + values["per_class"]["building"]) / 2
    )
    assert values["miou_present"] >= values["miou_union"]
    assert values["images"] == 3 and values["settings"]["seed"] == 3
    assert values["settings"]["ensemble"] == 2 and values["data"]["split"] == "val"
    page = (files / "o" / "index.html").read_text()
    assert page.count("<figcaption>truth") == page.count("<figcaption>uncertainty") == 2
    assert sorted(p.name for p in (files / "o").iterdir()) == [
        "examples.png",
        "index.html",
        "metrics.json",
    ]
    for name in ("sky", "building", "road", "pixel accuracy"):
        assert name in output.out
    assert f"{values['miou_present']:.3f}" in output.out


def test_the_classes_are_printed_and_checked(files, data, capsys, tiny_config):
    code, output = _run(files, capsys, "--limit", "1")
    assert code == 0 and "3 classes, 1 synonym: sky; building (= edifice); road" in output.out
    (data / "classes.txt").write_text("sky\nrefrigerator door\nrefrigerator shelf\n")
    (files / "o" / "metrics.json").unlink()
    code, output = _run(files, capsys)
    assert code == 2 and "'refrigerator door' and 'refrigerator shelf'" in output.err
    assert not (files / "o" / "metrics.json").exists()


def test_another_order_of_classes_has_no_score(files, data, capsys, tiny_config):
    workdir.write_config(str(files / "w"), tiny_config(classes_per_pass=0))
    trained = vocabulary.from_names(["building", "sky", "road"])
    workdir.settle_classes(str(files / "w"), trained, write=True)
    per_pass = "--config.codec.classes_per_pass=0"
    code, output = _run(files, capsys, per_pass)
    assert code == 2 and "class 0 is 'building', not 'sky'" in output.err
    assert not (files / "o" / "metrics.json").exists()
    (data / "classes.txt").write_text("building\nsky\nroad\n")
    assert _run(files, capsys, per_pass, "--limit", "1")[0] == 0


@pytest.mark.parametrize("more", [[], ["--ceiling"]])
def test_maps_that_are_not_finite_have_no_score(files, capsys, tiny_networks, monkeypatch, more):
    unet, vae, *rest = tiny_networks
    broken = nnx.clone(vae)
    nnx.update(broken, jax.tree.map(lambda x: x * np.nan, nnx.state(vae)))
    monkeypatch.setattr(
        workdir, "load_networks", lambda path: (unet, broken, *rest, workdir.read_config(path))
    )
    code, output = _run(files, capsys, *more)
    assert code == 2 and "not finite: the weights of the VAE" in output.err
    assert ("p0: the map of sky" in output.err) != bool(more)
    assert not (files / "o" / "metrics.json").exists()


def test_same_command_same_bytes(files, capsys):
    written = []
    for _ in range(2):
        assert _run(files, capsys, "--limit", "2")[0] == 0
        written.append([p.read_bytes() for p in sorted((files / "o").iterdir())])
    assert written[0] == written[1]


def test_config_of_the_checkpoint_with_overrides(files, data, capsys):
    code, output = _run(
        files,
        capsys,
        "--config.data.source=folder",
        f"--config.data.root={data}",
        "--config.sampler.steps=2",
        "--limit=1",
        config=False,
    )
    assert code == 0, output.err
    settings = json.loads((files / "o/metrics.json").read_text())["settings"]
    assert (settings["steps"], settings["ensemble"], settings["batch_size"]) == (2, 1, 4)


def test_ceiling(files, capsys):
    code, output = _run(files, capsys, "--ceiling")
    assert code == 0, output.err
    assert json.loads((files / "o/metrics.json").read_text())["settings"]["ceiling"] is True
    assert "Ceiling" in (files / "o/index.html").read_text()


def _damage(files, kind):
    root = files / "data" / "val"
    if kind == "mask missing":
        (root / "masks" / "p1.png").unlink()
    elif kind == "size":
        Image.new("L", (5, 5)).save(root / "masks" / "p1.png")
    elif kind == "id":
        Image.new("L", (28, 20), 9).save(root / "masks" / "p1.png")
    elif kind == "truncated":
        data = (root / "images" / "p1.png").read_bytes()
        (root / "images" / "p1.png").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("mask missing", "p1.png: no mask"),
        ("size", "p1.png: 5x5 pixels"),
        ("id", "p1.png: id 9 is none of the 3 classes"),
        ("truncated", "p1.png: truncated or damaged"),
    ],
)
def test_bad_data(files, capsys, kind, message):
    _damage(files, kind)
    code, output = _run(files, capsys)
    assert code == 2 and message in output.err
    assert output.err.count("error:") == 1 and "Traceback" not in output.err
    assert not (files / "o" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.codec.classes_per_pass=0"], "config.codec.classes_per_pass=1"),
        (["--config.codec.context=bound"], "config.codec.context='mean'"),
        (["--config.model.preset=small"], "config.model.preset='tiny'"),
        (["--config.diffusion.prediction_type=sample"], "prediction_type='v_prediction'"),
        (["--config.data.image_size=16,17"], "multiples of 2"),
        (["--config.data.root=/no/such/folder"], "config.data.root=/no/such/folder"),
        (["--split=test"], "test/images: no such folder"),
        (["--limit=0"], "--limit"),
        (["--seed=-1"], "--seed"),
        (["--config.sampler.step=2"], "config.sampler.steps"),
    ],
)
def test_bad_flags_are_one_line(files, capsys, flags, message):
    code, output = _run(files, capsys, *flags)
    assert code == 2 and message in output.err and output.err.count("\n") == 1
    assert not (files / "o" / "metrics.json").exists()


def test_checkpoint_that_is_none(files, capsys):
    (files / "w" / "config.json").unlink()
    code, output = _run(files, capsys)
    assert code == 2 and "neither a training workdir" in output.err
    assert not (files / "o").exists()


def test_output_that_is_a_file(files, capsys):
    (files / "o").write_text("mine")
    code, output = _run(files, capsys)
    assert code == 2 and f"cannot write {files / 'o'}" in output.err
    assert (files / "o").read_text() == "mine"


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run(evaluate.main, ["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "--ceiling" in text and "sampler.ensemble" in text
