"""What a training run leaves behind, and how to get networks back from it.

W/config.json     the run's config
W/classes.json    the classes it is trained with, in id order; an export has it too
W/vae/            the VAE stage, where the run began from nothing: a workdir of its own
W/pretrained/     a Hugging Face folder with the frozen networks: VAE, text encoder, tokenizer
W/latents/        VAE latents of the training pairs, where data.cache_latents is on
W/checkpoints/    Orbax: parameters, optimiser, EMA; with the config and the UNet's architecture
W/tensorboard/    events, and the profiler's traces
W/compile_cache/  compiled programs, where W is on an object store
"""

import dataclasses
import json
import logging
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from segdiff_jax.config import Config, from_dict, to_dict
from segdiff_jax.data import vocabulary
from segdiff_jax.data.vocabulary import Vocabulary
from segdiff_jax.errors import UserError
from segdiff_jax.files import reading, write_json, write_text
from segdiff_jax.models import pretrained
from segdiff_jax.models.clip_text import CLIPText
from segdiff_jax.models.tokenizer import Tokenizer
from segdiff_jax.models.unet import UNet, UNetConfig
from segdiff_jax.models.vae import VAE
from segdiff_jax.training import sharding
from segdiff_jax.training.checkpoint import Checkpoints

log = logging.getLogger(__name__)

PRETRAINED, CHECKPOINTS, VAE_STAGE, LATENTS = "pretrained", "checkpoints", "vae", "latents"
EXPORT_SETTINGS = "segdiff.json"  # the config, in an exported folder
CLASSES = "classes.json"


def is_workdir(path: str) -> bool:
    with reading(path):
        return (epath.Path(path) / "config.json").exists()


def write_config(workdir: str, config: Config) -> None:
    write_json(epath.Path(workdir) / "config.json", to_dict(config))


def read_config(workdir: str) -> Config:
    """The config of a run or an export. `UserError` if `workdir` is neither or it is damaged."""
    with reading(workdir):
        path = epath.Path(workdir) / ("config.json" if is_workdir(workdir) else EXPORT_SETTINGS)
        data = path.read_bytes() if path.exists() else None
    if data is None:
        raise UserError(
            f"{workdir}: neither a training workdir (config.json) nor an export "
            f"({EXPORT_SETTINGS}): give the --workdir of a training or the --output of an export"
        )
    try:
        return from_dict(json.loads(data))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}): restore it or train again") from error


def read_classes(path: str) -> Vocabulary | None:
    """The classes that a run or an export was trained with; None of an earlier version."""
    stored = epath.Path(path) / CLASSES
    with reading(path):
        return vocabulary.load(stored) if stored.exists() else None


def settle_classes(workdir: str, classes: Vocabulary, write: bool) -> None:
    """Stores the classes of a run. Those of its checkpoints must be the same, synonyms too.

    Raises `UserError` otherwise: the ids of the labels would mean something else.
    """
    folder = epath.Path(workdir) / CHECKPOINTS
    begun = folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())
    stored = read_classes(workdir) if begun else None
    if stored is None:
        if begun and write:
            log.warning(
                "%s: does not say which classes it was started with (it is of an earlier version): "
                "it goes on with %s",
                *(workdir, classes.summary()),
            )
        if write:
            write_text(epath.Path(workdir) / CLASSES, vocabulary.to_json(classes))
        return
    difference = vocabulary.first_difference(stored.classes, classes.classes)
    for number, (old, new) in enumerate(zip(stored.classes, classes.classes, strict=False)):
        if not difference and old.synonyms != new.synonyms:
            difference = f"class {number}, {new.name!r}, has other synonyms"
    if difference:
        raise UserError(
            f"{workdir}: this run was started with other classes ({CLASSES}), now {difference}: "
            "restore the list, or start in a new --workdir with config.init_from"
        )


def checkpoint_metadata(config: Config, unet: UNetConfig | None) -> dict[str, Any]:
    """What a checkpoint says of itself beside the arrays."""
    architecture = dataclasses.asdict(unet) if unet else {}
    return {"config": to_dict(config), "unet": architecture}


def load_networks(
    path: str, weights: str | None = None
) -> tuple[UNet, VAE, CLIPText, Tokenizer, Config]:
    """Everything needed to segment, from a training workdir or an exported folder.

    weights: "ema" | "raw" of a training; by default the EMA where the training kept one.
    """
    if not is_workdir(path):
        if weights:
            raise UserError(f"{path}: an export has one set of weights: leave --weights out")
        return _load_export(path)
    unet, config = load_unet(path, weights)
    frozen = load_frozen(str(epath.Path(path) / PRETRAINED), jnp.dtype(config.model.dtype))
    return (unet, *frozen, config)


def load_unet(
    path: str, weights: str | None = None, mesh: Mesh | None = None
) -> tuple[UNet, Config]:
    """The UNet of a training workdir, and the config it was trained with.

    weights: as of `load_networks`. With `mesh`, each device reads its own part of the arrays.
    """
    config = read_config(path)
    if config.stage != "diffusion":
        raise UserError(
            f"{path}: holds the {config.stage!r} stage, which cannot segment: "
            "name the workdir of a diffusion stage"
        )
    if weights == "ema" and not config.optimizer.ema_decay:
        raise UserError(f"{path}: was trained without EMA: use --weights raw")
    kept = "ema" if config.optimizer.ema_decay and weights != "raw" else "params"
    dtype = jnp.dtype(config.model.dtype)
    checkpoints = Checkpoints(epath.Path(path) / CHECKPOINTS, read_only=True)
    try:
        saved = checkpoints.metadata()
        unet_config = unet_config_from(saved["unet"])
        unet = nnx.eval_shape(lambda: UNet(unet_config, dtype=dtype, rngs=nnx.Rngs(0)))
        graph, params = nnx.split(unet)
        if mesh is not None:
            params = sharding.abstract(params, sharding.state_sharding(params, mesh))
        restored, _ = checkpoints.restore({kept: params})
    finally:
        checkpoints.close()
    return nnx.merge(graph, restored[kept]), config


def unet_config_from(values: dict[str, Any]) -> UNetConfig:
    """The inverse of `dataclasses.asdict` after a trip through JSON."""
    as_tuples: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
    }
    return UNetConfig(**as_tuples)


def load_frozen(folder: str, dtype: Any) -> tuple[VAE, CLIPText, Tokenizer]:
    """The networks that the diffusion stage does not train."""
    loaded = pretrained.load(folder, components=("vae", "text_encoder", "tokenizer"), dtype=dtype)
    missing = [
        name for name in ("vae", "text_encoder", "tokenizer") if getattr(loaded, name) is None
    ]
    if missing:
        raise UserError(f"{folder}: has no {missing[0]}/: name a complete folder")
    return loaded.vae, loaded.text_encoder, loaded.tokenizer  # type: ignore[return-value]


def _load_export(path: str) -> tuple[UNet, VAE, CLIPText, Tokenizer, Config]:
    config = read_config(path)
    dtype = jnp.dtype(config.model.dtype)
    loaded = pretrained.load(path, components=("unet",), dtype=dtype)
    if loaded.unet is None:
        raise UserError(f"{path}: has no unet/: export it again")
    return (loaded.unet, *load_frozen(path, dtype), config)


def parameter_count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
