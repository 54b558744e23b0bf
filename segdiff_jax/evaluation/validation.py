"""Validation while training: figures for TensorBoard and the best checkpoint, and pictures."""

import dataclasses
import logging
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from PIL import Image

from segdiff_jax.config import Config
from segdiff_jax.data.sources.source import open_source
from segdiff_jax.evaluation.evaluator import Example, evaluate
from segdiff_jax.evaluation.plan import Plan
from segdiff_jax.inference import pictures
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.text.vocabulary import Vocabulary
from segdiff_jax.training.loop import Validate
from segdiff_jax.training.step import TrainState
from segdiff_jax.training.telemetry import Telemetry
from segdiff_jax.weights.pretrained import Pretrained

log = logging.getLogger(__name__)

_SHOWN = 4  # images to look at
_LONGEST_SIDE = 512  # of their pictures, in pixels


def validator_of(networks: Pretrained, config: Config, mesh: Mesh, classes: Vocabulary) -> Validate:
    """Return `validate(step, state, telemetry)`, on train.eval_examples images of the split.

    It writes "validation/<figure>" scalars and "validation/<i>" images (photo, truth, prediction
    side by side) and returns the figures of `metrics.summarize` that are numbers. The UNet of
    `networks` lends its structure only: the parameters are those of the state, gathered to every
    device: the moving average if there is one. All processes evaluate together and find the same
    figures. Sampling noise is that of config.seed each time, so that figures can be compared.

    Raises `UserError` if the validation split cannot be opened, before any training.
    """
    graph: Any = nnx.graphdef(networks.unet)
    vae, text, tokenizer = networks.vae, networks.text_encoder, networks.tokenizer
    assert vae is not None and text is not None and tokenizer is not None
    # Other decoders come when the training ends; whole maps are judged as the UNet means them.
    judged = dataclasses.replace(
        config,
        sampler=dataclasses.replace(config.sampler, decoder="vae", tiles=0),
        codec=dataclasses.replace(config.codec, logit_adjustment=0.0),
    )
    source = open_source(config.data, config.data.val_split, config.seed)
    palette = source.vocabulary.palette()

    def validate(step: int, state: TrainState, telemetry: Telemetry) -> dict[str, float]:
        params = state.ema if config.optimizer.ema_decay else state.params
        unet = nnx.merge(graph, params)
        model = Segmenter(unet, vae, text, tokenizer, judged, mesh, classes)
        limit, seed = config.train.eval_examples, config.seed
        result = evaluate(Plan(model, source, limit, seed, examples=_SHOWN))
        figures = {k: v for k, v in result.summary.items() if isinstance(v, float)}
        telemetry.scalars(step, {f"validation/{name}": v for name, v in figures.items()})
        scored = (figures.get(name, float("nan")) for name in ("miou_present", "pixel_accuracy"))
        log.info("step %d: validation mIoU %.3f, pixel accuracy %.3f", step, *scored)
        for index, example in enumerate(result.examples):
            telemetry.images(step, f"validation/{index}", _side_by_side(example, palette))
        return figures

    return validate


def _side_by_side(example: Example, palette: np.ndarray) -> np.ndarray:
    """Draw photo, truth and prediction: uint8 [3, H, W, 3]."""
    shown = [Image.fromarray(example.image)]
    for labels in (example.labels, example.prediction):
        shown.append(pictures.overlay(example.image, labels, palette))
    for picture in shown:
        picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    return np.stack([np.asarray(picture) for picture in shown])
