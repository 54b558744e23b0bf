"""The experiments in configs/: each loads, holds together, and is what its name promises."""

import json
import re
from pathlib import Path

import jax
import pytest

from segdiff_jax import cli, codec, config, stages
from segdiff_jax.config import Config
from segdiff_jax.data.sources import scenes
from segdiff_jax.errors import UserError
from segdiff_jax.models import presets
from segdiff_jax.parallel import mesh as meshes
from segdiff_jax.text import vocabulary

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))
each_config = pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)


def _load(name: str) -> Config:
    return cli.load_config(str(ROOT / "configs" / f"{name}.py"), ["--config.data.root=/data"])


@each_config
def test_loads_from_anywhere_survives_json_and_needs_a_root(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = _load(path.stem)
    assert config.from_dict(json.loads(json.dumps(config.to_dict(loaded)))) == loaded
    if loaded.data.source == "scenes":
        assert cli.load_config(str(path)).data.root == ""
    else:
        with pytest.raises(UserError, match=r"--config\.data\.root=FOLDER"):
            cli.load_config(str(path))


@each_config
def test_parts_fit(path):
    c = _load(path.stem)
    assert meshes.make_mesh(c.mesh, jax.devices()[:1]).size == 1
    assert (c.mesh.data, c.mesh.fsdp, c.mesh.tensor).count(-1) == 1, "one device or many"
    architecture = presets.architecture(c.model.preset)
    height, width = c.data.image_size
    factor = architecture.vae.downsampling
    assert height % factor == width % factor == 0
    assert c.optimizer.decay_steps == c.train.steps
    for steps in (c.train.checkpoint_every, c.train.eval_every or 1):
        assert c.train.steps % steps == 0
    if c.data.source == "scenes":
        classes = len(scenes.vocabulary())
    else:
        classes = len(vocabulary.load(c.data.vocabulary or "camvid_11"))
    group = codec.group_size(classes, c.codec.classes_per_pass)
    assert c.sampler.shortlist == 0 or (group == 1 and c.sampler.shortlist < classes)


def test_ade_in_one_step_goes_on_from_ade():
    one, ade = _load("ade_e2e"), _load("ade")
    assert one.stage == "e2e" and one.train.batch_size * one.e2e.classes == ade.train.batch_size
    assert (one.data, one.codec, one.prompts) == (ade.data, ade.codec, ade.prompts)
    assert stages.of_stage(one).sampler == one.sampler
    no_start = ["--config.data.root=/data", "--config.init_from="]
    with pytest.raises(UserError, match="config.init_from"):
        cli.load_config(str(ROOT / "configs" / "ade_e2e.py"), no_start)


@pytest.mark.parametrize("name", ["ade", "coco_stuff", "ade_paper"])
def test_fine_tunes_sd2_as_the_paper_does(name):
    c = _load(name)
    assert re.fullmatch(r"[\w-]+/stable-diffusion-2", c.init_from)
    assert not c.init_from.startswith("stabilityai/")  # taken down
    assert (c.model.preset, c.diffusion.prediction_type) == ("sd2", "v_prediction")
    assert (c.optimizer.learning_rate, c.train.batch_size) == (3e-5, 32)
    assert (c.optimizer.warmup_steps, c.optimizer.final_fraction) == (100, 0.01)
    assert (c.optimizer.clip_norm, c.noise.kind, c.noise.strength) == (1.0, "annealed", 0.9)


def test_ade_paper_differs_from_ade_where_the_paper_does():
    paper, ade = _load("ade_paper"), _load("ade")
    assert (paper.codec.classes_per_pass, paper.codec.context) == (0, "mean")
    sampler = paper.sampler
    assert (sampler.steps, sampler.ensemble, sampler.align) == (50, 10, "none")
    groups = {name for name, value in vars(paper).items() if value != getattr(ade, name)}
    assert groups == {"model", "codec", "diffusion", "train", "sampler"}
