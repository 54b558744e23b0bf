"""The experiments of the paper's supplement: what each trains and measures, what is claimed.

study ─► trainings × seeds   workdirs that all studies share: `trainings`
      ─► cases               a training, and what is changed for sampling → figures
      ─► findings            table, plot, verdict
"""

import functools
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


class Case(NamedTuple):
    """A row of a study's table: a training, and how it is sampled from."""

    setting: Setting
    training: Training
    changes: Mapping[str, Any]
    noises: int = 1  # the figures are means over so many
    ceiling: bool = False  # also the figure of a perfect UNet


class Study(NamedTuple):
    about: str
    cases: Callable[[Config], list[Case]]
    axis: str  # of plot and table: a key of the settings
    figures: tuple[str, ...]  # of the table: those of the plot first, then those of the claims
    plotted: int
    claims: tuple[Claim | Elbow, ...]


def training(
    config: Config, timesteps: str, kind: str = "annealed", group: int = -1, context: str = "mean"
) -> Training:
    """Name a training and what it changes.

    timesteps: "uniform", as in the paper, or "terminal": a share of them is the last one.
    """
    share = {"uniform": 0.0, "terminal": config.train.terminal_share or TERMINAL_SHARE}[timesteps]
    changes: dict[str, Any] = {"noise.kind": kind, "train.terminal_share": share}
    changes |= {"sampler.shortlist": 0}  # several classes a pass can have none
    if config.sampler.decoder == "joint":  # what the UNet gets wrong would be mended by the photo
        changes |= {"joint.steps": 0, "sampler.decoder": "vae"}
    name = f"{kind}-{timesteps}"
    if group >= 0 and (group, context) != (config.codec.classes_per_pass, config.codec.context):
        name += f"-g{group or 'all'}-{context}"
        changes |= {"codec.classes_per_pass": group, "codec.context": context}
        changes |= {"data.cache_latents": False} if group > 1 else {}
        changes |= {} if group else {"train.balance": 0.0}
    return Training(name, changes)


_TIMESTEPS = ("uniform", "terminal")


def _noise(config: Config) -> list[Case]:
    return [
        Case(
            {"noise": kind, "timesteps": timesteps, "steps": steps},
            training(config, timesteps, kind),
            {"sampler.steps": steps},
            noises=NOISES,
        )
        for kind in ("gaussian", "multires", "annealed")
        for timesteps in _TIMESTEPS
        for steps in (1, 10)
    ]


def _steps(config: Config) -> list[Case]:
    return [
        Case(
            {"timesteps": timesteps, "spacing": spacing, "steps": steps},
            training(config, timesteps),
            {"sampler.steps": steps, "diffusion.timestep_spacing": spacing},
        )
        for timesteps in _TIMESTEPS
        for spacing in ("trailing", "leading")
        for steps in (1, 2, 4, 10, 25, 50)
    ]


def _ensemble(config: Config) -> list[Case]:
    return [
        Case(
            {"timesteps": timesteps, "reduce": reduce, "align": align, "members": members},
            training(config, timesteps),
            {
                "sampler.steps": 10 if timesteps == "uniform" else 1,
                "sampler.ensemble": members,
                "sampler.reduce": reduce,
                "sampler.align": align,
            },
        )
        for timesteps in _TIMESTEPS
        for reduce in ("median", "mean")
        for align in ("none", "affine")
        for members in (1, 2, 5, 10, 20)
        if members > 1 or (reduce, align) == ("median", "none")  # of one, nothing is merged
    ]


def _start(config: Config) -> list[Case]:
    return [
        Case(
            {"timesteps": timesteps, "steps": steps, "start": start},
            training(config, timesteps),
            {"sampler.steps": steps, "sampler.initial_noise": start},
        )
        for timesteps in _TIMESTEPS
        for steps in (1, 10)
        for start in ("gaussian", "multires")
    ]


def _codec(config: Config) -> list[Case]:
    return [
        Case(
            {"classes per pass": group or "all", "context": context, "timesteps": timesteps}
            | {"steps": steps},
            training(config, timesteps, group=group, context=context),
            {"sampler.steps": steps},
            ceiling=steps == 1,
        )
        # A mean of four prompts in random order does not say which level is whose.
        for group, context in ((1, "mean"), (1, "bound"), (4, "bound"), (0, "mean"), (0, "bound"))
        for timesteps in _TIMESTEPS
        for steps in (1, 10)
    ]


def _negatives(config: Config) -> list[Case]:
    return [
        Case(
            {"hard negatives, %": percent, "timesteps": timesteps},
            _with_negatives(config, training(config, timesteps), percent / 100),
            {"sampler.steps": 1},
        )
        for timesteps in _TIMESTEPS
        for percent in (0, 50)
    ]


def _with_negatives(config: Config, plain: Training, share: float) -> Training:
    if share == config.train.hard_negatives:
        return plain
    changes = {**plain.changes, "train.hard_negatives": share}
    return Training(f"{plain.name}-hard{share:g}", changes)


_BETTER_NOISE = tuple(
    Claim(f"{text} ({name})", figure, {"noise": better}, {"noise": worse})
    for figure, name in (("miou_present", "mIoU"), ("agreement", "agreement of initial noises"))
    for text, better, worse in (
        ("Multi-resolution noise trains better than Gaussian", "multires", "gaussian"),
        ("Annealing it is better still", "annealed", "multires"),
    )
)
_MIOU = "miou_present"
STUDIES = {
    "noise": Study(
        "the noise of the training",
        *(_noise, "noise", (_MIOU, "agreement"), 2, _BETTER_NOISE),
    ),
    "steps": Study(
        "denoising steps",
        *(_steps, "steps", (_MIOU,), 1),
        (
            Elbow("More steps are better, with little to gain from 10 on", _MIOU, "steps", 10),
            Claim(
                "Trailing timesteps are better than leading",
                *(_MIOU, {"spacing": "trailing"}, {"spacing": "leading"}, {"steps": 1}),
            ),
        ),
    ),
    "ensemble": Study(
        "members of an ensemble",
        *(_ensemble, "members", (_MIOU, "error_auroc"), 1),
        (
            Elbow("More members are better, with little to gain from 10 on", _MIOU, "members", 10),
            Claim(
                "The median is better than the mean",
                *(_MIOU, {"reduce": "median"}, {"reduce": "mean"}, {"members": 2}),
            ),
            Claim(
                "Aligning members by scale and shift helps",
                *(_MIOU, {"align": "affine"}, {"align": "none"}),
            ),
            Claim(
                "Aligned members' uncertainty predicts errors better",
                *("error_auroc", {"align": "affine"}, {"align": "none"}),
            ),
        ),
    ),
    "start": Study(
        "the initial noise of sampling",
        *(_start, "start", (_MIOU,), 1),
        (
            Claim(
                "Sampling from Gaussian noise is better than from multi-resolution noise",
                *(_MIOU, {"start": "gaussian"}, {"start": "multires"}),
            ),
        ),
    ),
    "codec": Study(
        "classes in a gray image",
        *(_codec, "classes per pass", (_MIOU, "miou_novel", "miou_ceiling"), 1),
        (
            Claim(
                "One class a pass is better than all in one image",
                *(_MIOU, {"classes per pass": 1}, {"classes per pass": "all"}),
            ),
            Claim(
                "So it is on classes that were never trained",
                *("miou_novel", {"classes per pass": 1}, {"classes per pass": "all"}),
            ),
            Claim(
                "Tokens bound to their levels are better than the mean of the prompts",
                *(_MIOU, {"context": "bound"}, {"context": "mean"}),
            ),
            Claim("Ten steps are better than one", _MIOU, {"steps": 10}, {"steps": 1}),
        ),
    ),
    "negatives": Study(
        "absent classes that are like the present ones, among the classes asked in training",
        *(_negatives, "hard negatives, %"),
        *((_MIOU, "presence_auroc", "false_alarms"), 1),
        tuple(
            Claim(text, figure, {"hard negatives, %": better}, {"hard negatives, %": 50 - better})
            for text, figure, better in (
                ("They raise mIoU", _MIOU, 50),
                ("They tell better which classes an image has", "presence_auroc", 50),
                ("Without them there are more false alarms", "false_alarms", 0),
            )
        ),
    ),
}


def _remembering(maps: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
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
def _model(workdir: str, spacing: str, remembering: bool) -> Segmenter:
    networks, decoders, _ = loading.load_networks(workdir)
    config = changed(networks[-1], {"diffusion.timestep_spacing": spacing}, "model")
    model = Segmenter(*networks[:-1], config, trained=workdirs.read_classes(workdir))
    model.networks.add_decoders(decoders)
    if remembering:
        model.networks.maps = _remembering(model.networks.maps)  # type: ignore[method-assign]
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
