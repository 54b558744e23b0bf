"""What a training run leaves behind, and how to get networks back from it.

W/config.json     the run's config
W/vae/            the VAE stage, where the run began from nothing: a workdir of its own
W/pretrained/     a Hugging Face folder with the frozen networks: VAE, text encoder, tokenizer
W/latents/        VAE latents of the training pairs, where data.cache_latents is on
W/checkpoints/    Orbax: parameters, optimiser, EMA; with the config and the UNet's architecture
W/tensorboard/    events, and the profiler's traces
W/compile_cache/  compiled programs, where W is on an object store
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from segdiff_jax import __version__, combinations, fields
from segdiff_jax.config import VERSION_KEY, Config, from_dict, reading_of, stored, to_dict
from segdiff_jax.errors import UserError
from segdiff_jax.files import reading, write_json
from segdiff_jax.models import pretrained
from segdiff_jax.models import unet as unets
from segdiff_jax.models.clip_text import CLIPText
from segdiff_jax.models.tokenizer import Tokenizer
from segdiff_jax.models.unet import UNet, UNetConfig
from segdiff_jax.models.vae import VAE
from segdiff_jax.stored import parse_object
from segdiff_jax.training import sharding
from segdiff_jax.training.checkpoint import Checkpoints

PRETRAINED, CHECKPOINTS, VAE_STAGE, LATENTS = "pretrained", "checkpoints", "vae", "latents"
EXPORT_SETTINGS = "segdiff.json"  # the config, in an exported folder


def is_workdir(path: str) -> bool:
    with reading(path):
        return (epath.Path(path) / "config.json").exists()


def write_config(workdir: str, config: Config) -> None:
    write_json(epath.Path(workdir) / "config.json", stored(config))


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
    return from_dict(parse_object(data, path, "restore it or train again"), str(path))


def checkpoint_metadata(config: Config, unet: UNetConfig | None) -> dict[str, Any]:
    """What a checkpoint says of itself beside the arrays."""
    architecture = dataclasses.asdict(unet) if unet else {}
    return {"config": to_dict(config), "unet": architecture, VERSION_KEY: __version__}


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
    if pretrained.is_whole(epath.Path(path) / PRETRAINED):
        check_image_size(read_config(path), str(epath.Path(path) / PRETRAINED))
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
        unet_config = unet_config_from(saved["unet"], str(checkpoints.directory), saved)
        unet = nnx.eval_shape(lambda: UNet(unet_config, dtype=dtype, rngs=nnx.Rngs(0)))
        graph, params = nnx.split(unet)
        if mesh is not None:
            params = sharding.abstract(params, sharding.state_sharding(params, mesh))
        restored, _ = checkpoints.restore({kept: params})
    finally:
        checkpoints.close()
    return nnx.merge(graph, restored[kept]), config


def unet_config_from(
    values: Any, where: str = "checkpoint", metadata: Mapping[str, Any] = MappingProxyType({})
) -> UNetConfig:
    """The inverse of `dataclasses.asdict` after a trip through JSON.

    where, metadata: of the checkpoint that `values` come from. Raises `UserError` that names it
    for what no network can be built of.
    """
    with reading_of(metadata.get(VERSION_KEY), where):
        config = fields.build(UNetConfig, values or {}, "unet")
        if not values:
            raise UserError("holds no UNet: name the workdir of a diffusion stage")
        unets.check(config, "unet")
    return config


def check_image_size(config: Config, folder: str) -> None:
    """Raises `UserError` unless the VAE in a Stable Diffusion folder can divide the image size.

    Only its config is read.
    """
    vae = pretrained.describe(folder, ("vae",)).vae
    if vae is not None:
        combinations.check_image_size(config, vae.downsampling, f"the VAE of {folder}")


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
    check_image_size(config, path)
    dtype = jnp.dtype(config.model.dtype)
    loaded = pretrained.load(path, components=("unet",), dtype=dtype)
    if loaded.unet is None:
        raise UserError(f"{path}: has no unet/: export it again")
    return (loaded.unet, *load_frozen(path, dtype), config)


def parameter_count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
