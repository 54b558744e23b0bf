"""What a training run leaves behind, and how to get networks back from it.

W/config.json     the run's config
W/vae/            the VAE stage, where the run began from nothing: a workdir of its own
W/pretrained/     a Hugging Face folder with the frozen networks: VAE, text encoder, tokenizer
W/latents/        VAE latents of the training pairs, where data.cache_latents is on
W/checkpoints/    Orbax: parameters, optimiser, EMA; with the config and the UNet's architecture
W/lock.json       while a training runs: which (`training/lock.py`)
W/tensorboard/    events, and the profiler's traces
W/compile_cache/  compiled programs, where W is on an object store
"""

import dataclasses
import functools
import json
import logging
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from segdiff_jax.config import Config, from_dict, to_dict
from segdiff_jax.data.sources import IMAGE_EXTENSIONS
from segdiff_jax.errors import UserError
from segdiff_jax.files import is_remote, reading, write_json
from segdiff_jax.models import pretrained
from segdiff_jax.models.clip_text import CLIPText
from segdiff_jax.models.hf_folders import INDEX
from segdiff_jax.models.tokenizer import Tokenizer
from segdiff_jax.models.unet import UNet, UNetConfig
from segdiff_jax.models.vae import VAE
from segdiff_jax.training import sharding, step_folders
from segdiff_jax.training.checkpoint import Checkpoints

log = logging.getLogger(__name__)

PRETRAINED, CHECKPOINTS, VAE_STAGE, LATENTS = "pretrained", "checkpoints", "vae", "latents"
EXPORT_SETTINGS = "segdiff.json"  # the config, in an exported folder
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
    """Raises `UserError` unless a training can begin, or go on, in the folder `workdir`.

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
    """What speaks against a new training in an existing folder."""
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
    for name in (CHECKPOINTS, PRETRAINED, VAE_STAGE, LATENTS):
        if name in held and (not (folder / name).is_dir() or any((folder / name).iterdir())):
            return (
                f"holds {name} but no config.json, so there is no training that could go on "
                "(bring its config.json back if there was one)"
            )
    return None


def check_not_inside(path: str, what: str = "--checkpoint") -> None:
    """Raises `UserError` that names the workdir if `path`, which is none, lies in one.

    what: the flag or key that it was given to.
    """
    full = epath.Path(path if is_remote(path) else os.path.abspath(path))
    for parent in full.parents:
        if _is_training(parent / "config.json"):
            step = re.match(rf"{CHECKPOINTS}/(\d+)", os.fspath(full.relative_to(parent)))
            which = f", with --which {step[1]}" if step and what == "--checkpoint" else ""
            raise UserError(f"{path}: is inside the workdir {parent}: give that as {what}{which}")


def _is_training(config: epath.Path) -> bool | None:
    """Whether the file is a training's: networks have a config.json too. None: not readable."""
    try:
        with reading(config):
            values = json.loads(config.read_bytes())
    except (OSError, ValueError):
        return None
    return isinstance(values, dict) and ("stage" in values or "train" in values)


def write_config(workdir: str, config: Config) -> None:
    write_json(epath.Path(workdir) / "config.json", to_dict(config))


def read_config(workdir: str) -> Config:
    """The config of a run or an export. `UserError` if `workdir` is neither or it is damaged."""
    with reading(workdir):
        path = epath.Path(workdir) / ("config.json" if is_workdir(workdir) else EXPORT_SETTINGS)
        data = path.read_bytes() if path.exists() else None
    if data is None or (path.name == "config.json" and _is_training(path) is False):
        check_not_inside(workdir)
        raise UserError(
            f"{workdir}: neither a training workdir (config.json) nor an export "
            f"({EXPORT_SETTINGS}): give the --workdir of a training or the --output of an export"
        )
    try:
        return from_dict(json.loads(data))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}): restore it or train again") from error


def checkpoint_metadata(config: Config, unet: UNetConfig | None) -> dict[str, Any]:
    """What a checkpoint says of itself beside the arrays."""
    architecture = dataclasses.asdict(unet) if unet else {}
    return {"config": to_dict(config), "unet": architecture}


def load_networks(path: str, weights: str | None = None, which: str | int = "newest") -> Networks:
    """Everything needed to segment, from a training workdir or an exported folder.

    weights: "ema" | "raw" of a training; by default the EMA where the training kept one.
    which: "newest", "best" (by the mIoU of its validation) or a step, of a training's checkpoints.
    """
    return load_with_step(path, weights, which)[0]


def load_with_step(
    path: str, weights: str | None = None, which: str | int = "newest"
) -> tuple[Networks, int | None]:
    """`load_networks`, and the step of the checkpoint that was read; None for an export."""
    config = read_config(path)
    if not is_workdir(path):
        if weights:
            raise UserError(f"{path}: an export has one set of weights: leave --weights out")
        if which != "newest":
            raise UserError(
                f"{path}: an export has no checkpoints to choose from: leave --which out"
            )
        return _load_export(path), None
    unet, config, step = load_unet(path, weights, which=which)
    frozen = load_frozen(str(epath.Path(path) / PRETRAINED), jnp.dtype(config.model.dtype))
    return (unet, *frozen, config), step


def load_unet(
    path: str,
    weights: str | None = None,
    mesh: Mesh | None = None,
    which: str | int = "newest",
) -> tuple[UNet, Config, int]:
    """The UNet of a training workdir, the config it was trained with, and the checkpoint's step.

    weights, which: as of `load_networks`. With `mesh`, each device reads its own part.
    """
    config = read_config(path)
    if config.stage != "diffusion":
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
        unet_config = unet_config_from(saved["unet"])
        unet = nnx.eval_shape(lambda: UNet(unet_config, dtype=dtype, rngs=nnx.Rngs(0)))
        graph, params = nnx.split(unet)
        if mesh is not None:
            params = sharding.abstract(params, sharding.state_sharding(params, mesh))
        restored, _ = checkpoints.restore({kept: params}, wanted)
        step = checkpoints.used
    finally:
        checkpoints.close()
    assert step is not None
    log.info("%s: checkpoint of step %d", path, step)
    return nnx.merge(graph, restored[kept]), config, step


def _step(checkpoints: Checkpoints, path: str, which: str | int) -> int | None:
    """The step that `which` means; None for the newest that can be read."""
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


def _load_export(path: str) -> Networks:
    config = read_config(path)
    dtype = jnp.dtype(config.model.dtype)
    loaded = pretrained.load(path, components=("unet",), dtype=dtype)
    if loaded.unet is None:
        raise UserError(f"{path}: has no unet/: export it again")
    return (loaded.unet, *load_frozen(path, dtype), config)


def parameter_count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
