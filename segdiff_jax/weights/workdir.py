"""What a training run leaves behind: names, what a folder is, config and classes.

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
from typing import Any

from etils import epath

from segdiff_jax import __version__
from segdiff_jax.config import VERSION_KEY, Config, from_dict, stored, to_dict
from segdiff_jax.data.sources.pairing import is_image
from segdiff_jax.errors import UserError
from segdiff_jax.files import is_remote, reading, write_json, write_text
from segdiff_jax.models.unet import UNetConfig
from segdiff_jax.stored import read_object
from segdiff_jax.text import vocabulary
from segdiff_jax.text.vocabulary import Vocabulary
from segdiff_jax.weights import step_folders
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
    photos = sorted(filter(is_image, held))
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
    """Read the classes that a run or an export was trained with; None where it does not say."""
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
        if write:
            if begun:
                told = "does not say which classes it was started with: it goes on with"
                log.warning("%s: %s %s", workdir, told, classes.summary())
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


def joint_folder(path: str, step: int) -> epath.Path:
    """Return the workdir of the joint decoder that goes with the UNet of this step alone."""
    return epath.Path(path) / JOINT_STAGE / str(step)
