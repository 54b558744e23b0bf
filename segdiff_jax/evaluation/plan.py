"""What an evaluation is of, and what is said of it beside its counts."""

import dataclasses
from typing import Any, NamedTuple

from segdiff_jax.config import CodecConfig, SamplerConfig
from segdiff_jax.data import survey
from segdiff_jax.data.sources.source import Source
from segdiff_jax.evaluation import metrics
from segdiff_jax.evaluation.asked import Asked
from segdiff_jax.evaluation.parts import Part
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.parallel import processes


class Plan(NamedTuple):
    """What is evaluated, and how. An image goes by its place among those chosen."""

    segmenter: Segmenter
    source: Source
    images: list[int]  # of those chosen, their indices in the source
    shown: list[int]  # images to keep for a report
    at_once: int  # images in a chunk
    asked: Asked
    synonyms: str  # "mean", "max" or "first"
    sampler: SamplerConfig
    seed: int
    decoding: CodecConfig
    ceiling: bool
    predictions: str  # folder for them; "" = they are not kept

    @property
    def in_tiles(self) -> bool:
        return self.sampler.tiles > 1

    def owner(self, image: int) -> int:
        """Return the process that reads and scores an image; process 0 has all that is shown."""
        return 0 if image in self.shown else image % processes.count()


def summary(plan: Plan, counted: Part) -> dict[str, Any]:
    """Return what metrics.json says: figures, number of images, settings, labels."""
    source, total = plan.source, len(plan.images)
    names, novel = source.vocabulary.names, tuple(source.novel)
    trained = tuple(i for i in range(len(names)) if i not in set(novel))
    split = (trained, novel) if novel else (None, None)
    figures = metrics.summarize(counted.sums.confusion, names, *split)
    figures |= metrics.summarize_rest(counted.sums, names)
    if reasons := metrics.undefined(figures, plan.sampler.ensemble > 1):
        figures["undefined"] = reasons
    said = settings(plan) | {"closed": plan.decoding.closed}
    if plan.asked.vocabulary is not source.vocabulary:
        said |= {"classes_asked": len(plan.asked.vocabulary), "synonyms": plan.synonyms}
    if not plan.decoding.closed:
        said["threshold"] = plan.decoding.threshold
    labels = survey.figures(source, counted.ids, total)
    return figures | {"images": total, "settings": said, "labels": labels}


def settings(plan: Plan) -> dict[str, Any]:
    """Return what the figures depend on, beside the model and the data."""
    config = plan.segmenter.config
    return dataclasses.asdict(plan.sampler) | {
        "seed": plan.seed,
        "classes_per_pass": config.codec.classes_per_pass,
        "context": config.codec.context,
        "logit_adjustment": config.codec.logit_adjustment,
        "templates": list(config.prompts.templates),
        "image_size": list(config.data.image_size),
        "fit": config.data.fit,
        "shortest": config.data.shortest,
        "ceiling": plan.ceiling,
    }
