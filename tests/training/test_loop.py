"""The loop around the step: what is saved when, and how a run ends."""

import logging
import math
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from written import read_scalars

from segdiff_jax.config import Config, MeshConfig, OptimizerConfig, TrainConfig
from segdiff_jax.errors import UserError
from segdiff_jax.parallel import mesh as meshes
from segdiff_jax.parallel import rules
from segdiff_jax.training.loop import Run as Start
from segdiff_jax.training.loop import Setup, loop
from segdiff_jax.training.step import TrainState, init_state, jitted
from segdiff_jax.training.stop import Stopped
from segdiff_jax.training.timing import StartUp
from segdiff_jax.weights.checkpoint import Checkpoints


def step(state: TrainState, frozen, batch, key):
    """Adds up what it sees; the loss is the first row of the batch."""
    seen = batch["rows"].sum() + 0 * frozen
    params = {"total": state.params["total"] + seen}
    draw = jax.random.uniform(jax.random.fold_in(key, state.step))
    loss = batch["rows"][0]
    metrics = {
        "loss": loss,
        "gradient_norm": jnp.where(loss == -1, jnp.nan, 1.0),
        "update_norm": jnp.where(loss == -2, jnp.inf, 1.0),
        "draw": draw,
    }
    return state._replace(step=state.step + 1, params=params), metrics


class Run:
    """One call of `loop` over batches 1, 2, 3, …, as often as wanted in one workdir."""

    def __init__(self, workdir, **train):
        self.workdir = str(workdir)
        self.config = Config(
            optimizer=OptimizerConfig(),
            train=TrainConfig(**{"steps": 6, "batch_size": 2, "checkpoint_every": 2} | train),
        )
        self.taken, self.closed, self.followed = [], False, False

    def __call__(self, losses=None, validate=None, before=None):
        losses = losses or {}
        mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
        best = "score" if validate else None
        checkpoints = Checkpoints(f"{self.workdir}/checkpoints", keep=2, best_metric=best)
        state = init_state({"total": jnp.zeros(())}, self.config)
        state = jax.device_put(state, rules.state_sharding(state, mesh))
        try:
            if checkpoints.latest_step() is not None:
                state, _ = checkpoints.restore(state)
            first = int(state.step)

            def batches():
                try:
                    for number in range(first + 1, 1000):
                        if before is not None:
                            before(number)
                        self.taken.append(number)
                        yield {"rows": np.array([losses.get(number, 0.5), number], np.float32)}
                finally:
                    self.closed = True

            start = Start(self.config, self.workdir, None, mesh, StartUp())
            start.followed = self.followed
            metadata = {"note": "x", "next_example": 100 + 2 * first}
            compiled, frozen = jitted(step, state, mesh), jnp.ones(())
            state = loop(
                Setup(
                    *(start, compiled, state, frozen, batches(), checkpoints, metadata),
                    flops=1e9,
                    validate=validate,
                )
            )
        finally:
            checkpoints.close()
        return state

    def saved(self, best=None):
        checkpoints = Checkpoints(f"{self.workdir}/checkpoints", best_metric=best, read_only=True)
        steps = checkpoints.steps()
        restored = checkpoints.restore({"params": {"total": jax.ShapeDtypeStruct((), "float32")}})
        checkpoints.close()
        return steps, float(restored[0]["params"]["total"]), restored[1]


def total(steps):
    return sum(0.5 + number for number in range(1, steps + 1))


def test_a_run_takes_each_batch_once_and_keeps_the_newest_checkpoints(tmp_path):
    run = Run(tmp_path)
    state = run()
    assert run.taken == [1, 2, 3, 4, 5, 6] and int(state.step) == 6
    assert run.closed, "worker processes end with the loop"
    assert float(state.params["total"]) == total(6)
    assert run.saved() == ([4, 6], total(6), {"note": "x", "next_example": 112})


def test_a_run_reports_its_rates_and_what_its_start_took(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "segdiff_jax"):
        Run(tmp_path, log_every=1, checkpoint_every=100)(before=lambda batch: time.sleep(0.05))
    scalars = read_scalars(tmp_path)
    for step in (3, 4, 5):  # the time of the first two and of the last does not count
        seconds = scalars["diffusion/step_seconds"][step]
        assert seconds >= 0.05
        assert 0.049 / seconds < scalars["diffusion/data_wait_share"][step] <= 1
        assert scalars["diffusion/tflops_per_chip"][step] * seconds == pytest.approx(1e-3)
    lines = [record.getMessage() for record in caplog.records]
    (start,) = [line for line in lines if "start-up" in line]
    assert start.startswith("diffusion: start-up ") and " data 0.1, compile " in start
    assert "tflops_per_chip" in lines[-1] and "data_wait_share" in lines[-1]


def test_a_profile_shows_the_steps_that_the_config_names(tmp_path, monkeypatch):
    run, seen = Run(tmp_path, profile_start=3, profile_steps=2), []
    start, stop = jax.profiler.start_trace, jax.profiler.stop_trace
    note = lambda: seen.append(run.taken[-1])  # noqa: E731  the batch of the step about to begin
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: (note(), start(folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: (note(), stop()))
    run()
    assert seen == [3, 5]
    traces = (tmp_path / "tensorboard" / "diffusion" / "plugins" / "profile").rglob("*.xplane.pb")
    assert len(list(traces)) == 1


def test_the_last_step_is_saved_whatever_the_interval(tmp_path):
    run = Run(tmp_path, steps=5, checkpoint_every=3)
    run()
    assert run.saved()[:2] == ([3, 5], total(5))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_the_same_call_continues(tmp_path, number, capfd):
    run = Run(tmp_path, checkpoint_every=100)

    def interrupt(batch):
        if batch == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Stopped, match="stopped at step 3, checkpoint written"):
        run(before=interrupt)
    assert signal.getsignal(number) is before
    assert run.saved()[:2] == ([3], total(3))
    state = run()
    assert run.taken == [1, 2, 3, 4, 5, 6]
    assert float(state.params["total"]) == total(6) and run.saved()[0] == [3, 6]


def test_a_signal_in_the_last_step_is_the_end_anyway(tmp_path):
    run = Run(tmp_path)
    state = run(before=lambda batch: batch == 6 and os.kill(os.getpid(), signal.SIGTERM))
    assert int(state.step) == 6 and run.saved()[0] == [4, 6]


def test_after_a_signal_in_the_last_step_no_other_stage_begins(tmp_path):
    run = Run(tmp_path)
    run.followed = True
    with pytest.raises(Stopped, match="stopped after the diffusion stage, checkpoint written"):
        run(before=lambda batch: batch == 6 and os.kill(os.getpid(), signal.SIGTERM))
    assert run.saved()[0] == [4, 6]
    assert int(run().step) == 6


@pytest.mark.parametrize(
    ("value", "at", "kept", "stage", "rate"),
    [
        (math.nan, 3, [2], "diffusion", "optimizer.learning_rate"),
        (math.inf, 4, [2], "vae", "vae.learning_rate"),
        (-1.0, 6, [2, 4], "e2e", "optimizer.learning_rate"),
        (-2.0, 4, [2], "joint", "joint.learning_rate"),
    ],
)
def test_what_is_not_finite_stops_the_run_and_is_never_saved(
    tmp_path, value, at, kept, stage, rate
):
    run = Run(tmp_path)
    run.config.stage = stage
    with pytest.raises(UserError) as caught:
        run(losses={at: value})
    message = str(caught.value)
    assert f"not finite at step {at}; checkpoint {kept[-1]} is kept" in message
    assert f"lower config.{rate}, or" in message and "\n" not in message
    assert run.saved()[:2] == (kept, total(kept[-1]))


def test_not_finite_before_the_first_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no checkpoint was written yet"):
        Run(tmp_path)(losses={1: math.nan})


def test_validation_comes_at_its_interval_and_at_the_end_and_picks_the_best(tmp_path):
    run, seen = Run(tmp_path, steps=9, eval_every=2, checkpoint_every=2), []

    def validate(done, state, telemetry):
        assert float(state.params["total"]) == total(done)
        telemetry.scalars(done, {"validation/score": 0.1 * done})
        seen.append(done)
        return {"score": 0.9 if done == 4 else 0.1}

    run(validate=validate)
    assert seen == [2, 4, 6, 8, 9]
    checkpoints = Checkpoints(f"{tmp_path}/checkpoints", best_metric="score", read_only=True)
    assert checkpoints.steps() == [4, 8, 9] and checkpoints.best_step() == 4
    checkpoints.close()


def test_validation_is_never_shown_a_state_that_is_not_finite(tmp_path):
    run = Run(tmp_path, eval_every=3, checkpoint_every=100)
    with pytest.raises(UserError, match="step 3"):
        run(losses={3: math.nan}, validate=lambda *_: pytest.fail("called"))
