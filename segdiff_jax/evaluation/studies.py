"""The experiments of the paper's supplement: what each trains and measures, what is claimed.

study ─► settings × seeds   the rows of its table
      ─► case               a training, which all studies share (`trainings`), and how it samples
      ─► measure            its figures
      ─► findings           table, plot, verdict
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from segdiff_jax.config import Config
from segdiff_jax.data.sources.source import open_source
from segdiff_jax.evaluation.evaluator import evaluate
from segdiff_jax.evaluation.findings import NAMES, Claim, Elbow, Setting
from segdiff_jax.evaluation.plan import Plan
from segdiff_jax.evaluation.trainings import Training, changed
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.progress import reporter
from segdiff_jax.weights import loading
from segdiff_jax.weights import workdir as workdirs

TERMINAL_SHARE = 0.9  # of "terminal" timesteps, where the config has only uniform ones
NOISES = 10  # initial noises whose predictions are held against each other

_GROUP, _HARD = "classes per pass", "hard negatives, %"  # keys of settings
_SAMPLING = {  # the keys of the config that words of a setting stand for
    "steps": "sampler.steps",
    "spacing": "diffusion.timestep_spacing",
    "members": "sampler.ensemble",
    "reduce": "sampler.reduce",
    "align": "sampler.align",
    "start": "sampler.initial_noise",
}


class Case(NamedTuple):
    """A row of a study's table: a training, and what is changed for sampling from it."""

    setting: Setting
    training: Training
    changes: Mapping[str, Any]
    noises: int  # the figures are means over so many
    ceiling: bool  # also the figure of a perfect UNet


class Study(NamedTuple):
    about: str
    axis: str  # of plot and table: a key of the settings
    figures: tuple[str, ...]  # of the table: those of the plot first, then those of the claims
    plotted: int
    settings: Sequence[Setting]
    claims: Sequence[Claim | Elbow]


def case(config: Config, setting: Setting) -> Case:
    """Return what a setting trains, and how it is sampled from."""
    long = "members" in setting and setting["timesteps"] == "uniform"
    changes: dict[str, Any] = {"sampler.steps": 10 if long else 1}
    changes |= {key: setting[word] for word, key in _SAMPLING.items() if word in setting}
    noises = NOISES if "noise" in setting else 1
    ceiling = "context" in setting and setting["steps"] == 1
    return Case(setting, training(config, setting), changes, noises, ceiling)


def training(config: Config, setting: Setting) -> Training:
    """Name the training of a setting, and say what it changes.

    Its timesteps are "uniform", as in the paper, or "terminal": a share of them is the last one.
    """
    kind, timesteps = setting.get("noise", "annealed"), setting["timesteps"]
    share = 0.0 if timesteps == "uniform" else config.train.terminal_share or TERMINAL_SHARE
    name = f"{kind}-{timesteps}"
    changes: dict[str, Any] = {"noise.kind": kind, "train.terminal_share": share}
    changes |= {"sampler.shortlist": 0}  # several classes a pass can have none
    if config.sampler.decoder == "joint":  # what the UNet gets wrong would be mended by the photo
        changes |= {"joint.steps": 0, "sampler.decoder": "vae"}
    own = config.codec.classes_per_pass, config.codec.context
    asked, context = setting.get(_GROUP, own[0]), setting.get("context", own[1])
    group = 0 if asked == "all" else int(asked)
    if (group, context) != own:
        name += f"-g{asked}-{context}"
        changes |= {"codec.classes_per_pass": group, "codec.context": context}
        changes |= {"data.cache_latents": False} if group > 1 else {}
        changes |= {} if group else {"train.balance": 0.0}
    hard = int(setting.get(_HARD, -1)) / 100
    if hard >= 0 and hard != config.train.hard_negatives:
        name += f"-hard{hard:g}"
        changes |= {"train.hard_negatives": hard}
    return Training(name, changes)


def _every(**values: Sequence[str | int]) -> list[Setting]:
    """Return the settings in which each key has one of its values."""
    return [dict(zip(values, found, strict=True)) for found in itertools.product(*values.values())]


_MIOU, _TIMESTEPS = "miou_present", ("uniform", "terminal")
STUDIES = {
    "noise": Study(
        "the noise of the training",
        axis="noise",
        figures=(_MIOU, "agreement"),
        plotted=2,
        settings=_every(
            noise=("gaussian", "multires", "annealed"), timesteps=_TIMESTEPS, steps=(1, 10)
        ),
        claims=[
            Claim(f"{text} ({name})", figure, "noise", better, worse)
            for figure, name in ((_MIOU, "mIoU"), ("agreement", "agreement of initial noises"))
            for text, better, worse in (
                ("Multi-resolution noise trains better than Gaussian", "multires", "gaussian"),
                ("Annealing it is better still", "annealed", "multires"),
            )
        ],
    ),
    "steps": Study(
        "denoising steps",
        axis="steps",
        figures=(_MIOU,),
        plotted=1,
        settings=_every(
            timesteps=_TIMESTEPS, spacing=("trailing", "leading"), steps=(1, 2, 4, 10, 25, 50)
        ),
        claims=[
            Elbow("More steps are better, with little to gain from 10 on", _MIOU, "steps", 10),
            Claim(
                "Trailing timesteps are better than leading",
                *(_MIOU, "spacing", "trailing", "leading", {"steps": 1}),
            ),
        ],
    ),
    "ensemble": Study(
        "members of an ensemble",
        axis="members",
        figures=(_MIOU, "error_auroc"),
        plotted=1,
        settings=[
            {**ways, "members": members}
            for ways in _every(
                timesteps=_TIMESTEPS, reduce=("median", "mean"), align=("none", "affine")
            )
            for members in (1, 2, 5, 10, 20)
            # Of one, nothing is merged.
            if members > 1 or (ways["reduce"], ways["align"]) == ("median", "none")
        ],
        claims=[
            Elbow("More members are better, with little to gain from 10 on", _MIOU, "members", 10),
            Claim(
                "The median is better than the mean",
                *(_MIOU, "reduce", "median", "mean", {"members": 2}),
            ),
            Claim("Aligning members by scale and shift helps", _MIOU, "align", "affine", "none"),
            Claim(
                "Aligned members' uncertainty predicts errors better",
                *("error_auroc", "align", "affine", "none"),
            ),
        ],
    ),
    "start": Study(
        "the initial noise of sampling",
        axis="start",
        figures=(_MIOU,),
        plotted=1,
        settings=_every(timesteps=_TIMESTEPS, steps=(1, 10), start=("gaussian", "multires")),
        claims=[
            Claim(
                "Sampling from Gaussian noise is better than from multi-resolution noise",
                *(_MIOU, "start", "gaussian", "multires"),
            ),
        ],
    ),
    "codec": Study(
        "classes in a gray image",
        axis=_GROUP,
        figures=(_MIOU, "miou_novel", "miou_ceiling"),
        plotted=1,
        settings=[
            {_GROUP: group, "context": context, **rest}
            # A mean of four prompts in random order does not say which level is whose.
            for group, context in (
                *((1, "mean"), (1, "bound"), (4, "bound")),
                *(("all", "mean"), ("all", "bound")),
            )
            for rest in _every(timesteps=_TIMESTEPS, steps=(1, 10))
        ],
        claims=[
            Claim("One class a pass is better than all in one image", _MIOU, _GROUP, 1, "all"),
            Claim("So it is on classes that were never trained", "miou_novel", _GROUP, 1, "all"),
            Claim(
                "Tokens bound to their levels are better than the mean of the prompts",
                *(_MIOU, "context", "bound", "mean"),
            ),
            Claim("Ten steps are better than one", _MIOU, "steps", 10, 1),
        ],
    ),
    "negatives": Study(
        "absent classes that are like the present ones, among the classes asked in training",
        axis=_HARD,
        figures=(_MIOU, "presence_auroc", "false_alarms"),
        plotted=1,
        settings=[
            {**rest, _HARD: share} for rest in _every(timesteps=_TIMESTEPS) for share in (0, 50)
        ],
        claims=[
            Claim("They raise mIoU", _MIOU, _HARD, 50, 0),
            Claim("They tell better which classes an image has", "presence_auroc", _HARD, 50, 0),
            Claim("Without them there are more false alarms", "false_alarms", _HARD, 0, 50),
        ],
    ),
}


def remembering(maps: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Let `Networks.maps` sample each member of each map once, in however many ensembles.

    The 17 ensembles of a training then take 20 samples of a map in place of 149.
    """
    known: dict[tuple[Any, ...], np.ndarray] = {}

    def remembered(latents, contexts, jobs, sampler, seed, done=None) -> np.ndarray:
        used = sampler.steps, sampler.eta, sampler.initial_noise, sampler.decoder, seed
        texts = {int(p): contexts(np.array([p]))[0].tobytes() for p in np.unique(jobs[:, 1])}
        keys = [(latents[i].tobytes(), texts[int(p)], int(m), *used) for i, p, m in jobs]
        new = [n for n, key in enumerate(keys) if key not in known]
        if new:
            found = maps(latents, contexts, jobs[new], sampler, seed, done)
            known.update({keys[n]: one for n, one in zip(new, found, strict=True)})
        return np.stack([known[key] for key in keys])

    return remembered


@functools.lru_cache(maxsize=1)  # the cases of a training follow one another
def _model(workdir: str, spacing: str, merged: bool) -> Segmenter:
    networks, decoders, _ = loading.load_networks(workdir)
    config = changed(networks[-1], {"diffusion.timestep_spacing": spacing}, "model")
    model = Segmenter(*networks[:-1], config, trained=workdirs.read_classes(workdir))
    model.networks.add_decoders(decoders)
    if merged:
        model.networks.maps = remembering(model.networks.maps)  # type: ignore[method-assign]
    return model


def measure(case: Case, config: Config, workdir: str, limit: int | None) -> dict[str, Any]:
    """Return the figures of a case on the validation data of `config`."""
    changes = {**case.training.changes, "sampler.ensemble": 1, **case.changes}
    asked = changed(config, changes, "evaluate")
    source = open_source(config.data, config.data.val_split, config.seed)
    merged = "sampler.ensemble" in case.changes  # all members of all images are then in memory
    model = _model(workdir, asked.diffusion.timestep_spacing, merged)
    count = len(source) if limit is None else min(limit, len(source))
    shown = count if case.noises > 1 else 0
    label = ", ".join(f"{k} {v}" for k, v in case.setting.items())
    results = [
        evaluate(Plan(model, source, limit, noise, asked.sampler, shown), reporter(label))
        for noise in range(case.noises)
    ]
    figures = {
        name: float(np.mean([result.summary[name] for result in results]))
        for name in NAMES
        if isinstance(results[0].summary.get(name), float)
    }
    if case.noises > 1:
        every = [np.stack([r.examples[i].prediction for r in results]) for i in range(count)]
        figures["agreement"] = agreement(every)
    if case.ceiling:
        perfect = evaluate(Plan(model, source, limit, sampler=asked.sampler, ceiling=True))
        figures["miou_ceiling"] = perfect.summary["miou_present"]
    return figures


def agreement(predictions: Sequence[np.ndarray]) -> float:
    """Return the chance that two of n predictions give a pixel the same label.

    predictions: for each image labels [n, H, W].
    """
    same = total = 0
    for labels in predictions:
        n = len(labels)
        for label in np.unique(labels):
            votes = (labels == label).sum(0, dtype=np.int64)
            same += int((votes * (votes - 1)).sum())
        total += n * (n - 1) * labels[0].size
    return same / total
