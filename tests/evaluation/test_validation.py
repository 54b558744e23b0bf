"""Validation while training: the evaluator's figures, for the right parameters."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from written import read_events, read_scalars

from segdiff_jax.config import MeshConfig, OptimizerConfig
from segdiff_jax.data.sources.source import open_source
from segdiff_jax.errors import UserError
from segdiff_jax.evaluation.evaluator import evaluate
from segdiff_jax.evaluation.plan import Plan
from segdiff_jax.evaluation.validation import validator_of
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.parallel import mesh
from segdiff_jax.training.step import init_state
from segdiff_jax.weights.pretrained import Pretrained


class Recorder:
    def __init__(self):
        self.values, self.pictures = {}, {}

    def scalars(self, step, values):
        self.values |= {(step, name): value for name, value in values.items()}

    def images(self, step, name, images):
        self.pictures[step, name] = images


@pytest.fixture(scope="module")
def config(tiny_config):
    config = tiny_config()
    config.data.scenes.val_examples = 5
    config.train.eval_examples = 3
    config.sampler.batch_size = 25
    config.prompts.templates = ("{class}",)  # longer ones, cut, would be the same for two classes
    return config


@pytest.fixture(scope="module")
def networks(tiny_networks):
    """As training has them: of the UNet only shapes."""
    unet, *rest = tiny_networks
    graph, params = nnx.split(unet)
    shapes = nnx.merge(graph, jax.eval_shape(lambda: params))
    return Pretrained(shapes, *rest, None)


def validator(networks, config):
    classes = open_source(config.data, config.data.val_split, config.seed).vocabulary
    return validator_of(networks, config, mesh.make_mesh(MeshConfig()), classes)


@pytest.fixture(scope="module")
def other_params(tiny_networks):
    return jax.tree.map(lambda x: x + 0.05, nnx.state(tiny_networks[0]))


@pytest.fixture(scope="module")
def judged(networks, config, tiny_networks, other_params):
    """(figures, what was written at step 7) for some parameters, for others, for their average."""
    state = init_state(nnx.state(tiny_networks[0]), config)._replace(ema=other_params)
    averaging = type(config)(**vars(config) | {"optimizer": OptimizerConfig(ema_decay=0.9)})
    found = {}
    for name, settings, shown in (
        ("some", config, state),
        ("others", config, init_state(other_params, config)),
        ("average", averaging, state),
    ):
        recorder = Recorder()
        found[name] = validator(networks, settings)(7, shown, recorder), recorder
    return found


def test_figures_are_the_evaluators_for_the_parameters_that_count(
    judged, tiny_networks, config, other_params
):
    source = open_source(config.data, config.data.val_split, config.seed)
    limit, seed = config.train.eval_examples, config.seed
    unet, *rest = tiny_networks
    model = Segmenter(nnx.merge(nnx.graphdef(unet), other_params), *rest, config)
    expected = evaluate(Plan(model, source, limit=limit, seed=seed)).summary
    found, recorder = judged["others"]
    for name in ("miou_present", "miou_union", "pixel_accuracy", "mean_accuracy"):
        assert found[name] == expected[name] == recorder.values[7, f"validation/{name}"]
    json.dumps(found, allow_nan=False)  # goes into the checkpoint
    assert found != judged["some"][0]
    assert found == judged["average"][0]


def test_pictures_show_photo_truth_and_prediction(judged, config):
    pictures = judged["others"][1].pictures
    assert sorted(pictures) == [(7, f"validation/{i}") for i in range(3)]
    source = open_source(config.data, config.data.val_split, config.seed)
    photo, truth, prediction = pictures[7, "validation/0"]
    assert (photo == source[0]["image"]).all() and photo.dtype == np.uint8
    assert np.abs(truth.astype(int) - photo).max() > 20
    assert np.abs(truth.astype(int) - prediction).max() > 20


def test_a_missing_validation_split_is_found_before_training(networks, config, tmp_path):
    data = type(config.data)(source="folder", root=str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        wrong = type(config)(**vars(config) | {"data": data})
        validator_of(networks, wrong, mesh.make_mesh(MeshConfig()), None)


def test_training_writes_curves_and_pictures_and_names_the_best_checkpoint(trained):
    scalars = read_scalars(Path(trained))
    score = scalars["validation/miou_present"]
    assert list(score) == [6] and 0 <= score[6] <= 1
    tags = {v.tag for event in read_events(Path(trained)) for v in event.summary.value}
    assert {"validation/0", "validation/1", "diffusion/loss", "diffusion/learning_rate"} <= tags
    saved = json.loads((Path(trained) / "checkpoints/6/metrics/metrics").read_text())
    assert saved["miou_present"] == pytest.approx(score[6])
