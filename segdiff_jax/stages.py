"""The settings of each stage of a training, put where all that trains looks for them."""

import copy
from typing import TYPE_CHECKING, Any

from segdiff_jax.errors import UserError

if TYPE_CHECKING:
    from segdiff_jax.config import Config

# By stage: what stands in for keys of other groups, while the VAE is trained (alone or as the first
# stage), in the single-step stage, and while the joint decoder is trained.
_OF_STAGE: dict[str, dict[str, str]] = {
    "vae": {
        "train.steps": "vae.steps",
        "train.batch_size": "vae.batch_size",
        "optimizer.method": "vae.optimizer",
        "optimizer.learning_rate": "vae.learning_rate",
        "optimizer.decay_steps": "vae.steps",
        "optimizer.final_fraction": "vae.final_fraction",
        "optimizer.weight_decay": "vae.weight_decay",
        "optimizer.ema_decay": "vae.ema_decay",
    },
    "e2e": {"sampler.initial_noise": "e2e.noise"},
    "joint": {
        "train.steps": "joint.steps",
        "train.batch_size": "joint.batch_size",
        "optimizer.learning_rate": "joint.learning_rate",
        "optimizer.decay_steps": "joint.steps",
        "optimizer.final_fraction": "joint.final_fraction",
        "optimizer.weight_decay": "joint.weight_decay",
    },
}
_NOT_OF_STAGE: dict[str, dict[str, Any]] = {
    "vae": {"train.eval_every": 0, "optimizer.accumulation": 1, "data.cache_latents": False},
    "e2e": {
        "train.terminal_share": 0.0,  # all is trained there
        "train.balance": 0.0,  # the Dice term weighs classes of few pixels
        "data.cache_latents": False,  # the loss is about labels, which a cache of latents lacks
        "sampler.steps": 1,
        "sampler.ensemble": 1,
    },
    "joint": {
        "train.eval_every": 0,
        "train.profile_steps": 0,  # a trace is of the stage that was asked for
        "optimizer.accumulation": 1,  # of the UNet's batches
        "data.cache_latents": False,  # it sees photos
        "data.augment.views": 0,  # which nothing keeps: each example is a new one
        "optimizer.method": "muon",  # AdamW needs three times the photos: docs/results.md
    },
}


def of_stage(config: "Config") -> "Config":
    """Return `config` with the settings of its own stage where all stages look for them.

    The steps, batches and optimiser of the VAE stage are in `vae`, those of the joint decoder in
    `joint`; all that trains reads them where those of the diffusion stage are. Applying it again
    changes nothing.
    """
    if config.stage not in _OF_STAGE:
        return config
    changed = copy.deepcopy(config)
    for key, source in _OF_STAGE[config.stage].items():
        put(changed, key, get(config, source))
    for key, value in _NOT_OF_STAGE[config.stage].items():
        put(changed, key, value)
    return changed


def key_of(stage: str, key: str) -> str:
    """Return which key a user sets for what `key` is in a training of `stage`."""
    return _OF_STAGE.get(stage, {}).get(key, key)


def check_overridden(config: "Config", overridden: list[str]) -> None:
    """Raise `UserError` for a key that was set by hand but is not of the config's stage."""
    own, foreign = (table.get(config.stage, {}) for table in (_OF_STAGE, _NOT_OF_STAGE))
    stage = "VAE" if config.stage == "vae" else config.stage
    for key in overridden:
        if key in own:
            raise UserError(f"config.{key}: the {stage} stage has its own: set config.{own[key]}")
        if key in foreign:
            raise UserError(f"config.{key}: plays no part in the {stage} stage: leave it out")


def get(config: "Config", key: str) -> Any:
    """Return the value of a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def put(config: "Config", key: str, value: Any) -> None:
    """Set the value of a dotted key."""
    group, _, name = key.rpartition(".")
    setattr(get(config, group) if group else config, name, value)
