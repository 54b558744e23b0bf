"""What an evaluation is of, and what is said of it beside its counts."""

import dataclasses
import functools
from typing import Any

from segdiff_jax import codec
from segdiff_jax.config import CodecConfig, SamplerConfig
from segdiff_jax.data import survey
from segdiff_jax.data.sources.source import Source, evenly
from segdiff_jax.evaluation import asked as asking
from segdiff_jax.evaluation import metrics
from segdiff_jax.evaluation.parts import Part
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.parallel import processes


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is evaluated, and how. An image goes by its place among those chosen.

    The vocabulary is closed whatever `config.codec.closed` says, unless `open_vocabulary`: every
    annotated pixel has a class, so *other* can only be wrong. `ceiling` takes the ground truth
    through codec and VAE and back, in place of a prediction: what a perfect UNet would score.
    """

    segmenter: Segmenter
    source: Source
    limit: int | None = None  # images, evenly spread: neighbours are often of one video; None = all
    seed: int = 0  # of the sampling noise
    sampler: SamplerConfig | None = None  # in place of segmenter.config.sampler
    examples: int = 0  # images to keep for a report, spread evenly
    ceiling: bool = False
    open_vocabulary: bool = False  # below `config.codec.threshold` pixels are *other*, and wrong
    synonyms: str = "mean"  # or "max" or "first", see `asked.of`
    predictions: str = ""  # a folder that gets <name>.png, the class ids of each image

    @functools.cached_property
    def images(self) -> list[int]:
        """Indices in the source of the images that are chosen."""
        length = len(self.source)
        return evenly(length if self.limit is None else min(self.limit, length), length)

    @functools.cached_property
    def shown(self) -> list[int]:
        return evenly(min(self.examples, len(self.images)), len(self.images))

    @functools.cached_property
    def asked(self) -> asking.Asked:
        return asking.of(self.source, "mean" if self.ceiling else self.synonyms)

    @functools.cached_property
    def sampling(self) -> SamplerConfig:
        sampler = self.sampler or self.segmenter.config.sampler
        if not self.ceiling:
            return sampler
        return dataclasses.replace(sampler, ensemble=1, shortlist=0, tiles=0)

    @functools.cached_property
    def decoding(self) -> CodecConfig:
        return dataclasses.replace(self.segmenter.config.codec, closed=not self.open_vocabulary)

    @functools.cached_property
    def at_once(self) -> int:
        """How many images fill one compiled call of the UNet, at least one.

        Memory: the host holds the maps of one image, or of at most `sampler.batch_size` passes.
        """
        if self.in_tiles:
            return 1
        sampler, classes = self.sampling, len(self.asked.vocabulary)
        group = codec.group_size(classes, self.segmenter.config.codec.classes_per_pass)
        passes = codec.num_groups(classes, group)
        in_full = min(sampler.shortlist, passes) or passes  # passes that get the whole budget
        fitting = sampler.batch_size // max(passes, in_full * sampler.ensemble)
        return min(len(self.images), max(1, fitting))

    @property
    def in_tiles(self) -> bool:
        return self.sampling.tiles > 1

    def owner(self, image: int) -> int:
        """Return the process that reads and scores an image; process 0 has all that is shown."""
        return 0 if image in self.shown else image % processes.count()


def summary(plan: Plan, counted: Part) -> dict[str, Any]:
    """Return what metrics.json says: figures, number of images, settings, labels."""
    source, total, names = plan.source, len(plan.images), plan.source.vocabulary.names
    figures = metrics.summarize(counted.sums.confusion, names, source.novel)
    figures |= metrics.summarize_rest(counted.sums, names)
    if reasons := metrics.undefined(figures, plan.sampling.ensemble > 1):
        figures["undefined"] = reasons
    said = settings(plan) | {"closed": plan.decoding.closed}
    if plan.asked.vocabulary is not source.vocabulary:
        said |= {"classes_asked": len(plan.asked.vocabulary), "synonyms": plan.asked.synonyms}
    if not plan.decoding.closed:
        said["threshold"] = plan.decoding.threshold
    labels = survey.figures(source, counted.ids, total)
    return figures | {"images": total, "settings": said, "labels": labels}


def settings(plan: Plan) -> dict[str, Any]:
    """Return what the figures depend on, beside the model and the data."""
    config = plan.segmenter.config
    return dataclasses.asdict(plan.sampling) | {
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
