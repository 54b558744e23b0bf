"""A stage on the mesh, ready for the loop: its state, new or restored, its step and its batches."""

import dataclasses
import logging
from typing import Any

import jax
from etils import epath
from flax import nnx

from segdiff_jax.data import latent_cache, latents, pipeline
from segdiff_jax.models.unet import UNet
from segdiff_jax.parallel import mesh, processes, rules
from segdiff_jax.parallel.placement import whole
from segdiff_jax.training.loop import Run, Setup, Stage
from segdiff_jax.training.step import TrainState, init_state, jitted
from segdiff_jax.version import code_version
from segdiff_jax.weights import workdir as workdirs
from segdiff_jax.weights.checkpoint import Checkpoints

log = logging.getLogger(__name__)


def write_config(run: Run) -> None:
    """Write config.json. All processes call this."""
    if processes.is_first():
        workdirs.write_config(run.workdir, run.config)
    processes.barrier()


def newest_state(
    run: Run, stage: Stage, checkpoints: Checkpoints
) -> tuple[TrainState, dict[str, Any]]:
    """Return the state on the mesh and its metadata: of the newest checkpoint, or new and {}."""
    params, build, config = nnx.state(stage.network), stage.build, run.config
    shapes = jax.eval_shape(lambda p: init_state(p, config), params)
    shardings = rules.state_sharding(shapes, run.mesh)
    if checkpoints.latest_step() is not None:
        return checkpoints.restore(mesh.abstract(shapes, shardings))
    if build is None:
        create = jax.jit(lambda p: init_state(p, config), out_shardings=shardings)
        return create(params), {}
    create = jax.jit(
        lambda: init_state(nnx.state(build(rngs=nnx.Rngs(config.seed))), config),
        out_shardings=shardings,
        # It runs once: a hundred generators of random numbers took longer to optimise than to run.
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return create(), {}


def set_up(
    run: Run, stage: Stage, checkpoints: Checkpoints, state: TrainState, stored: dict[str, Any]
) -> Setup:
    """Prepare the loop: put the step under `jit`, open the batches, say where the run begins."""
    config, done, size = run.config, int(state.step), run.config.train.batch_size
    code, position = code_version(), 0
    if done:
        position = stored["next_example"]
        log.info("%s: resuming at step %d, example %d", run.workdir, done, position)
        if stored["code"] != code:
            log.info("the checkpoint is of code %s, this is %s", stored["code"], code)
    write_config(run)  # what may change in a run, its steps for one, may have changed
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    log.info("%s: %.2f M parameters", config.stage, count / 1e6)
    run.startup.done("restore" if done else "state")
    unet = stage.network.config if isinstance(stage.network, UNet) else None
    described = workdirs.checkpoint_metadata(config, unet)
    frozen = stage.frozen and whole(stage.frozen, run.mesh)
    return Setup(
        run=run,
        step=jitted(stage.step, state, run.mesh),
        state=state,
        frozen=frozen,
        batches=_batches(run, stage, position),
        checkpoints=checkpoints,
        metadata=described | {"next_example": position, "code": code},
        flops=stage.flops * size,
        validate=stage.validate,
    )


def _batches(run: Run, stage: Stage, example: int) -> pipeline.TrainBatches:
    """Return the rows that this process feeds from `example` on, cached latents or pixels."""
    config, rows = run.config, mesh.local_rows(run.mesh, run.config.train.batch_size)
    asked = {"e2e": config.e2e.classes, "joint": config.joint.classes}
    if config.stage in asked:  # they are drawn as those of a pass are
        group = dataclasses.replace(config.codec, classes_per_pass=asked[config.stage])
        config = dataclasses.replace(config, codec=group)
    if stage.encoder is None:
        return pipeline.train_batches(
            run.source, config, config.seed, example, rows, preference=stage.preferred
        )
    folder = str(epath.Path(run.workdir) / workdirs.LATENTS)
    stored = latent_cache.open_or_build(run.source, stage.encoder, config, folder)
    return latents.train_batches(
        stored, config, config.seed, example, rows, preference=stage.preferred
    )
