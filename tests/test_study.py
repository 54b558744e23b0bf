"""`python -m segdiff_jax.study`: trains, measures, goes on, and says what it found."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segdiff_jax import cli, config, ownership, study
from segdiff_jax.data import scenes
from segdiff_jax.data.sources.source import open_source
from segdiff_jax.errors import UserError
from segdiff_jax.evaluation import studies, tables, trainings
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.training import run
from segdiff_jax.weights import workdir as workdirs


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr("segdiff_jax.parallel.runtime.start", lambda *_: None)


@pytest.fixture(scope="session")
def config_file(micro_config, tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "micro.py"
    values = json.dumps(_short(micro_config))
    path.write_text(
        "import json\nfrom segdiff_jax.config import from_dict\n"
        f"def get_config():\n    return from_dict(json.loads({values!r}))\n"
    )
    return str(path)


def _short(micro_config):
    values = config.to_dict(micro_config())
    values["train"] |= {"steps": 2, "eval_every": 0}
    values["joint"] |= {"steps": 1}  # as in configs/demo.py: a study leaves it out
    values["sampler"] |= {"decoder": "joint"}
    return values


@pytest.fixture
def finished(trained, micro_config, tmp_path):
    """An --output in which the trainings of the study "start" are done."""
    short = config.from_dict(_short(micro_config))
    for timesteps in ("uniform", "terminal"):
        workdir = tmp_path / "runs" / f"annealed-{timesteps}-seed0"
        shutil.copytree(trained, workdir)
        changes = studies.training(short, {"timesteps": timesteps}).changes
        workdirs.write_config(str(workdir), trainings.changed(short, changes))
    shutil.copytree(f"{trained}/vae", tmp_path / "runs" / "vae-seed0")
    return tmp_path


def test_a_study_measures_goes_on_and_says_what_it_found(
    config_file, finished, monkeypatch, capsys
):
    monkeypatch.setattr(run, "train", lambda *_: pytest.fail("it is trained already"))
    start = studies.STUDIES["start"]
    once = [setting for setting in start.settings if setting["steps"] == 1]
    monkeypatch.setitem(studies.STUDIES, "start", start._replace(settings=once))
    path = finished / "start.json"
    argv = ["start", "--output", str(finished), "--config", config_file, "--limit", "1"]
    study.main(argv)
    result = json.loads(path.read_text())
    measured = result["measurements"]
    assert [m["setting"]["start"] for m in measured] == ["gaussian", "multires"] * 2
    assert {m["setting"]["timesteps"] for m in measured} == {"uniform", "terminal"}
    assert "--output O --config" in result["command"], "no folder of this machine"
    text = (finished / "start.md").read_text()
    assert "Sampling from Gaussian noise is better" in text and text.count("| uniform |") == 1
    assert "| figure | timesteps | steps | start gaussian | start multires |" in text
    assert text in capsys.readouterr().out
    assert "data:image/png" in (finished / "start.html").read_text()
    assert Image.open(finished / "start.png").width > 300

    # A stopped study: what it has measured stays, that of seeds that are not asked for too.
    others = [m | {"seed": 1} for m in measured]
    measured[0] = {**measured[0], "figures": {"miou_present": 0.123}}
    path.write_text(json.dumps(result | {"measurements": others + measured[:-1]}))
    study.main(argv)
    again = json.loads(path.read_text())
    assert again["measurements"] == measured + others
    assert again["cells"][0][3] == "0.123", "a mean of one seed"

    for other, words in (
        ("--config.train.balance=0.7", r"config\.train\.balance=the default, now it is 0\.7"),
        ("--limit=2", "--limit=1, now it is 2"),
    ):
        with pytest.raises(UserError, match=rf"start\.json: was measured with {words}"):
            study.main([*argv, other])
    assert json.loads(path.read_text()) == again
    path.unlink()
    with pytest.raises(UserError, match=r"config\.train\.balance=0\.0, now it is 0\.7"):
        study.main([*argv, "--config.train.balance=0.7"])
    _check_tables(finished, again)


def _check_tables(folder, result):
    document = folder / "results.md"
    document.write_text("a\n<!-- table: start.json -->\nold\n<!-- end of table -->\nb\n")
    earlier = result | {"columns": [], "cells": [], "verdict": "of an earlier version"}
    (folder / "start.json").write_text(json.dumps(earlier))
    study.main(["--tables", str(document)])
    shown = document.read_text()
    assert "old" not in shown and shown.startswith("a\n") and shown.endswith("\nb\n")
    table = tables.section(result).partition("`segdiff study")[0]
    assert table in shown, "made from the measurements"
    study.main(["--tables", str(document)])
    assert document.read_text() == shown


@pytest.mark.slow
def test_a_study_trains_what_it_needs(config_file, tmp_path):
    study.main(["start", "--output", str(tmp_path), "--config", config_file, "--limit", "1"])
    runs = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert runs == ["annealed-terminal-seed0", "annealed-uniform-seed0", "vae-seed0"]
    assert json.loads((tmp_path / "start.json").read_text())["verdict"]


@pytest.mark.slow
def test_members_are_sampled_once(trained, micro_config):
    c = micro_config()
    source = open_source(c.data, "val", 0)
    photo, classes = source[0]["image"], source.vocabulary.classes[:2]
    small, large = (trainings.changed(c, {"sampler.ensemble": n}).sampler for n in (2, 3))
    plain, remembering = Segmenter.load(trained), Segmenter.load(trained)
    remembering.networks.maps = studies.remembering(remembering.networks.maps)
    remembering.unclipped_maps([photo], classes, large, 0)
    found = remembering.unclipped_maps([photo], classes, small, 0)
    expected = plain.unclipped_maps([photo], classes, small, 0)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_agreement():
    same = np.zeros((4, 2, 3), int)
    assert studies.agreement([same, same + 1]) == 1.0
    half = np.stack([np.zeros((2, 2), int), np.ones((2, 2), int)])
    assert studies.agreement([half]) == 0.0
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (5, 6, 7))
    pairs = [(labels[i] == labels[j]).mean() for i in range(5) for j in range(i)]
    assert studies.agreement([labels]) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("joint", [False, True])
def test_every_study_has_settings_of_its_own(micro_config, joint):
    config = micro_config()
    if joint:  # a training of several classes in a map cannot have one
        config.joint.steps, config.sampler.decoder = 1, "joint"
    for name, of_name in studies.STUDIES.items():
        settings = [tuple(setting.items()) for setting in of_name.settings]
        assert len(set(settings)) == len(settings), name
        for setting in of_name.settings:
            assert of_name.axis in setting
            case = studies.case(config, setting)
            studied = trainings.changed(config, case.training.changes, "train")
            trainings.changed(studied, case.changes, "evaluate")


def test_panels(trained, config_file, tmp_path):
    scenes.main(["--output", str(tmp_path / "scenes"), "--count", "4", "--size", "16"])
    argv = ["panels", "--output", str(tmp_path / "o"), "--config", config_file]
    argv += ["--checkpoint", trained, "--rows", "2"]
    study.main([*argv, "--column", f"theirs={tmp_path / 'scenes' / 'masks'}"])
    page = (tmp_path / "o" / "panels.html").read_text()
    for column in ("image", "theirs", "ours", "truth"):
        assert page.count(f"<figcaption>{column}<") == 2
    assert Image.open(tmp_path / "o" / "panels.png").width > 4 * 300
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no val_000000\.png"):
        study.main([*argv, "--column", f"theirs={tmp_path / 'empty'}"])


def test_panels_need_no_config_that_could_be_trained(tmp_path):
    """Those of the benchmarks name data alone. There is no such model, which is asked for next."""
    config = str(Path(__file__).parents[1] / "configs" / "eval" / "camvid_11.py")
    argv = ["panels", "--output", str(tmp_path / "o"), "--config", config, "--checkpoint", "no"]
    root = tmp_path / "camvid"
    for kind in ("images", "masks"):
        (root / "val" / kind).mkdir(parents=True)
        Image.new("L", (8, 8)).save(root / "val" / kind / "a.png")
    with pytest.raises(UserError, match="neither a training workdir"):
        study.main([*argv, f"--config.data.root={root}", "--config.data.val_split=val"])


def test_a_file_that_is_no_result_is_one_line(config_file, tmp_path):
    (tmp_path / "noise.json").write_text("[]")
    argv = ["noise", "--output", str(tmp_path), "--config", config_file]
    with pytest.raises(UserError, match=r"noise\.json: would be replaced"):
        study.main(argv)
    marker = {"files": {"study": ["noise.json"]}}
    (tmp_path / ownership.MARKER).write_text(json.dumps(marker))
    with pytest.raises(UserError, match=r"noise\.json: holds no JSON object: remove it"):
        study.main(argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["noise"], "--output"),
        (["noise", "--output", "gs://bucket/o"], "studies train on a local disk"),
        (["--output", "o"], "name a study"),
        (["sleep", "--output", "o"], "invalid choice"),
        (["panels", "--output", "o"], "--checkpoint"),
        (["panels", "--output", "o", "--checkpoint", "w", "--column", "x"], "NAME=FOLDER"),
        (["--tables", "nowhere.md"], "no such file"),
    ],
)
def test_bad_arguments(argv, words, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run(study.main, argv)
    assert caught.value.code == 2 and words in capsys.readouterr().err
