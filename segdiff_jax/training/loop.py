"""The loop of a training: the same for every stage.

loop:  batch ─► step: loss, gradient, optimiser, EMA ─► metrics, read one step late
                  ├─ every eval_every        validate ─► scores
                  └─ every checkpoint_every  save: state, config, data position, scores
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from segdiff_jax.config import Config
from segdiff_jax.data import pipeline
from segdiff_jax.data.preference import Preference
from segdiff_jax.data.sources.source import Source
from segdiff_jax.errors import UserError
from segdiff_jax.models.vae import VAE
from segdiff_jax.parallel import mesh, processes
from segdiff_jax.stages import key_of
from segdiff_jax.text.vocabulary import Vocabulary
from segdiff_jax.training.losses import Frozen
from segdiff_jax.training.networks import Build
from segdiff_jax.training.step import StepFunction, TrainState
from segdiff_jax.training.stop import GracefulStop, Stopped
from segdiff_jax.training.telemetry import Telemetry
from segdiff_jax.training.timing import ProfileWindow, StartUp
from segdiff_jax.weights.checkpoint import Checkpoints
from segdiff_jax.weights.pretrained import Pretrained

log = logging.getLogger(__name__)

Validate = Callable[[int, TrainState, Telemetry], dict[str, float]]

# (networks, config, mesh, classes) -> what judges them while they are trained
MakeValidator = Callable[[Pretrained, Config, Mesh, Vocabulary], Validate]


@dataclasses.dataclass
class Run:
    """One start of a stage in its workdir."""

    config: Config  # of the stage: `of_stage`
    workdir: str  # local or gs://
    source: Source
    mesh: Mesh
    startup: StartUp
    make_validator: MakeValidator | None = None
    guard: Callable[[], None] | None = None  # of `Checkpoints`; in the first process
    shares: tuple[float, ...] = ()  # of each class, as counted: `Vocabulary.shares`
    followed: bool = False  # by a stage or a measurement that does not begin after a signal
    until_end: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)


@dataclasses.dataclass
class Stage:
    """What a stage trains, and on what."""

    network: nnx.Module  # arrays on the mesh, or shapes that `build` fills
    build: Build | None  # makes the arrays; None: `network` has them
    step: StepFunction
    frozen: Frozen | None  # None in the VAE stage
    flops: float  # of one example
    encoder: VAE | None = None  # of the latent cache that takes the place of pixels
    preferred: Preference | None = None  # which absent and which rare classes are asked for
    validate: Validate | None = None


@dataclasses.dataclass
class Setup:
    """What the loop works with."""

    run: Run
    step: Any  # jitted
    state: TrainState  # the loop's steps reuse its buffers
    frozen: Frozen | None
    batches: pipeline.TrainBatches  # from the state's step on; rows that this process feeds
    checkpoints: Checkpoints
    metadata: dict[str, Any]  # of every checkpoint; "next_example" is where this start begins
    flops: float  # of one step over all devices
    validate: Validate | None = None


def loop(setup: Setup) -> TrainState:
    """Train to config.train.steps and return the state; close what `setup` opened.

    Raises `UserError` when the loss stops being finite (no checkpoint of such a state is written)
    and `Stopped` after a signal. All processes then do so at the same step: they see the same loss,
    and they agree on the signal, which may have come to one of them.
    """
    run, state, step = setup.run, setup.state, setup.step
    settings, key = run.config.train, jax.random.key(run.config.seed)
    first = saved = int(state.step)
    devices = list(run.mesh.devices.flat)
    telemetry = Telemetry(run.config, run.workdir, first, setup.flops, devices)
    profile = ProfileWindow(run.config.train, telemetry.folder)
    with contextlib.ExitStack() as opened:
        stop = opened.enter_context(GracefulStop())
        for part in (telemetry, profile, setup.batches):
            opened.enter_context(contextlib.closing(part))
        for done in range(first + 1, settings.steps + 1):
            with telemetry.waiting():
                batch = mesh.place_batch(next(setup.batches), run.mesh, settings.batch_size)
            if done == first + 1:
                step = _compiled(setup, batch, key)
            profile.before(done, state)
            signalled = processes.any_raised(stop.requested)
            state, metrics = step(state, setup.frozen, batch, key)
            _check_finite(setup, telemetry.step(done, metrics), saved)  # of the step before
            stopping = stop.requested if processes.count() == 1 else signalled()
            last, scores = done == settings.steps, {}
            if setup.validate and (done % settings.eval_every == 0 or last):
                _check_finite(setup, telemetry.fetch(), saved)
                with telemetry.paused():
                    scores = setup.validate(done, state, telemetry)
            if done % settings.checkpoint_every == 0 or last or stopping:
                _check_finite(setup, telemetry.fetch(), saved)
                position = setup.metadata["next_example"] + (done - first) * settings.batch_size
                moved = setup.metadata | {"next_example": position}
                setup.checkpoints.save(done, state, moved, scores)
                saved = done
            if stopping and not last:
                setup.checkpoints.wait()
                raise Stopped(f"stopped at step {done}, checkpoint written")
        setup.checkpoints.wait()
        if run.followed and processes.any_raised(stop.requested)():
            raise Stopped(f"stopped after the {run.config.stage} stage, checkpoint written")
    return state


def _compiled(setup: Setup, batch: Any, key: jax.Array) -> Any:
    """Compile the step in all processes before any goes on.

    Their compilations may end minutes apart, and collectives of the CPU do not wait.
    """
    startup = setup.run.startup
    startup.done("data")
    log.info("%s: compiling the training step", setup.run.config.stage)
    with processes.at_work("compiles the training step"):
        compiled = setup.step.lower(setup.state, setup.frozen, batch, key).compile()
    processes.barrier()
    startup.done("compile")
    log.info("%s: %s", setup.run.config.stage, startup.line())
    return compiled


def _check_finite(setup: Setup, values: dict[str, float] | None, saved: int) -> None:
    # All three: a finite gradient may still make an update that is not.
    finite = ("loss", "gradient_norm", "update_norm")
    if values and not all(math.isfinite(values[name]) for name in finite):
        setup.checkpoints.wait()
        rate = key_of(setup.run.config.stage, "optimizer.learning_rate")
        kept = f"checkpoint {saved} is kept" if saved else "no checkpoint was written yet"
        raise UserError(
            f"{setup.run.workdir}: loss, gradient or update is not finite at step "
            f"{values['step']:.0f}; {kept}: "
            f"lower config.{rate}, or config.optimizer.clip_norm"
        )
