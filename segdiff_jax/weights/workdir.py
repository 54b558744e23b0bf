"""What a training run leaves behind, and how to get networks back from it.

W/config.json     the run's config
W/classes.json    the classes it is trained with, in id order; an export has it too
W/vae/            the VAE stage, where the run began from nothing: a workdir of its own
W/joint/STEP/     the joint decoder's stage, on the UNet of that step: a workdir of its own
W/pretrained/     a Hugging Face folder with the frozen networks: VAE, text encoder, tokenizer
W/latents/        VAE latents of the training pairs, where data.cache_latents is on
W/checkpoints/    Orbax: parameters, optimiser, EMA; with the config and the UNet's architecture
W/lock.json       while a training runs: which (`training/lock.py`)
W/tensorboard/    events, and the profiler's traces
W/compile_cache/  compiled programs, where W is on an object store
W/.segdiff_files.json  which of these names a run wrote, so that nothing of the user's is replaced
"""

import dataclasses
import functools
import json
import logging
import os
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from segdiff_jax import __version__, combinations, fields
from segdiff_jax.config import VERSION_KEY, Config, from_dict, reading_of, stored, to_dict
from segdiff_jax.data.sources.source import IMAGE_EXTENSIONS
from segdiff_jax.errors import UserError
from segdiff_jax.files import is_remote, reading, write_json, write_text
from segdiff_jax.models.clip_text import CLIPText
from segdiff_jax.models.unet import UNet, UNetConfig
from segdiff_jax.models.vae import VAE
from segdiff_jax.parallel.mesh import abstract
from segdiff_jax.parallel.rules import state_sharding
from segdiff_jax.stored import read_object
from segdiff_jax.text import vocabulary
from segdiff_jax.text.tokenizer import Tokenizer
from segdiff_jax.text.vocabulary import Vocabulary
from segdiff_jax.weights import hf_config, mask_decoders, pretrained, step_folders
from segdiff_jax.weights.checkpoint import Checkpoints
from segdiff_jax.weights.hub import INDEX

log = logging.getLogger(__name__)

PRETRAINED, CHECKPOINTS, LATENTS = "pretrained", "checkpoints", "latents"
VAE_STAGE, JOINT_STAGE = "vae", "joint"
EXPORT_SETTINGS = "segdiff.json"  # the config, in an exported folder
CLASSES = "classes.json"
BEST_METRIC = "miou_present"  # of validation; the checkpoint where it was highest is kept

# Folders of other kinds, by a file that they have.
_OTHER_KINDS = {
    EXPORT_SETTINGS: "an exported model",
    INDEX: "a Stable Diffusion folder",
    "sampler.json": "an exported sampler",
    "metrics.json": "the output of an evaluation",
}
_DATA_SETS = (  # names that lie side by side in one
    {"classes.txt", "train"},
    {"classes.txt", "val"},
    {"images", "annotations"},
    {"images", "masks"},
    {"JPEGImages", "SegmentationClass"},
    {"leftImg8bit", "gtFine"},
)

Networks = tuple[UNet, VAE, CLIPText, Tokenizer, Config]


def is_workdir(path: str) -> bool:
    with reading(path):
        return (epath.Path(path) / "config.json").exists()


def check_new(workdir: str, data_root: str) -> None:
    """Raise `UserError` unless a training can begin, or go on, in the folder `workdir`.

    It may exist and hold files of the user, but none that says it is something else, nor anything
    under the names of a training that is not there. `data_root`: the folder of the training data.
    """
    step_folders.check_path(workdir)
    with reading(workdir):
        folder = epath.Path(workdir)
        if is_workdir(workdir):
            return
        if folder.is_dir():
            what = _other_kind(folder, data_root)
        else:
            what = "is a file, not a folder" if folder.exists() else None
    if what:
        raise UserError(f"--workdir {workdir}: {what}: choose another --workdir")


def _other_kind(folder: epath.Path, data_root: str) -> str | None:
    """Say what speaks against a new training in an existing folder."""
    held = {path.name for path in folder.iterdir()}
    for name, kind in _OTHER_KINDS.items():
        if name in held:
            return f"is {kind} ({name})"
    photos = sorted(n for n in held if os.path.splitext(n)[1].lower() in IMAGE_EXTENSIONS)
    if photos:
        return f"is a folder of images ({photos[0]})"
    if any(names <= held for names in _DATA_SETS):
        return "is a data set"
    if not is_remote(folder):
        same = functools.partial(os.path.samefile, folder)
        if os.path.isdir(data_root) and same(data_root):
            return "is the folder of config.data.root"
        if any(os.path.isdir(p) and same(p) for p in (os.path.expanduser("~"), os.sep)):
            return "is a home folder or the root of the disk"
    for name in (CHECKPOINTS, PRETRAINED, VAE_STAGE, JOINT_STAGE, LATENTS):
        if name in held and (not (folder / name).is_dir() or any((folder / name).iterdir())):
            return (
                f"holds {name} but no config.json, so there is no training that could go on "
                "(bring its config.json back if there was one)"
            )
    return None


def check_not_inside(path: str, what: str = "--checkpoint") -> None:
    """Raise `UserError` that names the workdir if `path`, which is none, lies in one.

    what: the flag or key that it was given to.
    """
    full = epath.Path(path if is_remote(path) else os.path.abspath(path))
    for parent in full.parents:
        if _is_training(parent / "config.json"):
            step = re.match(rf"{CHECKPOINTS}/(\d+)", os.fspath(full.relative_to(parent)))
            which = f", with --which {step[1]}" if step and what == "--checkpoint" else ""
            raise UserError(f"{path}: is inside the workdir {parent}: give that as {what}{which}")


def _is_training(config: epath.Path) -> bool | None:
    """Return whether a config.json is a training's (networks have one too); None if unknown."""
    try:
        with reading(config):
            keys = set(json.loads(config.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    if keys & {"_class_name", "architectures", "model_type"}:
        return False
    return True if keys & {item.name for item in dataclasses.fields(Config)} else None


def write_config(workdir: str, config: Config) -> None:
    write_json(epath.Path(workdir) / "config.json", stored(config))


def read_config(workdir: str) -> Config:
    """Read the config of a run or an export; `UserError` if there is none or it is damaged."""
    with reading(workdir):
        path = epath.Path(workdir) / ("config.json" if is_workdir(workdir) else EXPORT_SETTINGS)
        there = path.exists()
    if not there or (path.name == "config.json" and _is_training(path) is False):
        check_not_inside(workdir)
        raise UserError(
            f"{workdir}: neither a training workdir (config.json) nor an export "
            f"({EXPORT_SETTINGS}): give the --workdir of a training or the --output of an export"
        )
    return from_dict(read_object(path, "restore it or train again"), str(path))


def read_classes(path: str) -> Vocabulary | None:
    """Read the classes that a run or an export was trained with; None of an earlier version."""
    stored = epath.Path(path) / CLASSES
    with reading(path):
        return vocabulary.load(stored) if stored.exists() else None


def settle_classes(workdir: str, classes: Vocabulary, write: bool) -> None:
    """Store the classes of a run. Those of its checkpoints must be the same, synonyms too.

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
    """Return what a checkpoint says of itself beside the arrays."""
    architecture = dataclasses.asdict(unet) if unet else {}
    return {"config": to_dict(config), "unet": architecture, VERSION_KEY: __version__}


def load_networks(
    path: str, weights: str | None = None, which: str | int = "newest"
) -> tuple[Networks, int | None]:
    """Load everything needed to segment, from a training workdir or an exported folder.

    Return with it the step of the checkpoint; None for an export.

    weights: "ema" | "raw" of a training; by default the EMA where the training kept one.
    which: "newest", "best" (by the mIoU of its validation) or a step, of a training's checkpoints.
    """
    config = read_config(path)
    if not is_workdir(path):
        if weights:
            raise UserError(f"{path}: an export has one set of weights: leave --weights out")
        if which != "newest":
            raise UserError(
                f"{path}: an export has no checkpoints to choose from: leave --which out"
            )
        return _load_export(path), None
    if pretrained.is_whole(epath.Path(path) / PRETRAINED):
        check_image_size(config, str(epath.Path(path) / PRETRAINED))
    unet, config, step = load_unet(path, weights, which=which)
    frozen = load_frozen(str(epath.Path(path) / PRETRAINED), jnp.dtype(config.model.dtype))
    return (unet, *frozen, config), step


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
    checkpoints = Checkpoints(
        epath.Path(path) / CHECKPOINTS, best_metric=BEST_METRIC, read_only=True
    )
    try:
        wanted = _step(checkpoints, path, which)
        saved = checkpoints.metadata(wanted)
        unet_config = unet_config_from(saved["unet"], str(checkpoints.directory), saved)
        unet = nnx.eval_shape(lambda: UNet(unet_config, dtype=dtype, rngs=nnx.Rngs(0)))
        graph, params = nnx.split(unet)
        if mesh is not None:
            params = abstract(params, state_sharding(params, mesh))
        restored, _ = checkpoints.restore({kept: params}, wanted)
        step = checkpoints.used
    finally:
        checkpoints.close()
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


def unet_config_from(
    values: Any, where: str = "checkpoint", metadata: Mapping[str, Any] = MappingProxyType({})
) -> UNetConfig:
    """Invert `dataclasses.asdict` after a trip through JSON.

    where, metadata: of the checkpoint that `values` come from. Raises `UserError` that names it
    for what no network can be built of.
    """
    with reading_of(metadata.get(VERSION_KEY), where):
        config = fields.build(UNetConfig, values or {}, "unet")
        if not values:
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


def joint_folder(path: str, step: int) -> epath.Path:
    """Return the workdir of the joint decoder that goes with the UNet of this step alone."""
    return epath.Path(path) / JOINT_STAGE / str(step)


def load_decoders(path: str, networks: Networks, step: int | None) -> mask_decoders.Decoders:
    """Load what a run or an export has beside the decoder of its VAE.

    networks, step: as `load_networks` returns them.
    """
    _, vae, text_encoder, *_ = networks
    folder = epath.Path(path)
    tiny, joint = folder, folder
    if step is not None:
        tiny, joint = folder / PRETRAINED, joint_folder(path, step)
    return mask_decoders.Decoders(
        mask_decoders.read_linear(folder, vae.config),
        mask_decoders.read_tiny(tiny, vae.config, vae.dtype),
        mask_decoders.read_joint(joint, text_encoder.config.hidden_size, vae.dtype),
    )


def with_decoder(networks: Networks, decoders: mask_decoders.Decoders, where: str) -> Networks:
    """Return `networks` whose config names a decoder that is there; say so if it is another one."""
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


def _load_export(path: str) -> Networks:
    config = read_config(path)
    check_image_size(config, path)
    dtype = jnp.dtype(config.model.dtype)
    unet = pretrained.load(path, components=("unet",), dtype=dtype).unet
    assert unet
    return (unet, *load_frozen(path, dtype), config)
