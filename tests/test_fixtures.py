"""What modules of tests share must not depend on which of them runs first."""

import jax
import pytest

from segdiff_jax import train as train_command

pytestmark = pytest.mark.usefixtures("fast_compile")
FLAG = "jax_disable_most_optimizations"


def test_the_shared_training_is_compiled_as_usual_whoever_asks_first(train_optimized, monkeypatch):
    seen = []
    monkeypatch.setattr(train_command, "train", lambda *_: seen.append(jax.config.read(FLAG)))
    assert jax.config.read(FLAG) is True
    train_optimized(None, "")
    assert seen == [False] and jax.config.read(FLAG) is True
