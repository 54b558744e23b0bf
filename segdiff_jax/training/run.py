"""A training, from a config to a finished workdir.

config, workdir ─► checks: folders, networks, data, devices          nothing is written yet
                ─► lock, marker, config.json, classes.json
  stage "vae"        ─► VAE                              ┐
  stage "diffusion"  ─► the frozen VAE and text encoder, ├─► Setup ─► loop ─► the last state
    which the VAE    └► UNet ────────────────────────────┤
    stage makes first where nothing gives them           │
  stage "e2e"        ─► the same, of a diffusion training│
  stage "joint"      ─► the same and a decoder, last ────┘
"""

import contextlib
import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from segdiff_jax import codec, ownership
from segdiff_jax.config import Config
from segdiff_jax.data import preference, survey
from segdiff_jax.data.sources.source import open_source
from segdiff_jax.diffusion.schedule import make_schedule
from segdiff_jax.errors import UserError
from segdiff_jax.models import flops, presets
from segdiff_jax.models.clip_text import CLIPText
from segdiff_jax.models.unet import UNet
from segdiff_jax.models.vae import VAE
from segdiff_jax.parallel import attention_kernels, mesh, processes
from segdiff_jax.stages import key_of, of_stage
from segdiff_jax.text import conditioning
from segdiff_jax.training import joint, lock, mask_decoder, networks, origin, setup
from segdiff_jax.training.loop import MakeValidator, Run, Stage, loop
from segdiff_jax.training.losses import Frozen
from segdiff_jax.training.step import TrainState, diffusion_step, e2e_step, vae_step
from segdiff_jax.training.timing import StartUp
from segdiff_jax.weights import loading, mask_decoders, pretrained
from segdiff_jax.weights import workdir as workdirs
from segdiff_jax.weights.checkpoint import Checkpoints
from segdiff_jax.weights.pretrained import Pretrained

log = logging.getLogger(__name__)


def train(
    config: Config,
    workdir: str,
    startup: StartUp | None = None,
    make_validator: MakeValidator | None = None,
    nested: bool = False,
    followed: bool = False,
) -> None:
    """Run `config.stage` in `workdir`, the VAE stage before it where it is needed.

    Continues from the newest checkpoint in `workdir`. Every process of the run calls this, and all
    see the same `workdir`, which is locked meanwhile (`lock.held`). Nothing is written there before
    all is known that could forbid it. Raises `UserError` for what a user can mend and `Stopped`
    after a signal. `startup` tells in the log what the time to the first step went to.
    `make_validator` is asked where `config.train.eval_every` is set. `nested`: a stage of another
    training, which has told the log of classes and labels. `followed`: more comes after this, so
    that a signal counts in its last step too.
    """
    startup = startup or StartUp()
    origin.check_start(config, workdir)
    origin.check(config, workdir)
    source = open_source(config.data, config.data.train_split, config.seed)
    origin.check_source(config, source)
    workdirs.settle_classes(workdir, source.vocabulary, write=False)
    if config.train.eval_every and config.stage != "vae":
        open_source(config.data, config.data.val_split, config.seed)
    shares: tuple[float, ...] = ()
    if not nested and processes.is_first():
        log.info("%s", source.vocabulary.summary())
        shares = survey.report(source, config.data, config.data.train_split)
    startup.done("data")
    processes.barrier()  # all have looked
    held = lock.held(workdir) if processes.is_first() else contextlib.nullcontext()
    with held as guard:
        processes.barrier()
        origin.check_start(config, workdir)  # who held the lock before may have begun something
        devices = mesh.make_mesh(config.mesh)
        run = Run(of_stage(config), workdir, source, devices, startup, make_validator, guard)
        run.shares = shares
        joint_follows = config.stage not in ("vae", "joint") and config.joint.steps > 0
        run.followed = followed or joint_follows
        with run.until_end:
            if config.stage == "vae":
                _train_vae(run)
            elif config.stage == "joint":
                _begin(run)
                joint.write(run, _train(run, joint.prepare(run)))
            else:
                _train(run, _unet_stage(run))
                mask_decoder.settle(config, workdir, source)
                startup.done("linear decoder")
                if config.joint.steps:
                    _train_joint(run)


def _begin(run: Run) -> None:
    """Mark the folder as the workdir of this run, unless it is that already.

    The marker that lists what is ours there comes first.
    """
    if processes.is_first():
        names = origin.names(run.config, run.workdir)
        run.until_end.enter_context(
            ownership.claimed(run.workdir, origin.KIND, names, checked=False)
        )
    if not processes.all_agree(workdirs.is_workdir(run.workdir)):
        setup.write_config(run)
        if not workdirs.is_workdir(run.workdir):
            raise UserError(
                f"{run.workdir}: process {processes.index()} does not see what process 0 wrote "
                "there: choose a --workdir that all machines share, such as gs://..."
            )
    write = processes.is_first()
    counted = dataclasses.replace(run.source.vocabulary, shares=run.shares)
    workdirs.settle_classes(run.workdir, counted, write=write)


def _train_vae(run: Run) -> None:
    """Train the VAE and write `pretrained/`, from which the next stage begins."""
    config, finished = run.config, epath.Path(run.workdir) / workdirs.PRETRAINED
    if pretrained.is_whole(finished):
        done = _newest_step(run.workdir) or config.train.steps  # whose checkpoints are gone is done
        if done >= config.train.steps:
            _nothing_to_do(run, done)
            return
    networks.check_prompts(config, run.source.vocabulary)
    processes.barrier()  # all have looked
    vae, build = networks.vae_to_train(config, run.mesh)
    _begin(run)
    attention = attention_kernels.on_mesh(run.mesh)
    graph = nnx.graphdef(attention_kernels.with_attention(vae, attention))
    work = flops.example(config, None, vae.config, 0)
    state = _train(run, Stage(vae, build, vae_step(graph, config, run.mesh), None, work))
    params = processes.gathered(state.ema or state.params)
    if processes.is_first():
        with processes.at_work("writes the VAE"):
            vae = networks.with_scaling(nnx.merge(graph, params), config, run.source)
            text_encoder, tokenizer = networks.new_text(config, run.source.vocabulary)
            parts = Pretrained(None, vae, text_encoder, tokenizer, config.diffusion)
            pretrained.save(parts, str(finished))
    processes.barrier()


def _unet_stage(run: Run) -> Stage:
    """Prepare the "diffusion" or "e2e" stage."""
    config, workdir, classes = run.config, run.workdir, run.source.vocabulary
    start = networks.start_of_unet(config, workdir, run.mesh)
    vae, text_encoder, tokenizer = _frozen_networks(run)
    if start is None:
        widths = vae.config.latent_channels, text_encoder.config.hidden_size
        start = presets.unet_between(config.model.preset, *widths)
    unet, build = networks.unet_to_train(config, run.mesh, start)
    table = conditioning.encode_prompts(
        text_encoder, tokenizer, classes.classes, config.prompts.templates
    )
    attention = attention_kernels.on_mesh(run.mesh)
    vae_graph, vae_params = nnx.split(attention_kernels.with_attention(vae, attention))
    graph, params = nnx.split(unet)
    validate = None
    if config.train.eval_every and run.make_validator:
        shapes = nnx.merge(graph, jax.eval_shape(lambda p: p, params))
        judged = Pretrained(shapes, vae, text_encoder, tokenizer)
        validate = run.make_validator(judged, config, run.mesh, classes)
    group = codec.group_size(len(classes), config.codec.classes_per_pass)
    tokens = group if config.codec.context == "bound" else table.hidden.shape[1]
    make_step, decoder = diffusion_step, None
    if config.stage == "e2e":
        make_step = e2e_step
        if config.e2e.decoder == "linear":
            mask_decoder.settle(config, workdir, run.source)
            decoder = mask_decoders.read_linear(workdir, vae.config)
    return Stage(
        network=unet,
        build=build,
        step=make_step(graph, vae_graph, config, run.mesh),
        frozen=Frozen(vae_params, make_schedule(config.diffusion), table, decoder),
        flops=flops.example(config, unet.config, vae.config, tokens),
        encoder=vae if config.data.cache_latents else None,
        preferred=preference.of_training(run.source, config, np.asarray(table.pooled)),
        validate=validate,
    )


def _train_joint(run: Run) -> None:
    """Train the joint decoder of the finished UNet, in a folder below."""
    config, workdir = run.config, run.workdir
    last = dataclasses.replace(
        config, stage="joint", init_from=workdir, init_variant="", init_tokenizer=""
    )
    step = _newest_step(workdir)
    assert step is not None  # the end of a training is a checkpoint
    train(last, str(workdirs.joint_folder(workdir, step)), run.startup, nested=True)
    if processes.is_first():  # the UNet may have been finished before a decoder was asked for
        stored = workdirs.read_config(workdir)
        settled = dataclasses.replace(stored, joint=config.joint, sampler=config.sampler)
        if settled != stored:
            workdirs.write_config(workdir, settled)
    processes.barrier()


def _frozen_networks(run: Run) -> tuple[VAE, CLIPText, Any]:
    """Load the networks that are not trained; copy them into the workdir first."""
    config, dtype = run.config, jnp.dtype(run.config.model.dtype)
    folder = epath.Path(run.workdir) / workdirs.PRETRAINED
    missing = not pretrained.is_whole(folder)
    processes.barrier()  # all have looked
    if not missing:
        _begin(run)
        return loading.load_frozen(str(folder), dtype)
    if config.init_from:
        start = origin.folder(config.init_from)
    else:
        _begin(run)  # the VAE stage takes its time, in a folder below
        start = _train_vae_first(run)
    variant, tokenizer = config.init_variant or None, config.init_tokenizer
    kept = loading.load_frozen(start, jnp.dtype(jnp.float32), variant, tokenizer)
    if config.init_from:
        _begin(run)
    if processes.is_first():
        with processes.at_work("copies the frozen networks"):
            pretrained.save(Pretrained(None, *kept, config.diffusion), str(folder))
    processes.barrier()
    return loading.load_frozen(str(folder), dtype)


def _train_vae_first(run: Run) -> str:
    """Run the VAE stage in a folder below; return the folder of the networks that it leaves."""
    # A trace of the profiler is of the stage that was asked for.
    untraced = dataclasses.replace(run.config.train, profile_steps=0)
    first = dataclasses.replace(run.config, stage="vae", train=untraced)
    folder = epath.Path(run.workdir) / workdirs.VAE_STAGE
    train(first, str(folder), run.startup, nested=True, followed=True)
    return str(folder / workdirs.PRETRAINED)


def _nothing_to_do(run: Run, done: int) -> None:
    stage = run.config.stage
    log.info(
        "%s: %sthe %s stage has done %d steps, and config.%s is %d: raise it to go on with it",
        run.workdir,
        "" if run.followed else "nothing to do: ",
        stage,
        done,
        key_of(stage, "train.steps"),
        run.config.train.steps,
    )


def _newest_step(workdir: str) -> int | None:
    folder = epath.Path(workdir) / workdirs.CHECKPOINTS
    if not processes.all_agree(folder.exists()):
        return None
    with Checkpoints(folder, read_only=True) as checkpoints:
        return checkpoints.latest_step()


def _train(run: Run, stage: Stage) -> TrainState:
    """Train a stage from its newest checkpoint to its end and return the state there."""
    run.startup.done("weights")
    with Checkpoints(
        epath.Path(run.workdir) / workdirs.CHECKPOINTS,
        keep=run.config.train.keep_checkpoints,
        best_metric=workdirs.BEST_METRIC,  # also where this part of the run does not validate
        guard=run.guard,
    ) as checkpoints:
        state, stored = setup.newest_state(run, stage, checkpoints)
        done, config = int(state.step), run.config
        if done >= config.train.steps:
            if config.stage != "vae":  # which has its networks to write
                _nothing_to_do(run, done)
            return state
        if isinstance(stage.network, UNet):
            joint.forget_after(done, run.workdir)
        prepared = setup.set_up(run, stage, checkpoints, state, stored)
        del state, stage  # the loop's steps reuse their memory
        trained = loop(prepared)
    run.startup.restart()  # if another stage follows
    return trained
