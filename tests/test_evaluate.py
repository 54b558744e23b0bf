"""`python -m segdiff_jax.evaluate`: what it writes, and what it says of bad input."""

import contextlib
import csv
import dataclasses
import json
import os

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from segdiff_jax import cli, evaluate, ownership, train
from segdiff_jax.config import DataConfig
from segdiff_jax.data import survey
from segdiff_jax.data.sources.source import open_source
from segdiff_jax.parallel import processes
from segdiff_jax.text import vocabulary
from segdiff_jax.weights import loading, workdir
from segdiff_jax.weights.mask_decoders import Decoders

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
        loading,
        "load_networks",
        lambda path, which: (
            (*tiny_networks, workdir.read_config(path)),
            Decoders(),
            {"newest": 6, "best": 2}[which],
        ),
    )
    monkeypatch.setattr("segdiff_jax.parallel.runtime.start", lambda *_: None)
    return tmp_path


def _run(files, capsys, *more, config=True):
    argv = ["--checkpoint", str(files / "w"), "--output", str(files / "o"), *more]
    if config:
        argv += ["--config", str(files / "config.py")]
    with pytest.raises(SystemExit) as caught:
        cli.run(evaluate.main, argv)
    return caught.value.code, capsys.readouterr()


def _bytes(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def test_what_is_written_is_the_same_each_time_and_its_own(files, capsys):
    flags = ["--rows", "2", "--seed", "3", "--per-image", "--predictions"]
    written = []
    for _ in range(2):  # the second time it replaces its own
        code, output = _run(files, capsys, *flags)
        assert code == 0, output.err
        written.append(_bytes(files / "o"))
    assert written[0] == written[1]
    assert set(written[0]) == {
        *(ownership.MARKER, "examples.png", "index.html", "metrics.json", "per_image.csv"),
        *(f"predictions/p{i}.png" for i in range(3)),
    }
    values = json.loads(written[0]["metrics.json"])
    assert set(values["per_class"]) == {"sky", "building", "road"}
    assert values["miou_present"] == pytest.approx(
        (values["per_class"]["sky"] + values["per_class"]["building"]) / 2
    )
    assert values["miou_present"] >= values["miou_union"]
    assert values["images"] == 3 and values["settings"]["seed"] == 3
    assert values["settings"]["ensemble"] == 2 and values["data"]["split"] == "val"
    page = written[0]["index.html"].decode()
    assert page.count("<figcaption>truth") == page.count("<figcaption>uncertainty") == 2
    for shown in ("pixel accuracy", f"{values['miou_present']:.3f}"):
        assert shown in output.out
    assert "3 classes, 1 synonym: sky; building (= edifice); road" in output.out
    assert "config.data.fit" not in output.err
    _check_per_image(written[0]["per_image.csv"].decode(), values)

    (files / "o" / "notes.txt").write_text("mine")
    assert _run(files, capsys, "--ceiling", "--limit=1", "--rows=0")[0] == 0
    kept = {"index.html", "metrics.json", "predictions"}
    assert {path.name for path in (files / "o").iterdir()} == {
        *(kept | {ownership.MARKER, "notes.txt"})
    }, "a table or pictures would be another run's"
    assert ownership.owned(files / "o") == {"evaluation": kept}


def _check_per_image(text, values):
    """The table of images gives the figures again."""
    lines = list(csv.DictReader(text.splitlines()))
    assert [line["image"] for line in lines] == sorted(line["image"] for line in lines)
    assert {line["image"] for line in lines} == {"p0", "p1", "p2"}
    for prefix, table in (("", "per_class"), ("boundary_", "per_class_boundary")):
        for name, iou in values[table].items():
            truth, guess, both = (
                sum(int(line[prefix + column]) for line in lines if line["class"] == name)
                for column in ("truth", "prediction", "both")
            )
            assert (iou is None) == (truth + guess == 0)
            assert not truth + guess or iou == pytest.approx(both / (truth + guess - both))
    assert all(0 <= float(line["score"]) <= 1 for line in lines)


@pytest.mark.parametrize("name", ["metrics.json", "predictions/mine.png"])
def test_a_file_of_the_user_is_not_replaced(files, capsys, name):
    (files / "o" / name).parent.mkdir(parents=True)
    (files / "o" / name).write_text("mine")
    code, output = _run(files, capsys, "--predictions")
    assert code == 2 and f"{name.split('/')[0]}: would be replaced" in output.err
    assert _bytes(files / "o") == {name: b"mine"}


def test_photos_of_the_same_name_keep_a_prediction_each(files, data, capsys):
    for kind in ("images", "masks"):
        for number in range(3):
            folder = data / "val" / kind / f"day{number}"
            folder.mkdir()
            (data / "val" / kind / f"p{number}.png").rename(folder / "p.png")
    code, output = _run(files, capsys, "--predictions", "--per-image", "--ceiling")
    assert code == 0, output.err
    written = sorted((files / "o" / "predictions").rglob("*.png"))
    assert [path.parent.name for path in written] == ["day0", "day1", "day2"]
    assert {path.name for path in written} == {"p.png"}
    rows = (files / "o" / "per_image.csv").read_text().splitlines()
    assert {row.split(",")[0] for row in rows[1:]} == {f"day{n}/p" for n in range(3)}


def test_classes_that_the_model_cannot_tell_apart_have_no_score(files, data, capsys):
    (data / "classes.txt").write_text("sky\nrefrigerator door\nrefrigerator shelf\n")
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
        loading,
        "load_networks",
        lambda path, which: ((unet, broken, *rest, workdir.read_config(path)), Decoders(), 6),
    )
    code, output = _run(files, capsys, *more)
    assert code == 2 and "not finite: the weights of the VAE" in output.err
    assert ("p0: the map of sky" in output.err) != bool(more)
    assert not (files / "o" / "metrics.json").exists()


def test_config_of_the_checkpoint_with_overrides(files, data, capsys):
    code, output = _run(
        files,
        capsys,
        "--config.data.source=folder",
        f"--config.data.root={data}",
        "--config.sampler.steps=2",
        *("--ceiling", "--limit=1", "--which=best"),
        config=False,
    )
    assert code == 0, output.err
    written = json.loads((files / "o/metrics.json").read_text())
    settings = written["settings"]
    assert written["checkpoint_step"] == 2 and settings["ceiling"] is True
    assert (settings["steps"], settings["ensemble"], settings["batch_size"]) == (2, 1, 4)
    assert "Ceiling" in (files / "o/index.html").read_text()


def _halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _link(path):
    path.unlink()
    path.symlink_to("nowhere.png")


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (lambda path: path.unlink(), "masks", "p1.png: no mask"),
        (Image.new("L", (5, 5)).save, "masks", "p1.png: 5x5 pixels"),
        (Image.new("L", (28, 20), 9).save, "masks", "p1.png: id 9 is none of the 3 classes"),
        (_halve, "images", "p1.png: truncated or damaged"),
        (_link, "images", "p1.png: a link to nowhere.png"),
    ],
)
def test_bad_data(files, capsys, damage, kind, message):
    damage(files / "data" / "val" / kind / "p1.png")
    code, output = _run(files, capsys)
    assert code == 2 and message in output.err
    assert output.err.count("error:") == 1 and "Traceback" not in output.err
    assert not (files / "o" / "metrics.json").exists()


def test_a_mask_corrected_before_an_evaluation_goes_on_counts(files, capsys):
    photo, mask = (files / "data" / "val" / kind for kind in ("images/p2.png", "masks/p0.png"))
    whole = photo.read_bytes()
    _halve(photo)
    assert _run(files, capsys)[0] == 2, "stopped by the last photo"
    photo.write_bytes(whole)
    Image.new("L", (28, 20), 1).save(mask)
    assert _run(files, capsys)[0] == 0
    found = (files / "o" / "metrics.json").read_text()
    assert _run(files, capsys)[0] == 0, "from the start: the first one has left no parts"
    assert (files / "o" / "metrics.json").read_text() == found


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
        (["--config.codec.threshold=0.4"], "without --open"),
        (["--config.codec.closed=true"], "without --open"),
        (["--noconfig.codec.closed", "--open"], "--open says it already"),
        (["--config.sampler.shortlist=2", "--config.codec.classes_per_pass=0"], "shortlist=2"),
        (["--suite=open_vocabulary"], "without --data"),
        (["--data=d"], "without --suite"),
        (["--suite=open_vocabulary", "--data=d"], "leave --config"),
    ],
)
def test_bad_flags_are_one_line(files, capsys, flags, message):
    code, output = _run(files, capsys, *flags)
    assert code == 2 and message in output.err and output.err.count("\n") == 1
    assert not (files / "o" / "metrics.json").exists()


def test_open_counts_other_as_wrong_and_the_threshold_acts(files, capsys):
    def scores(*flags):
        code, output = _run(files, capsys, "--limit=2", *flags)
        assert code == 0, output.err
        values = json.loads((files / "o/metrics.json").read_text())
        return values["pixel_accuracy"], values["settings"]

    closed, settings = scores()
    assert closed > 0 and settings["closed"] is True and "threshold" not in settings
    lenient, settings = scores("--open", "--config.codec.threshold=0")
    assert lenient == closed and (settings["closed"], settings["threshold"]) == (False, 0.0)
    strict, settings = scores("--open", "--config.codec.threshold=1")
    assert strict < closed and settings["threshold"] == 1.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"diffusion": {"prediction_type": "zzz"}}', "config.diffusion.prediction_type='zzz'"),
        ('{"sampler": {"eta": NaN}}', "not valid JSON (NaN"),
        ("[]", "holds no JSON object"),
        ("[" * 10_000, "nested too deeply"),
        ('{"seed": ' + "9" * 5000 + "}", "not valid JSON"),
        ("", "an empty file"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer"),
        ("<!DOCTYPE html><title>Sign in</title>", "an HTML page"),
        ('{"sampler": {"depth": 3}, "segdiff_jax_version": "99.1"}', "written by version 99.1"),
        ('{"sampler": {"stepz": 3}}', "did you mean steps?"),
    ],
)
def test_a_stored_config_that_is_none_is_one_line(files, capsys, text, says):
    (files / "w/config.json").write_text(text)
    code, output = _run(files, capsys, config=False)
    assert code == 2 and output.err.count("\n") == 1 and "Traceback" not in output.err
    assert str(files / "w/config.json") in output.err and says in output.err, output.err


def test_a_checkpoint_or_an_output_that_is_none(files, capsys):
    (files / "o").write_text("mine")
    code, output = _run(files, capsys)
    assert code == 2 and f"cannot write {files / 'o'}" in output.err
    assert (files / "o").read_text() == "mine"
    (files / "w" / "config.json").unlink()
    code, output = _run(files, capsys)
    assert code == 2 and "neither a training workdir" in output.err


def test_into_the_workdir_and_beside_its_files(files, capsys):
    before = (files / "w" / "config.json").read_bytes()
    for _ in range(2):
        assert _run(files, capsys, "--ceiling", "--limit=1", "--output", str(files / "w"))[0] == 0
    assert (files / "w" / "config.json").read_bytes() == before


def test_a_name_that_is_no_utf8(files, capsys):
    for folder in ("images", "masks"):
        place = os.fsencode(files / "data" / "val" / folder)
        os.rename(place + b"/p1.png", place + b"/caf\xe9.png")
    code, output = _run(files, capsys, "--ceiling")
    assert code == 0, output.err
    assert "caf\\xe9" in (files / "o" / "index.html").read_text("utf-8")


def _masks(files, values, names="sky\nbuilding\nroad\n"):
    """Three masks of 20×28, of these (id, share) in stripes."""
    (files / "data" / "classes.txt").write_text(names)
    for i in range(3):
        mask = np.concatenate([np.full((20, width), value) for value, width in values], axis=1)
        Image.fromarray(mask.astype(np.uint8)).save(files / "data" / "val" / "masks" / f"p{i}.png")


def _labels(files):
    return json.loads((files / "o" / "metrics.json").read_text())["labels"]


def test_labels_are_summed_up_before_and_exactly_after(files, capsys):
    _masks(files, [(0, 7), (2, 14), (255, 7)], "background\nroad\nsky\nsea\n")
    code, output = _run(files, capsys, "--ceiling", "--limit", "2")
    assert code == 0, output.err
    line = "labels of 'val': 3 of 3 pairs seen, ids 0, 2, 255, 25.0% ignored, no pair shows 'road'"
    assert line in output.err
    assert _labels(files) == {
        "pairs": 2,
        "ids": [0, 2, 255],
        "absent_classes": ["road", "sea"],
        "share_ignored": 0.25,
    }


def test_masks_of_0_and_255_only_are_named_with_the_mend(files, capsys):
    _masks(files, [(0, 20), (255, 8)], "background\ncrack\n")
    code, output = _run(files, capsys, "--ceiling")
    assert code == 0 and "hold only 0 and 255" in output.err and "'crack'" in output.err
    assert _labels(files)["absent_classes"] == ["crack"]
    flags = ("--config.data.mask_values=0,255", "--config.data.ignore_ids=()")
    assert all(flag in output.err for flag in flags), "the mend, as it is to be typed"
    code, output = _run(files, capsys, "--ceiling", *flags)
    assert code == 0 and "hold only" not in output.err and "all classes occur" in output.err
    assert _labels(files)["absent_classes"] == [] and _labels(files)["share_ignored"] == 0


def test_ids_below_the_first_are_ignored(files, capsys):
    """Masks of VOC, 0 for background, with a list that begins with the first object."""
    _masks(files, [(0, 20), (1, 4), (3, 4)])
    code, output = _run(files, capsys, "--ceiling", "--config.data.first_id=1")
    assert code == 0 and "commonest" not in output.err
    assert _labels(files)["ids"] == [0, 1, 3]
    assert _labels(files)["share_ignored"] == pytest.approx(20 / 28)


@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_nothing_but_ignore_is_an_error(files, capsys, command):
    _masks(files, [(255, 28)])
    if command == "evaluate":
        code, output = _run(files, capsys)
    else:
        flags = ["--config", str(files / "config.py"), "--config.data.train_split=val"]
        with pytest.raises(SystemExit) as caught:
            cli.run(train.main, [*flags, "--workdir", str(files / "t")])
        code, output = caught.value.code, capsys.readouterr()
    assert "labels of 'val': 3 of 3 pairs seen, ids 255, 100.0% ignored" in output.err
    assert code == 2 and "every labelled pixel of split 'val' is ignored (ids 255)" in output.err
    assert output.err.count("error:") == 1 and "Traceback" not in output.err


def test_another_view_than_that_of_the_training_is_said(files, capsys):
    code, output = _run(files, capsys, "--ceiling", "--config.data.fit=stretch")
    assert code == 0 and "config.data.fit=stretch, but" in output.err


def _suite(files, capsys, *more):
    flags = ["--suite", "open_vocabulary", "--data", str(files / "sets"), "--rows", "0", *more]
    return _run(files, capsys, *flags, config=False)


def test_suite_scores_what_there_is_and_leaves_the_rest_empty(files, capsys, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr(cli, "load_config", lambda *_: pytest.fail("no file of a checkout is read"))
    rng = np.random.default_rng(0)
    for folder, values in (("images", 256), ("masks", 11)):
        (files / "sets" / "camvid" / "val" / folder).mkdir(parents=True)
        shape = (20, 28, 3) if folder == "images" else (20, 28)
        picture = Image.fromarray(rng.integers(0, values, shape, dtype=np.uint8))
        picture.save(files / "sets" / "camvid" / "val" / folder / "a.png")
    (files / "sets" / "cityscapes").mkdir()
    code, output = _suite(files, capsys)
    assert code == 0, output.err
    result = json.loads((files / "o" / "suite.json").read_text())
    columns, (ours, *published) = result["columns"], result["cells"]
    assert columns[:7] == ["method", *("A-847", "PC-459", "A-150", "PC-59", "PAS-20", "PAS-20b")]
    values = json.loads((files / "o" / "camvid_11" / "metrics.json").read_text())
    row = dict(zip(columns, ours, strict=True))
    assert row["CamVid"] == f"{100 * values['miou_present']:.1f}"
    assert not any(row[name] for name in columns if name not in ("method", "CamVid", "source"))
    assert values["unet_calls"] == 11 and 0 < values["tflop"] < 0.1
    cat_seg = dict(zip(columns, published[5], strict=True))
    assert (cat_seg["A-150"], cat_seg["PAS-20b"], cat_seg["CamVid"]) == ("37.9", "82.5", "")
    assert cat_seg["A-847"] == "16.0", "one decimal, as ours"
    assert all(row[-1].endswith((".md", ".log")) for row in published), "each names its source"
    text = (files / "o" / "suite.md").read_text()
    assert "A-150 has no figure: no folder" in text
    assert "Cityscapes has no figure" in text and "leftImg8bit" in text
    assert text in output.out
    assert not (files / "o" / "camvid_11" / "parts").exists()


def test_a_suite_without_any_of_its_data_is_refused(files, capsys):
    code, output = _suite(files, capsys)
    assert code == 2 and "/sets: has none of the benchmarks' folders (ADE20K_2021" in output.err
    assert not (files / "o").exists()


def test_a_suite_of_several_processes_ends_with_a_bad_file(files, capsys, monkeypatch):
    """The other processes are in the midst of that benchmark: to go on alone would hang all."""
    (files / "sets" / "camvid").mkdir(parents=True)
    assert _suite(files, capsys)[0] == 0, "one process goes on with the other benchmarks"
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "together", contextlib.nullcontext)
    code, output = _suite(files, capsys)
    assert code == 2 and "camvid" in output.err


def test_shares_of_classes_are_those_of_the_masks(data):
    source = open_source(DataConfig(source="folder", root=str(data)), "val", 0)
    shares = survey.report(source, DataConfig(root=str(data)), "val")
    masks = np.stack([np.asarray(Image.open(p)) for p in (data / "val" / "masks").iterdir()])
    sky = (masks == 0).sum() / (masks != 255).sum()
    np.testing.assert_allclose(shares, [sky, 1 - sky, 0], atol=1e-5)


def test_an_adjustment_needs_a_model_that_knows_its_shares(files, capsys):
    adjusted = "--config.codec.logit_adjustment=1.0"
    code, output = _run(files, capsys, adjusted)
    assert code == 2 and "this model does not say how often" in output.err

    classes = vocabulary.load(files / "data" / "classes.txt")
    counted = dataclasses.replace(classes, shares=(0.9, 0.05, 0.05))
    (files / "w" / "classes.json").write_text(vocabulary.to_json(counted))
    code, output = _run(files, capsys, adjusted)
    assert code == 0, output.err
    values = json.loads((files / "o" / "metrics.json").read_text())
    assert values["settings"]["logit_adjustment"] == 1.0


def test_a_training_that_counts_no_labels_refuses_an_adjustment(tmp_path, capsys):
    argv = ["--config", "configs/demo.py", "--workdir", str(tmp_path / "w")]
    with pytest.raises(SystemExit):
        cli.run(train.main, [*argv, "--config.codec.logit_adjustment=1.0"])
    assert "config.data.source='scenes'" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()
