"""The loop both stages share: batches to devices, steps, reports, checkpoints, a clean end."""

import contextlib
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from segdiff_jax.config import Config
from segdiff_jax.data.pipeline import TrainBatches
from segdiff_jax.errors import UserError
from segdiff_jax.parallel import processes, sharding
from segdiff_jax.training.step import Frozen, StepFunction, TrainState
from segdiff_jax.training.telemetry import GracefulStop, Telemetry
from segdiff_jax.training.throughput import ProfileWindow, StartUp, Throughput
from segdiff_jax.weights.checkpoint import Checkpoints

log = logging.getLogger(__name__)

Validate = Callable[[int, TrainState, Telemetry], dict[str, float]]


class Stopped(Exception):
    """SIGTERM or Ctrl-C asked for the end, and a checkpoint of this step is written."""


def compile_step(step: StepFunction, state: TrainState, mesh: jax.sharding.Mesh) -> StepFunction:
    """`step` under `jit`: the state keeps its sharding and its buffers are reused."""
    shardings = sharding.state_sharding(state, mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))


def run(
    config: Config,
    workdir: str,
    step: StepFunction,
    state: TrainState,
    frozen: Frozen | None,
    batches: TrainBatches,
    mesh: jax.sharding.Mesh,
    checkpoints: Checkpoints,
    metadata: dict[str, Any],
    flops: float,
    validate: Validate | None = None,
    startup: StartUp | None = None,
) -> TrainState:
    """Trains `state` to config.train.steps and returns it.

    `batches` starts at the state's step, with the rows that this process feeds, and is closed at
    the end. `metadata` goes into every checkpoint; its "next_example" is the data position at the
    start and moves on. `flops` are what the networks need for one step over all devices. The parts
    of `startup` end with the first step, in one log line.

    Raises `UserError` when the loss stops being finite (no checkpoint of such a state is written)
    and `Stopped` after a signal. All processes then do so at the same step: they see the same loss,
    and they agree on the signal, which may have come to one of them.
    """
    first = int(state.step)
    first_example, batch_size = metadata["next_example"], config.train.batch_size
    compiled: Any = compile_step(step, state, mesh)
    throughput = Throughput(flops, mesh.devices.flat)
    telemetry, profile = _reports(config, workdir, first, throughput)
    startup = startup or StartUp()
    key = jax.random.key(config.seed)
    saved = first

    def check(values: dict[str, float] | None) -> None:
        # All three: a finite gradient may still make an update that is not.
        finite = ("loss", "gradient_norm", "update_norm")
        if values and not all(math.isfinite(values[k]) for k in finite):
            checkpoints.wait()
            kept = f"checkpoint {saved} is kept" if saved else "no checkpoint was written yet"
            raise UserError(
                f"{workdir}: loss, gradient or update is not finite at step "
                f"{values['step']:.0f}; {kept}: "
                "lower config.optimizer.learning_rate, or config.optimizer.clip_norm"
            )

    with (
        GracefulStop() as stop,
        contextlib.closing(telemetry),
        contextlib.closing(profile),
        contextlib.closing(batches),
    ):
        for done in range(first + 1, config.train.steps + 1):
            with throughput.waiting():
                batch = _placed(next(batches), mesh, batch_size)
            starting = done == first + 1
            if starting:
                startup.done("data")
            if starting and processes.count() > 1:
                # Their compilations may end minutes apart; collectives of the CPU do not wait.
                with processes.at_work("compiles the training step"):
                    compiled = compiled.lower(state, frozen, batch, key).compile()
                processes.barrier()
            profile.before(done, state)
            signalled = processes.any_raised(stop.requested)
            state, metrics = compiled(state, frozen, batch, key)
            if starting:
                startup.done("compile")
                log.info("%s: %s", config.stage, startup.line())
            check(telemetry.step(done, metrics))  # of the step before, as is the answer here:
            stopping = stop.requested if processes.count() == 1 else signalled()
            last = done == config.train.steps
            every = config.train.eval_every
            scores: dict[str, float] = {}
            if validate is not None and every and (done % every == 0 or last):
                check(telemetry.fetch())
                with telemetry.paused():
                    scores = validate(done, state, telemetry)
            if done % config.train.checkpoint_every == 0 or last or stopping:
                check(telemetry.fetch())
                position = first_example + (done - first) * batch_size
                checkpoints.save(done, state, metadata | {"next_example": position}, scores)
                saved = done
            if stopping and not last:
                checkpoints.wait()
                raise Stopped(f"stopped at step {done}, checkpoint written")
        checkpoints.wait()
    return state


def _reports(
    config: Config, workdir: str, first: int, throughput: Throughput
) -> tuple[Telemetry, ProfileWindow]:
    """What the first process writes; in the others both are silent."""
    telemetry = Telemetry(
        workdir,
        config.train.steps,
        config.train.batch_size,
        enabled=processes.is_first(),
        log_every=config.train.log_every,
        first_step=first,
        stage=config.stage,
        throughput=throughput,
    )
    length = config.train.profile_steps if processes.is_first() else 0
    folder = epath.Path(workdir) / "tensorboard" / config.stage  # where TensorBoard looks for it
    return telemetry, ProfileWindow(folder, config.train.profile_start, length)


def _placed(
    batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh, batch_size: int
) -> dict[str, jax.Array]:
    """The rows that this process feeds, as parts of the global batch on its devices."""
    place = sharding.batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(place, value, (batch_size, *value.shape[1:]))
        for name, value in batch.items()
    }
