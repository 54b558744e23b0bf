"""The two stages of training, from a config to a finished workdir."""

import dataclasses
import logging
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from segdiff_jax import __version__, conditioning
from segdiff_jax import workdir as workdirs
from segdiff_jax.config import Config
from segdiff_jax.data import latents, pipeline
from segdiff_jax.data.prompts import prompts
from segdiff_jax.data.sources import Source, open_source
from segdiff_jax.data.vocabulary import Vocabulary
from segdiff_jax.diffusion.schedule import make_schedule
from segdiff_jax.errors import UserError
from segdiff_jax.models import presets, pretrained
from segdiff_jax.models.clip_text import CLIPText
from segdiff_jax.models.pretrained import Pretrained
from segdiff_jax.models.tokenizer import train_tokenizer
from segdiff_jax.models.unet import UNet, UNetConfig
from segdiff_jax.models.vae import VAE
from segdiff_jax.roofline import flops
from segdiff_jax.training import attention_kernels, latent_cache, loop, losses, processes, sharding
from segdiff_jax.training.checkpoint import Checkpoints, check_config
from segdiff_jax.training.placement import placer
from segdiff_jax.training.step import Frozen, TrainState, diffusion_step, init_state, vae_step
from segdiff_jax.training.throughput import StartUp

log = logging.getLogger(__name__)

_SCALING_EXAMPLES = 64

# (first example, rows that this process feeds) -> batches from there on
Batches = Callable[[int, list[int]], Iterator[dict[str, np.ndarray]]]


def train(config: Config, workdir: str, startup: StartUp | None = None) -> None:
    """Runs `config.stage` in `workdir`, the VAE stage before it where it is needed.

    Continues from the newest checkpoint in `workdir`. Every process of the run calls this, and all
    see the same `workdir`. Raises `UserError` for what a user can mend and `loop.Stopped` after a
    signal. `startup` tells in the log what the time to the first step went to.
    """
    startup = startup or StartUp()
    if workdirs.is_workdir(workdir):
        check_config(workdirs.to_dict(workdirs.read_config(workdir)), workdirs.to_dict(config))
    if processes.is_first():
        workdirs.write_config(workdir, config)
    processes.barrier()
    if not workdirs.is_workdir(workdir):
        raise UserError(
            f"{workdir}: process {processes.index()} does not see what process 0 wrote there: "
            "choose a --workdir that all machines share, such as gs://..."
        )
    source = open_source(config.data, config.data.train_split, config.seed)
    startup.done("data")
    if config.stage == "vae":
        _train_vae(config, workdir, source, startup)
    else:
        _train_diffusion(config, workdir, source, startup)


def _train_vae(config: Config, workdir: str, source: Source, startup: StartUp) -> None:
    finished = epath.Path(workdir) / workdirs.PRETRAINED
    if pretrained.is_whole(finished):
        log.info("%s: the VAE stage is done", workdir)
        return
    mesh, given = sharding.make_mesh(config.mesh), None
    if config.init_from:
        given = pretrained.load(config.init_from, ("vae",), place=placer(mesh)).vae
    vae = given or nnx.eval_shape(lambda: _new_vae(config))
    attention = attention_kernels.on_mesh(mesh)
    graph, params = nnx.split(attention_kernels.with_attention(vae, attention))
    make = None if given else lambda: nnx.state(_new_vae(config))
    batches = _batches(config, source)
    startup.done("weights")
    step = vae_step(graph, config, mesh)
    work = flops.train_example(config, None, vae.config, 0, 0)
    state = _run(config, workdir, mesh, batches, step, None, params, make, None, work, startup)
    params = processes.gathered(state.ema or state.params)
    if processes.is_first():
        vae = _with_scaling(nnx.merge(graph, params), config, source)
        text_encoder, tokenizer = _new_text(config, source.vocabulary)
        networks = Pretrained(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, schedule=config.diffusion
        )
        pretrained.save(networks, str(finished))
    processes.barrier()


def _train_diffusion(config: Config, workdir: str, source: Source, startup: StartUp) -> None:
    frozen_folder = epath.Path(workdir) / workdirs.PRETRAINED
    dtype = jnp.dtype(config.model.dtype)
    missing = not pretrained.is_whole(frozen_folder)
    processes.barrier()  # all have looked
    if missing:
        start = _starting_point(config, workdir, startup)
        if processes.is_first():
            parts = pretrained.load(start, ("vae", "text_encoder", "tokenizer"))
            pretrained.save(parts._replace(schedule=config.diffusion), str(frozen_folder))
        processes.barrier()
    vae, text_encoder, tokenizer = workdirs.load_frozen(str(frozen_folder), dtype)
    entries = source.vocabulary.classes
    table = conditioning.encode_prompts(text_encoder, tokenizer, entries, config.prompts.templates)
    mesh = sharding.make_mesh(config.mesh)
    attention = attention_kernels.on_mesh(mesh)
    vae_graph, vae_params = nnx.split(attention_kernels.with_attention(vae, attention))
    frozen = Frozen(vae_params, make_schedule(config.diffusion), table)

    # What a checkpoint of this run replaces need not be read.
    saved = _saved_unet_config(config, workdir)
    given = None if saved else _given_unet(config, dtype, mesh)
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
    if config.train.eval_every:
        from segdiff_jax.segmenter import Segmenter
        from segdiff_jax.training.validation import validator

        segmenter = Segmenter(unet, vae, text_encoder, tokenizer, config, mesh)
        validate = validator(segmenter, config)
    batches = _batches(config, source, (vae, workdir) if config.data.cache_latents else None)
    work = flops.train_example(config, unet_config, vae.config, *table.hidden.shape[:2])
    startup.done("weights")
    _run(
        config,
        workdir,
        mesh,
        batches,
        step,
        frozen,
        params,
        make,
        unet_config,
        work,
        startup,
        validate,
    )


def _starting_point(config: Config, workdir: str, startup: StartUp) -> str:
    """The folder with the frozen networks: given, or made by the VAE stage first."""
    if config.init_from:
        own = workdirs.is_workdir(config.init_from)
        return str(epath.Path(config.init_from) / workdirs.PRETRAINED) if own else config.init_from
    first = dataclasses.replace(
        config,
        stage="vae",
        train=dataclasses.replace(
            config.train,
            steps=config.vae.steps,
            batch_size=config.vae.batch_size,
            eval_every=0,
            profile_steps=0,
        ),
        optimizer=dataclasses.replace(
            config.optimizer,
            method=config.vae.optimizer,
            learning_rate=config.vae.learning_rate,
            decay_steps=config.vae.steps,
            final_fraction=0.1,
            accumulation=1,
            weight_decay=0.0,
            ema_decay=0.0,
        ),
        data=dataclasses.replace(config.data, cache_latents=False),
    )
    folder = str(epath.Path(workdir) / workdirs.VAE_STAGE)
    train(first, folder, startup)
    return str(epath.Path(folder) / workdirs.PRETRAINED)


def _saved_unet_config(config: Config, workdir: str) -> UNetConfig | None:
    """The architecture in the checkpoints of a run that began from `init_from`, if it has any."""
    folder = epath.Path(workdir) / workdirs.CHECKPOINTS
    if not config.init_from or not processes.all_agree(folder.exists()):
        return None
    with Checkpoints(folder, read_only=True) as checkpoints:
        if checkpoints.latest_step() is None:
            return None
        return workdirs.unet_config_from(checkpoints.metadata()["unet"])


def _given_unet(config: Config, dtype: Any, mesh: Mesh) -> UNet | None:
    """The UNet of `init_from`, if it has one: a workdir of this stage, or a pretrained folder.

    Its arrays are read straight to where the mesh wants them.
    """
    if not config.init_from:
        return None
    if not workdirs.is_workdir(config.init_from):
        return pretrained.load(
            config.init_from, ("unet",), dtype=dtype, widen_conv_in=True, place=placer(mesh)
        ).unet
    if workdirs.read_config(config.init_from).stage != "diffusion":
        return None
    return workdirs.load_unet(config.init_from, mesh=mesh)[0]


def _new_vae(config: Config) -> VAE:
    architecture = presets.architecture(config.model.preset)
    dtype = jnp.dtype(config.model.dtype)
    return VAE(architecture.vae, dtype=dtype, rngs=nnx.Rngs(config.seed))


def _new_text(config: Config, vocabulary: Vocabulary) -> tuple[CLIPText, Any]:
    """A tokenizer that knows the vocabulary's words, and a random encoder for it."""
    architecture = presets.architecture(config.model.preset).text_encoder
    templates = config.prompts.templates
    sentences = [text for entry in vocabulary.classes for text in prompts(entry, templates)]
    tokenizer = train_tokenizer(
        sentences, architecture.vocab_size, architecture.max_position_embeddings
    )
    fitted = dataclasses.replace(architecture, vocab_size=tokenizer.vocab_size)
    build = nnx.jit(lambda: CLIPText(fitted, rngs=nnx.Rngs(config.seed)))
    return build(), tokenizer


def _with_scaling(vae: VAE, config: Config, source: Source) -> VAE:
    """`vae` with the scaling factor that gives training latents unit variance."""
    rows = next(pipeline.train_batches(source, config, config.seed, batch_size=_SCALING_EXAMPLES))
    batch = {name: jnp.asarray(values) for name, values in rows.items()}
    pixels = jnp.concatenate(
        [losses.to_pixels(batch["image"]), losses.mask_images(batch["labels"], batch["class_ids"])]
    )
    graph, params = nnx.split(vae)
    mean, _ = jax.jit(lambda p, x: nnx.merge(graph, p).encode(x))(params, pixels)
    vae.config = dataclasses.replace(vae.config, scaling_factor=1.0 / float(np.std(mean)))
    return vae


def _batches(config: Config, source: Source, cached: tuple[VAE, str] | None = None) -> Batches:
    """A function that starts the batches; `cached`: the VAE and workdir of a latent cache."""

    def start(example: int, rows: list[int]) -> Iterator[dict[str, np.ndarray]]:
        if cached is None:
            return pipeline.train_batches(source, config, config.seed, example, rows)
        folder = str(epath.Path(cached[1]) / workdirs.LATENTS)
        stored = latent_cache.open_or_build(source, cached[0], config, folder)
        return latents.train_batches(stored, config, config.seed, example, rows)

    return start


def _run(
    config: Config,
    workdir: str,
    mesh: Mesh,
    batches: Batches,
    step: Any,
    frozen: Frozen | None,
    params: Any,
    make: Callable[[], Any] | None,
    unet_config: UNetConfig | None,
    work: float,
    startup: StartUp,
    validate: loop.Validate | None = None,
) -> TrainState:
    """Places the state on `mesh`, newest checkpoint first, and trains it to the end.

    `params` are arrays on the mesh, or shapes that `make` fills; `work`: FLOPs of one example.
    """
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
        best_metric="miou_present" if validate else None,
    ) as checkpoints:
        if checkpoints.latest_step() is not None:
            state, stored = checkpoints.restore(sharding.abstract(abstract, shardings))
            done, written_by = int(state.step), stored.get("code", "unknown")
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
        if int(state.step) >= config.train.steps:
            return state
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
