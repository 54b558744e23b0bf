"""What a training starts from, checked before anything is loaded or written."""

import dataclasses
import json
import logging
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict

from segdiff_jax import ownership
from segdiff_jax.combinations import check_image_size
from segdiff_jax.config import Config, DiffusionConfig
from segdiff_jax.data.sources.source import PairSource, Source
from segdiff_jax.diffusion.schedule import make_schedule
from segdiff_jax.errors import UserError
from segdiff_jax.files import is_remote, reading
from segdiff_jax.models import presets
from segdiff_jax.parallel.mesh import check_batches, make_mesh
from segdiff_jax.stages import of_stage
from segdiff_jax.weights import hub, loading, mask_decoders, pretrained
from segdiff_jax.weights import workdir as workdirs
from segdiff_jax.weights.pretrained import Described

log = logging.getLogger(__name__)

# What the stored state means. A section stands for all of its keys but those in MAY_DIFFER.
DEFINES_STATE = (
    "seed",  # with the data position, the examples still to come
    "stage",
    "data.source",
    "model",
    "codec.classes_per_pass",
    "codec.context",
    "diffusion",
    "optimizer.method",
    "e2e.noise",
)
MAY_DIFFER = (
    "model.dtype",  # of activations: parameters are float32
    "model.remat",
    "model.zero_init",  # of new networks only
    "diffusion.timestep_spacing",  # the sampler's, as the next two
    "diffusion.set_alpha_to_one",
    "diffusion.steps_offset",
    "diffusion.convert_prediction",  # permits a start, says nothing of the state
)
SWITCHES = ("optimizer.ema_decay",)  # the value may change, zero and not zero may not

KIND = "workdir"  # of a run's names in the marker that lists them (`ownership`)
_TENSORBOARD, _COMPILED = "tensorboard", "compile_cache"
_FOLDERS = (
    *(workdirs.CHECKPOINTS, workdirs.PRETRAINED, workdirs.VAE_STAGE, workdirs.JOINT_STAGE),
    workdirs.LATENTS,
    *(_TENSORBOARD, _COMPILED),
)


def check(config: Config, workdir: str) -> None:
    """Raise `UserError` for what the networks that `config` names cannot do.

    That is the preset, the folder or workdir of `init_from`, or what `workdir` has from an earlier
    start. Only configs are read. The log tells what the run overrides of the folder's schedule.
    """
    preset = presets.architecture(config.model.preset)
    make_schedule(config.diffusion)
    own = epath.Path(workdir) / workdirs.PRETRAINED
    if pretrained.is_whole(own):  # of init_from nothing is read any more
        loading.check_image_size(config, str(own))
    elif config.init_from:
        _check_init_from(config)
    else:
        name = f"model.preset={config.model.preset!r}"
        check_image_size(config, preset.vae.downsampling, name)


def check_start(config: Config, workdir: str) -> None:
    """Raise `UserError` for what the folders, the config and the devices say against the run."""
    if not workdir.strip():
        raise UserError("--workdir is empty: name a folder (is a variable unset?)")
    workdirs.check_new(workdir, config.data.root)
    if workdirs.is_workdir(workdir):
        earlier = (of_stage(c) for c in (workdirs.read_config(workdir), config))
        check_config(*map(workdirs.to_dict, earlier))
    names(config, workdir)
    start = config.init_from
    if start and epath.Path(start).exists() and not _is_start(start):
        workdirs.check_not_inside(start, "config.init_from")
    _check_batches(config, workdir)


def _check_batches(config: Config, workdir: str) -> None:
    """Raise `UserError` unless the batches of all stages of the run divide over the devices."""
    mesh, stages = make_mesh(config.mesh), [config.stage]
    if config.stage not in ("vae", "joint"):
        given = config.init_from or pretrained.is_whole(epath.Path(workdir) / workdirs.PRETRAINED)
        stages += ["vae"] * (not given) + ["joint"] * (config.joint.steps > 0)
    for stage in stages:
        check_batches(mesh, of_stage(dataclasses.replace(config, stage=stage)))


def _is_start(folder: str) -> bool:
    return workdirs.is_workdir(folder) or pretrained.is_whole(folder)


def check_config(stored: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise `UserError` if a run with config `current` cannot continue one with config `stored`.

    Both are nested dictionaries of JSON values (`config.to_dict`). Keys of `DEFINES_STATE` must be
    equal; steps, logging, paths, learning rates, data augmentation and so on may differ.
    """
    old, new = (flatten_dict(json.loads(json.dumps(x)), sep=".") for x in (stored, current))
    differing = []
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if key in SWITCHES:
            before, now = bool(before), bool(now)
        elif key in MAY_DIFFER or not any(f"{key}.".startswith(f"{s}.") for s in DEFINES_STATE):
            continue
        if before != now:
            differing.append(f"config.{key} was {old.get(key)!r} and is now {new.get(key)!r}")
    if differing:
        more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
        raise UserError(
            f"the checkpoint contradicts the config: {'; '.join(differing[:3])}{more}: "
            "restore these values, or start in a new --workdir with config.init_from"
        )


def names(config: Config, workdir: str) -> set[str]:
    """Return the names at the top of `workdir` that this run may write, or an earlier start wrote.

    The lock is not among them. Raises `UserError` where one of these names is taken and the
    folder's marker does not list it. A workdir of a version that kept no list owns what lies there
    under the names of a run.
    """
    with reading(workdir):
        folder = epath.Path(workdir)
        held = {path.name: path for path in folder.iterdir()} if folder.is_dir() else {}
        wanted, listed = _wanted(config, folder), ownership.owned(folder).get(KIND)
        if listed is None and workdirs.is_workdir(workdir):
            return wanted | ({"config.json", workdirs.CLASSES, *_FOLDERS} & held.keys())
        foreign = (wanted & held.keys()) - (listed or frozenset())
        folders = {name for name in foreign if held[name].is_dir()}
        foreign -= {name for name in folders if not any(held[name].iterdir())}
    # To these is only added: such a folder may be the user's, and then stays off the list.
    shared = foreign & folders & {_TENSORBOARD, _COMPILED}
    ownership.check(folder, KIND, foreign - shared)
    # But JAX makes compile_cache before we look here: it is ours, though no marker lists it yet.
    return (wanted - shared) | (wanted & {_COMPILED})


def _wanted(config: Config, folder: epath.Path) -> set[str]:
    """Return the names that a run with `config` writes at the top of its workdir."""
    wanted = {"config.json", workdirs.CLASSES, workdirs.CHECKPOINTS, workdirs.PRETRAINED}
    wanted |= {_TENSORBOARD}
    if is_remote(folder):
        wanted |= {_COMPILED}
    if config.stage == "joint":
        wanted |= {mask_decoders.JOINT}
    if config.stage in ("vae", "joint"):
        return wanted
    wanted |= {mask_decoders.LINEAR}
    if config.joint.steps:
        wanted |= {workdirs.JOINT_STAGE}
    if config.data.cache_latents:
        wanted |= {workdirs.LATENTS}
    if not config.init_from and not pretrained.is_whole(folder / workdirs.PRETRAINED):
        wanted |= {workdirs.VAE_STAGE}
    return wanted


def check_source(config: Config, source: Source) -> None:
    """Raise `UserError` for settings that `source` leaves without effect.

    `train.balance` where each pass shows every class, and `codec.logit_adjustment` where nobody
    counts the classes.
    """
    trained = len(source.vocabulary) - len(source.novel)
    group, balance = config.codec.classes_per_pass, config.train.balance
    if config.stage == "diffusion" and balance and group >= trained > 1:
        raise UserError(
            f"config.train.balance={balance}: must be 0 with config.codec.classes_per_pass={group} "
            f"of {trained} classes: a pass that shows every class has nothing to weigh it against"
        )
    if config.codec.logit_adjustment and not isinstance(source, PairSource):
        raise UserError(
            f"config.codec.logit_adjustment={config.codec.logit_adjustment}: must be 0 with "
            f"config.data.source={config.data.source!r}, whose labels are not counted"
        )


def folder(init_from: str) -> str:
    """Return `init_from` itself, or in a workdir the folder with the frozen networks."""
    own = workdirs.is_workdir(init_from)
    return str(epath.Path(init_from) / workdirs.PRETRAINED) if own else init_from


def _check_init_from(config: Config) -> None:
    start = config.init_from
    if config.stage == "e2e":
        _check_trained(config)
    if not workdirs.is_workdir(start):
        alone = config.stage == "vae"
        needed = ("vae",) if alone else pretrained.COMPONENTS
        found = pretrained.describe(start, needed, config.init_variant or None)
        if pretrained.is_single_file(start) and not alone:
            pretrained.find_tokenizer(epath.Path(start), config.init_tokenizer)
        assert found.vae is not None
        check_image_size(config, found.vae.downsampling, f"the VAE of {start}")
        if not alone:
            _check_parts(found, start)
            _compare(config, found.schedule, start)
        return
    if config.init_variant:
        raise UserError(
            f"config.init_variant={config.init_variant!r}: must be empty, for {start} is a "
            "training workdir, which has one set of weights"
        )
    trained = workdirs.read_config(start)
    if trained.stage == "joint":  # which has nothing of the networks that it was trained on
        workdirs.check_not_inside(start, "config.init_from")
    if not pretrained.is_whole(folder(start)):
        raise UserError(
            f"config.init_from={start}: this training has no {workdirs.PRETRAINED}/ yet, its VAE "
            "stage is not done: let it go on, or name another"
        )
    loading.check_image_size(config, folder(start))
    if "vae" not in (config.stage, trained.stage):
        _compare(config, trained.diffusion, start)


def _check_trained(config: Config) -> None:
    """Raise `UserError` unless the UNet to go on from paints masks, one class a pass."""
    start = config.init_from
    needs = f"config.init_from={start}: config.stage='e2e' goes on from a diffusion training"
    try:
        trained = workdirs.read_config(hub.local(start))
    except UserError as error:
        workdirs.check_not_inside(start, "config.init_from")
        raise UserError(f"{needs}: {error}") from error
    if trained.stage == "vae":
        raise UserError(f"{needs}, and this is one of the VAE stage: name another")
    for key in ("classes_per_pass", "context"):
        had, wanted = (getattr(c.codec, key) for c in (trained, config))
        if had != wanted:
            raise UserError(f"{needs} with config.codec.{key}={wanted!r}, this one has {had!r}")


def _check_parts(found: Described, start: str) -> None:
    """Raise `UserError` for networks of a folder that do not fit each other."""
    unet, vae, text = found.unet, found.vae, found.text_encoder
    if unet and vae and unet.out_channels != vae.latent_channels:
        raise UserError(
            f"{start}: the UNet paints {unet.out_channels} channels, but the VAE's latents have "
            f"{vae.latent_channels}: these parts are of two models"
        )
    if unet and text and unet.cross_attention_dim != text.hidden_size:
        raise UserError(
            f"{start}: the UNet attends to text of width {unet.cross_attention_dim}, but the text "
            f"encoder's is {text.hidden_size}: these parts are of two models"
        )


def _compare(config: Config, trained: DiffusionConfig | None, start: str) -> None:
    """Compare what the UNet of `start` was trained on with what this run trains it on."""
    wanted = config.diffusion
    if trained is None:
        log.warning(
            "%s: has no scheduler/, so nothing says what its UNet was trained to predict: taken to "
            "be config.diffusion.prediction_type=%r, with the config's betas",
            start,
            wanted.prediction_type,
        )
        return
    kind, asked = trained.prediction_type, wanted.prediction_type
    if kind != asked and not wanted.convert_prediction:
        noise = " --config.diffusion.rescale_betas_zero_snr=False" if kind == "epsilon" else ""
        raise UserError(
            f"config.diffusion.prediction_type={asked!r}: but the UNet of {start} was trained to "
            f"predict {kind!r}: go on so with --config.diffusion.prediction_type={kind}{noise}, or "
            f"set --config.diffusion.convert_prediction=true to fine-tune it to {asked}"
        )
    before, now = (dataclasses.asdict(schedule) for schedule in (trained, wanted))
    differing = [key for key in before if before[key] != now[key] and key != "convert_prediction"]
    if differing:
        log.info(
            "%s was trained with %s; this run uses %s",
            start,
            ", ".join(f"{key}={before[key]}" for key in differing),
            ", ".join(f"{key}={now[key]}" for key in differing),
        )
