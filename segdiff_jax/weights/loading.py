"""Trained networks from the folder of a training or an export (`workdir` says what is where).

workdir ─► checkpoints/: UNet, of the step asked for   pretrained/: VAE, text encoder, tokenizer
export  ─► the Stable Diffusion folder that it is
either  ─► decoders that take the place of the VAE's
"""

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from segdiff_jax import combinations, fields
from segdiff_jax.config import VERSION_KEY, Config, reading_of
from segdiff_jax.errors import UserError
from segdiff_jax.models.clip_text import CLIPText
from segdiff_jax.models.unet import UNet, UNetConfig
from segdiff_jax.models.vae import VAE
from segdiff_jax.parallel.mesh import abstract
from segdiff_jax.parallel.rules import state_sharding
from segdiff_jax.text.tokenizer import Tokenizer
from segdiff_jax.weights import hf_config, mask_decoders, pretrained, tensors
from segdiff_jax.weights.checkpoint import Checkpoints
from segdiff_jax.weights.workdir import (
    BEST_METRIC,
    CHECKPOINTS,
    PRETRAINED,
    check_not_inside,
    is_workdir,
    joint_folder,
    read_config,
)

log = logging.getLogger(__name__)

Networks = tuple[UNet, VAE, CLIPText, Tokenizer, Config]


def load_networks(
    path: str, weights: str | None = None, which: str | int = "newest"
) -> tuple[Networks, mask_decoders.Decoders, int | None]:
    """Load everything needed to segment, from a training workdir or an exported folder.

    Return with it what is there beside the decoder of the VAE, and the step of the checkpoint;
    None for an export.

    weights: "ema" | "raw" of a training; by default the EMA where the training kept one.
    which: "newest", "best" (by the mIoU of its validation) or a step, of a training's checkpoints.
    """
    config, folder, step = read_config(path), epath.Path(path), None
    dtype = jnp.dtype(config.model.dtype)
    if is_workdir(path):
        folder /= PRETRAINED
        if pretrained.is_whole(folder):
            check_image_size(config, str(folder))
        unet, config, step = load_unet(path, weights, which=which)
    else:
        if weights or which != "newest":
            flag = "--weights" if weights else "--which"
            raise UserError(f"{path}: an export is of one set of weights: leave {flag} out")
        check_image_size(config, path)
        found = pretrained.load(path, ("unet",), dtype=dtype)
        assert found.unet
        unet = found.unet
    networks = unet, *load_frozen(str(folder), dtype), config
    return networks, _decoders(path, networks, step), step


def load_unet(
    path: str,
    weights: str | None = None,
    mesh: Mesh | None = None,
    which: str | int = "newest",
) -> tuple[UNet, Config, int]:
    """Load a training workdir's UNet, the config it was trained with and the checkpoint's step.

    weights, which: as of `load_networks`. With `mesh`, each device reads its own part.
    """
    config = read_config(path)
    if config.stage in ("vae", "joint"):
        check_not_inside(path)
        raise UserError(
            f"{path}: holds the {config.stage!r} stage, which cannot segment: "
            "name the workdir of a diffusion stage"
        )
    if weights == "ema" and not config.optimizer.ema_decay:
        raise UserError(f"{path}: was trained without EMA: use --weights raw")
    kept = "ema" if config.optimizer.ema_decay and weights != "raw" else "params"
    dtype = jnp.dtype(config.model.dtype)
    folder = epath.Path(path) / CHECKPOINTS
    with Checkpoints(folder, best_metric=BEST_METRIC, read_only=True) as checkpoints:
        wanted = _step(checkpoints, path, which)
        unet_config = unet_config_from(checkpoints.metadata(wanted), str(folder))
        graph, params = nnx.split(
            tensors.shapes_of(functools.partial(UNet, unet_config, dtype=dtype))
        )
        if mesh is not None:
            params = abstract(params, state_sharding(params, mesh))
        restored, _ = checkpoints.restore({kept: params}, wanted)
        step = checkpoints.used
    assert step is not None
    log.info("%s: checkpoint of step %d", path, step)
    return nnx.merge(graph, restored[kept]), config, step


def _step(checkpoints: Checkpoints, path: str, which: str | int) -> int | None:
    """Return the step that `which` means; None for the newest that can be read."""
    if which == "newest":
        return None
    if which == "best":
        best = checkpoints.best_step()
        if best is None and checkpoints.steps():
            steps = ", ".join(map(str, checkpoints.steps()))
            raise UserError(
                f"{path}: no validation was recorded with its checkpoints, so none is the best: "
                f"use --which newest or a step ({steps}), or train with config.train.eval_every"
            )
        return best
    if not str(which).isdecimal():
        raise UserError(f"--which {which}: give newest, best or the step of a checkpoint")
    return int(which)


def unet_config_from(metadata: Mapping[str, Any], where: str = "checkpoint") -> UNetConfig:
    """Return the architecture that `metadata` of a checkpoint, as of `checkpoint_metadata`, names.

    Raises `UserError` that names `where` it is for what no network can be built of.
    """
    with reading_of(metadata.get(VERSION_KEY), where):
        config = fields.build(UNetConfig, metadata["unet"] or {}, "unet")
        if not metadata["unet"]:
            raise UserError("holds no UNet: name the workdir of a diffusion stage")
        hf_config.check_unet(config, "unet", {})
    return config


def check_image_size(config: Config, folder: str) -> None:
    """Raise `UserError` unless the VAE in a Stable Diffusion folder can divide the image size.

    Only its config is read.
    """
    vae = pretrained.describe(folder, ("vae",)).vae
    if vae is not None:
        combinations.check_image_size(config, vae.downsampling, f"the VAE of {folder}")


def load_frozen(
    folder: str, dtype: Any, variant: str | None = None, tokenizer: str = ""
) -> tuple[VAE, CLIPText, Tokenizer]:
    """Load the networks that the diffusion stage does not train, as `pretrained.load` does."""
    parts = ("vae", "text_encoder", "tokenizer")
    loaded = pretrained.load(folder, parts, variant=variant, dtype=dtype, tokenizer=tokenizer)
    vae, text_encoder, tokens = loaded.vae, loaded.text_encoder, loaded.tokenizer
    assert vae and text_encoder and tokens  # what was asked for is there
    return vae, text_encoder, tokens


def _decoders(path: str, networks: Networks, step: int | None) -> mask_decoders.Decoders:
    _, vae, text_encoder, *_ = networks
    folder = tiny = joint = epath.Path(path)
    if step is not None:
        tiny, joint = folder / PRETRAINED, joint_folder(path, step)
    return mask_decoders.Decoders(
        mask_decoders.read_linear(folder, vae.config),
        mask_decoders.read_tiny(tiny, vae.config, vae.dtype),
        mask_decoders.read_joint(joint, text_encoder.config.hidden_size, vae.dtype),
    )


def with_nearest_decoder(
    networks: Networks, decoders: mask_decoders.Decoders, where: str
) -> Networks:
    """Return `networks` with the decoder nearest to the one their config names; say if it differs.

    where: the checkpoint, for the message.
    """
    *_, config = networks
    wanted = config.sampler.decoder
    name = mask_decoders.nearest(wanted, decoders)
    if name != wanted:
        log.warning(
            "%s: no %s decoder goes with this checkpoint (a training makes one when it ends): "
            "its maps are decoded by sampler.decoder=%s",
            *(where, wanted, name),
        )
    sampler = dataclasses.replace(config.sampler, decoder=name)
    return *networks[:-1], dataclasses.replace(config, sampler=sampler)
