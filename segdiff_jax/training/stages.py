"""The two stages of training, from a config to a finished workdir."""

import contextlib
import dataclasses
import logging
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from segdiff_jax import __version__, codec, ownership
from segdiff_jax.config import Config, of_stage
from segdiff_jax.data import label_summary, latent_cache, latents, pipeline, preference
from segdiff_jax.data.sources.source import Source, open_source
from segdiff_jax.diffusion.schedule import make_schedule
from segdiff_jax.errors import UserError
from segdiff_jax.models import flops, presets
from segdiff_jax.models.clip_text import CLIPText
from segdiff_jax.models.unet import UNet, UNetConfig
from segdiff_jax.models.vae import VAE
from segdiff_jax.parallel import attention_kernels, processes, sharding
from segdiff_jax.parallel.placement import placer
from segdiff_jax.text import conditioning
from segdiff_jax.text.conditioning import prompts
from segdiff_jax.text.tokenizer import Tokenizer, train_tokenizer
from segdiff_jax.text.vocabulary import Vocabulary
from segdiff_jax.training import lock, loop, mask_decoder, origin
from segdiff_jax.training.step import Frozen, TrainState, diffusion_step, init_state, vae_step
from segdiff_jax.training.throughput import StartUp
from segdiff_jax.weights import pretrained
from segdiff_jax.weights import workdir as workdirs
from segdiff_jax.weights.checkpoint import Checkpoints, check_config
from segdiff_jax.weights.pretrained import Pretrained

log = logging.getLogger(__name__)

_SCALING_EXAMPLES = 64

# (first example, rows that this process feeds) -> batches from there on
Batches = Callable[[int, list[int]], pipeline.TrainBatches]


# (networks, config, mesh, classes) -> what judges them while they are trained
MakeValidator = Callable[[Pretrained, Config, Mesh, Vocabulary], loop.Validate]


def train(
    config: Config,
    workdir: str,
    startup: StartUp | None = None,
    make_validator: MakeValidator | None = None,
    nested: bool = False,
) -> None:
    """Runs `config.stage` in `workdir`, the VAE stage before it where it is needed.

    Continues from the newest checkpoint in `workdir`. Every process of the run calls this, and all
    see the same `workdir`, which is locked meanwhile (`lock.held`). Nothing is written there before
    all is known that could forbid it. Raises `UserError` for what a user can mend and
    `loop.Stopped` after a signal. `startup` tells in the log what the time to the first step went
    to. `make_validator` is asked where `config.train.eval_every` is set. `nested`: a stage before
    another, which has told the log of classes and labels.
    """
    startup = startup or StartUp()
    _check_start(config, workdir)
    origin.check(config, workdir)
    source = open_source(config.data, config.data.train_split, config.seed)
    origin.check_balance(config, source)
    workdirs.settle_classes(workdir, source.vocabulary, write=False)
    if config.train.eval_every and config.stage != "vae":
        open_source(config.data, config.data.val_split, config.seed)
    if not nested and processes.is_first():
        log.info("%s", source.vocabulary.summary())
        label_summary.report(source, config.data, config.data.train_split)
    startup.done("data")
    processes.barrier()  # all have looked
    held = lock.held(workdir) if processes.is_first() else contextlib.nullcontext()
    with held as guard, contextlib.ExitStack() as until_end:
        processes.barrier()
        _check_start(config, workdir)  # who held the lock before may have begun something
        run = Run(config, workdir, source, startup, guard, make_validator, until_end)
        if config.stage == "vae":
            _train_vae(run)
        else:
            _train_diffusion(run)
            mask_decoder.settle(config, workdir, source)


class Run(NamedTuple):
    """What all parts of a start need."""

    config: Config
    workdir: str
    source: Source
    startup: StartUp
    guard: Callable[[], None] | None  # of `Checkpoints`; in the first process
    make_validator: MakeValidator | None
    until_end: contextlib.ExitStack  # left before the lock is


def _check_start(config: Config, workdir: str) -> None:
    """Raises `UserError` for what the folders, the config and the devices say against the run."""
    if not workdir.strip():
        raise UserError("--workdir is empty: name a folder (is a variable unset?)")
    workdirs.check_new(workdir, config.data.root)
    if workdirs.is_workdir(workdir):
        earlier = (of_stage(c) for c in (workdirs.read_config(workdir), config))
        check_config(*map(workdirs.to_dict, earlier))
    origin.names(config, workdir)
    start = config.init_from
    if start and epath.Path(start).exists() and not _is_start(start):
        workdirs.check_not_inside(start, "config.init_from")
    mesh = sharding.make_mesh(config.mesh)
    sharding.local_rows(mesh, of_stage(config).train.batch_size)
    own_vae = config.stage != "vae" and not start
    if own_vae and not pretrained.is_whole(epath.Path(workdir) / workdirs.PRETRAINED):
        sharding.local_rows(mesh, config.vae.batch_size)


def _is_start(folder: str) -> bool:
    return workdirs.is_workdir(folder) or pretrained.is_whole(folder)


def _begin(run: Run) -> None:
    """Marks the folder as the workdir of this run, unless it is that already.

    The marker that lists what is ours there comes first.
    """
    if processes.is_first():
        names = origin.names(run.config, run.workdir)
        run.until_end.enter_context(ownership.adopted(run.workdir, origin.KIND, names))
    if not processes.all_agree(workdirs.is_workdir(run.workdir)):
        _write_config(run)
        if not workdirs.is_workdir(run.workdir):
            raise UserError(
                f"{run.workdir}: process {processes.index()} does not see what process 0 wrote "
                "there: choose a --workdir that all machines share, such as gs://..."
            )
    write = processes.is_first()
    workdirs.settle_classes(run.workdir, run.source.vocabulary, write=write)


def _write_config(run: Run) -> None:
    if processes.is_first():
        workdirs.write_config(run.workdir, run.config)
    processes.barrier()


def _train_vae(run: Run) -> None:
    config, workdir = of_stage(run.config), run.workdir
    own = run._replace(config=config)
    finished = epath.Path(workdir) / workdirs.PRETRAINED
    if pretrained.is_whole(finished):
        done = _newest_step(workdir) or config.train.steps  # whose checkpoints are gone is done
        if done >= config.train.steps:
            _nothing_to_do(own, done)
            return
    _check_prompts(config, run.source.vocabulary)
    processes.barrier()  # all have looked
    mesh, given = sharding.make_mesh(config.mesh), None
    if config.init_from:
        folder = origin.folder(config.init_from)
        given = pretrained.load(
            folder, ("vae",), variant=origin.variant(config), place=placer(mesh)
        ).vae
    _begin(run)
    vae = given or nnx.eval_shape(lambda: _new_vae(config))
    attention = attention_kernels.on_mesh(mesh)
    graph, params = nnx.split(attention_kernels.with_attention(vae, attention))
    make = None if given else lambda: nnx.state(_new_vae(config))
    run.startup.done("weights")
    step = vae_step(graph, config, mesh)
    work = flops.train_example(None, vae.config, config.data.image_size, 0)
    state = _run(own, mesh, _batches(own), step, None, params, make, None, work)
    params = processes.gathered(state.ema or state.params)
    if processes.is_first():
        with processes.at_work("writes the VAE"):
            vae = _with_scaling(nnx.merge(graph, params), config, run.source)
            text_encoder, tokenizer = _new_text(config, run.source.vocabulary)
            networks = Pretrained(
                vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, schedule=config.diffusion
            )
            pretrained.save(networks, str(finished))
    processes.barrier()


def _train_diffusion(run: Run) -> None:
    config, workdir = run.config, run.workdir
    dtype, mesh = jnp.dtype(config.model.dtype), sharding.make_mesh(config.mesh)
    # What a checkpoint of this run replaces need not be read.
    saved = _saved_unet_config(config, workdir)
    given = None if saved else _given_unet(config, dtype, mesh)
    vae, text_encoder, tokenizer = _frozen_networks(run, dtype)
    entries = run.source.vocabulary.classes
    table = conditioning.encode_prompts(text_encoder, tokenizer, entries, config.prompts.templates)
    attention = attention_kernels.on_mesh(mesh)
    vae_graph, vae_params = nnx.split(attention_kernels.with_attention(vae, attention))
    frozen = Frozen(vae_params, make_schedule(config.diffusion), table)
    unet_config = saved or (
        given.config
        if given
        else presets.unet_between(
            config.model.preset, vae.config.latent_channels, text_encoder.config.hidden_size
        )
    )
    build = lambda: UNet(  # noqa: E731
        unet_config,
        attention=attention,
        dtype=dtype,
        remat=config.model.remat,
        zero_init=config.model.zero_init,
        rngs=nnx.Rngs(config.seed),
    )
    unet = nnx.eval_shape(build)
    graph, params = nnx.split(unet)
    make = None if given else lambda: nnx.state(build())
    if given is not None:
        params = nnx.state(given)
        del given
    step = diffusion_step(graph, vae_graph, config, mesh)
    validate = None
    if config.train.eval_every and run.make_validator:
        networks = Pretrained(unet, vae, text_encoder, tokenizer)
        validate = run.make_validator(networks, config, mesh, run.source.vocabulary)
    preferred = preference.of_training(run.source, config, np.asarray(table.pooled))
    batches = _batches(run, vae if config.data.cache_latents else None, preferred)
    group = codec.group_size(len(entries), config.codec.classes_per_pass)
    tokens = group if config.codec.context == "bound" else table.hidden.shape[1]
    cached = config.data.cache_latents
    work = flops.train_example(unet_config, vae.config, config.data.image_size, tokens, cached)
    run.startup.done("weights")
    _run(run, mesh, batches, step, frozen, params, make, unet_config, work, validate)


def _frozen_networks(run: Run, dtype: Any) -> tuple[VAE, CLIPText, Any]:
    """The networks that are not trained; copied into the workdir first where they are not yet."""
    folder = epath.Path(run.workdir) / workdirs.PRETRAINED
    missing = not pretrained.is_whole(folder)
    processes.barrier()  # all have looked
    if not missing:
        _begin(run)
        return workdirs.load_frozen(str(folder), dtype)
    if not run.config.init_from:
        _begin(run)  # the VAE stage takes its time, in a folder below
    start = _starting_point(run)
    variant, tokenizer = origin.variant(run.config), run.config.init_tokenizer
    kept = workdirs.load_frozen(start, jnp.dtype(jnp.float32), variant, tokenizer)
    _begin(run)
    if processes.is_first():
        with processes.at_work("copies the frozen networks"):
            pretrained.save(Pretrained(None, *kept, run.config.diffusion), str(folder))
    processes.barrier()
    return workdirs.load_frozen(str(folder), dtype)


def _nothing_to_do(run: Run, done: int) -> None:
    key = "vae.steps" if run.config.stage == "vae" else "train.steps"
    log.info(
        "%s: nothing to do: the %s stage has done %d steps, and config.%s is %d: raise it to go on",
        run.workdir,
        run.config.stage,
        done,
        key,
        run.config.train.steps,
    )


def _newest_step(workdir: str) -> int | None:
    folder = epath.Path(workdir) / workdirs.CHECKPOINTS
    if not processes.all_agree(folder.exists()):
        return None
    with Checkpoints(folder, read_only=True) as checkpoints:
        return checkpoints.latest_step()


def _starting_point(run: Run) -> str:
    """The folder with the frozen networks: given, or made by the VAE stage first."""
    config = run.config
    if config.init_from:
        return origin.folder(config.init_from)
    # A trace of the profiler is of the stage that was asked for.
    untraced = dataclasses.replace(config.train, profile_steps=0)
    first = dataclasses.replace(config, stage="vae", train=untraced)
    folder = str(epath.Path(run.workdir) / workdirs.VAE_STAGE)
    train(first, folder, run.startup, nested=True)
    return str(epath.Path(folder) / workdirs.PRETRAINED)


def _saved_unet_config(config: Config, workdir: str) -> UNetConfig | None:
    """The architecture in the checkpoints of a run that began from `init_from`, if it has any."""
    folder = epath.Path(workdir) / workdirs.CHECKPOINTS
    if not config.init_from or not processes.all_agree(folder.exists()):
        return None
    with Checkpoints(folder, read_only=True) as checkpoints:
        if checkpoints.latest_step() is None:
            return None
        saved = checkpoints.metadata()
        return workdirs.unet_config_from(saved["unet"], str(folder), saved)


def _given_unet(config: Config, dtype: Any, mesh: Mesh) -> UNet | None:
    """The UNet of `init_from`, if it has one: a workdir of this stage, or a pretrained folder.

    Its arrays are read straight to where the mesh wants them.
    """
    if not config.init_from:
        return None
    if not workdirs.is_workdir(config.init_from):
        return pretrained.load(
            config.init_from,
            ("unet",),
            variant=origin.variant(config),
            dtype=dtype,
            widen_conv_in=True,
            place=placer(mesh),
        ).unet
    if workdirs.read_config(config.init_from).stage != "diffusion":
        return None
    return workdirs.load_unet(config.init_from, mesh=mesh)[0]


def _new_vae(config: Config) -> VAE:
    architecture = presets.architecture(config.model.preset)
    dtype = jnp.dtype(config.model.dtype)
    return VAE(architecture.vae, dtype=dtype, rngs=nnx.Rngs(config.seed))


def _new_text(config: Config, vocabulary: Vocabulary) -> tuple[CLIPText, Tokenizer]:
    """A tokenizer that knows the vocabulary's words, and a random encoder for it."""
    tokenizer = _new_tokenizer(config, vocabulary)
    architecture = presets.architecture(config.model.preset).text_encoder
    fitted = dataclasses.replace(architecture, vocab_size=tokenizer.vocab_size)
    build = nnx.jit(lambda: CLIPText(fitted, rngs=nnx.Rngs(config.seed)))
    return build(), tokenizer


def _new_tokenizer(config: Config, vocabulary: Vocabulary) -> Tokenizer:
    architecture = presets.architecture(config.model.preset).text_encoder
    templates = config.prompts.templates
    sentences = [text for entry in vocabulary.classes for text in prompts(entry, templates)]
    return train_tokenizer(sentences, architecture.vocab_size, architecture.max_position_embeddings)


def _check_prompts(config: Config, vocabulary: Vocabulary) -> None:
    """Raises before the VAE's training what would stop the training after it."""
    tokenizer = _new_tokenizer(config, vocabulary)
    conditioning.prompt_ids(tokenizer, vocabulary.classes, config.prompts.templates)


def _with_scaling(vae: VAE, config: Config, source: Source) -> VAE:
    """`vae` with the scaling factor that gives training latents unit variance."""
    with contextlib.closing(
        pipeline.train_batches(source, config, config.seed, batch_size=_SCALING_EXAMPLES)
    ) as batches:
        rows = next(batches)
    batch = {name: jnp.asarray(values) for name, values in rows.items()}
    pixels = jnp.concatenate(
        [codec.to_pixels(batch["image"]), codec.mask_images(batch["labels"], batch["class_ids"])]
    )
    graph, params = nnx.split(vae)
    mean, _ = jax.jit(lambda p, x: nnx.merge(graph, p).encode(x))(params, pixels)
    spread = float(np.std(mean))
    if not 1e-4 <= spread <= 1e4:  # what `read_vae` takes for a scale
        raise UserError(
            f"the VAE that was trained gives latents of standard deviation {spread:g}: it has not "
            "learnt its images: give config.vae more steps, or another learning_rate"
        )
    vae.config = dataclasses.replace(vae.config, scaling_factor=1.0 / spread)
    return vae


def _batches(
    run: Run, vae: VAE | None = None, preferred: preference.Preference | None = None
) -> Batches:
    """A function that starts the batches; with `vae`, from the latent cache of the workdir."""
    config, source = run.config, run.source

    def start(example: int, rows: list[int]) -> pipeline.TrainBatches:
        if vae is None:
            return pipeline.train_batches(
                source, config, config.seed, example, rows, preference=preferred
            )
        folder = str(epath.Path(run.workdir) / workdirs.LATENTS)
        stored = latent_cache.open_or_build(source, vae, config, folder)
        return latents.train_batches(
            stored, config, config.seed, example, rows, preference=preferred
        )

    return start


def _run(
    run: Run,
    mesh: Mesh,
    batches: Batches,
    step: Any,
    frozen: Frozen | None,
    params: Any,
    make: Callable[[], Any] | None,
    unet_config: UNetConfig | None,
    work: float,
    validate: loop.Validate | None = None,
) -> TrainState:
    """Places the state on `mesh`, newest checkpoint first, and trains it to the end.

    `params` are arrays on the mesh, or shapes that `make` fills; `work`: FLOPs of one example.
    """
    config, workdir, startup = run.config, run.workdir, run.startup
    rows = sharding.local_rows(mesh, config.train.batch_size)
    abstract = jax.eval_shape(lambda p: init_state(p, config), params)
    shardings = sharding.state_sharding(abstract, mesh)
    metadata = {
        **workdirs.checkpoint_metadata(config, unet_config),
        "next_example": 0,  # moves on with each checkpoint
        "code": code_version(),
    }
    with Checkpoints(
        epath.Path(workdir) / workdirs.CHECKPOINTS,
        keep=config.train.keep_checkpoints,
        best_metric=workdirs.BEST_METRIC,  # also where this part of the run does not validate
        guard=run.guard,
    ) as checkpoints:
        if checkpoints.latest_step() is not None:
            state, stored = checkpoints.restore(sharding.abstract(abstract, shardings))
            done, written_by = int(state.step), stored.get("code", "unknown")
            if done >= config.train.steps:
                if config.stage != "vae":  # which has its networks to write
                    _nothing_to_do(run, done)
                return state
            # Without one, it is a checkpoint of the first version.
            position = stored.get("next_example", done * config.train.batch_size)
            metadata["next_example"] = position
            log.info("%s: resuming at step %d, example %d", workdir, done, position)
            if written_by != metadata["code"]:
                log.info("the checkpoint is of code %s, this is %s", written_by, metadata["code"])
        elif make is not None:
            create = jax.jit(lambda: init_state(make(), config), out_shardings=shardings)
            state = create()
        else:
            state = jax.jit(lambda p: init_state(p, config), out_shardings=shardings)(params)
        _write_config(run)  # what may change in a run, its steps for one, may have changed
        if frozen is not None:
            frozen = sharding.place(frozen, sharding.replicated(mesh))
        log.info("%s: %.2f M parameters", config.stage, workdirs.parameter_count(params) / 1e6)
        startup.done("restore" if int(state.step) else "state")
        trained = loop.run(
            config,
            workdir,
            step,
            state,
            frozen,
            batches(metadata["next_example"], rows),
            mesh,
            checkpoints,
            metadata,
            work * config.train.batch_size,
            validate,
            startup,
        )
    startup.restart()  # if another stage follows
    return trained


def code_version() -> str:
    """The package's version, and its commit where it runs from a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return __version__
    try:
        command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+{found.stdout.strip()}"
