"""What tests of whole trainings do to a run from inside."""

import contextlib
import os
import signal

import pytest

from segdiff_jax.train import train
from segdiff_jax.training import run as runs
from segdiff_jax.training.stop import Stopped
from segdiff_jax.training.telemetry import Telemetry


class Reached(Exception):
    """The loop would begin now."""


@pytest.fixture
def set_up(monkeypatch):
    """A function that starts a training and returns what its loop is given; no step is taken."""

    def set_up(config, workdir):
        given = []

        def loop(setup):
            given.append(setup)
            raise Reached

        with monkeypatch.context() as patch, pytest.raises(Reached):
            patch.setattr(runs, "loop", loop)
            train(config, str(workdir))
        return given[0]

    return set_up


@pytest.fixture
def interrupted(monkeypatch):
    """A context in which SIGTERM comes while a step of a stage runs, and the training stops."""

    @contextlib.contextmanager
    def interrupted(at, stage="diffusion"):
        step = Telemetry.step

        def patched(self, done, metrics):
            if (self.stage, done) == (stage, at):
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, done, metrics)

        with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"stopped at step {at}"):
            patch.setattr(Telemetry, "step", patched)
            yield

    return interrupted
