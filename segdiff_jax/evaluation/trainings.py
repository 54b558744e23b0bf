"""The trainings of studies: workdirs that all share, found again, gone on with, or trained."""

import copy
import dataclasses
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from segdiff_jax import ownership
from segdiff_jax.config import Config, validate
from segdiff_jax.errors import UserError
from segdiff_jax.fields import leaves
from segdiff_jax.stages import of_stage, put
from segdiff_jax.training import origin, run
from segdiff_jax.weights import workdir as workdirs
from segdiff_jax.weights.checkpoint import Checkpoints

log = logging.getLogger(__name__)

# What a workdir must have been trained with, for its name to mean what it says: keys or sections.
_OF_BOTH = {"seed", "data.source", "data.root", "data.image_size", "data.fit", "model.preset"}
_OF_VAE = {"vae"}
_OF_DIFFUSION = {"noise", "codec", "optimizer.learning_rate", "train.batch_size", "train.steps"}
_OF_DIFFUSION |= {"train.terminal_share", "train.balance", "train.hard_negatives"}


class Training(NamedTuple):
    name: str
    changes: Mapping[str, Any]  # of the config, by dotted keys


def changed(config: Config, changes: Mapping[str, Any], use: str = "train") -> Config:
    """Return `config` with dotted keys set, validated."""
    new = copy.deepcopy(config)
    for key, value in changes.items():
        put(new, key, value)
    return validate(new, use)


def trained(wanted: Training, config: Config, folder: Path) -> str:
    """Return the workdir of a finished training of `config`, which has the seed; train if need be.

    Trainings of a seed begin with the same VAE, and copy the latents of one that has them. Raises
    `UserError` for a workdir of this name that was trained with other settings.
    """
    config = changed(config, wanted.changes)
    if not config.init_from:
        vae = folder / f"vae-seed{config.seed}"
        _train(dataclasses.replace(config, stage="vae"), vae)
        config = dataclasses.replace(config, init_from=str(vae))
    workdir = folder / f"{wanted.name}-seed{config.seed}"
    if config.data.cache_latents and not workdir.exists():
        _copy_latents(config, workdir)
    _train(config, workdir)
    return str(workdir)


def _train(config: Config, workdir: Path) -> None:
    """Train to the end, unless that is done."""
    if workdirs.is_workdir(str(workdir)):
        _check_same(config, workdir)
        with Checkpoints(workdir / workdirs.CHECKPOINTS, read_only=True) as checkpoints:
            if (checkpoints.latest_step() or 0) >= of_stage(config).train.steps:
                return
    log.info("training %s", workdir)
    run.train(config, str(workdir), followed=True)


def _check_same(config: Config, workdir: Path) -> None:
    means = _OF_BOTH | (_OF_VAE if config.stage == "vae" else _OF_DIFFUSION)
    stored = {key: value for key, _, value in leaves(workdirs.read_config(str(workdir)))}
    for key, _, now in leaves(of_stage(config)):
        counts = key in means or key.partition(".")[0] in means
        if counts and (had := stored[key]) != now:
            raise UserError(
                f"{workdir}: was trained with config.{key}={had!r}, now it is {now!r}: "
                "choose another --output, or remove this folder"
            )


def _copy_latents(config: Config, workdir: Path) -> None:
    """Give a new workdir the latents of a sibling. Its training checks whether they fit."""
    groups = config.codec.classes_per_pass
    pattern = f"*-seed{config.seed}/{workdirs.LATENTS}/cache.json"
    for cache in sorted(workdir.parent.glob(pattern)):
        if workdirs.read_config(str(cache.parents[1])).codec.classes_per_pass == groups:
            names = {"config.json", workdirs.LATENTS}
            ownership.claim(workdir, origin.KIND, names, checked=False)
            workdirs.write_config(str(workdir), config)
            shutil.copytree(cache.parent, workdir / workdirs.LATENTS)
            return
