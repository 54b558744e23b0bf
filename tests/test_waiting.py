"""The clock of a wait: what it says, when it ends, and what keeps it going."""

import asyncio
import itertools
import threading
import time

import pytest

from segdiff_jax import waiting
from segdiff_jax.errors import UserError


@pytest.fixture
def hurried(monkeypatch):
    """One second for the network, a word after a fifth of one."""
    monkeypatch.setenv(waiting.NETWORK, "1")
    monkeypatch.setattr(waiting, "FIRST_WORD", 0.2)
    monkeypatch.setattr(waiting, "NEXT_WORD", 0.2)
    monkeypatch.setattr(waiting, "_said", {})


def wait(whom="the moon"):
    return waiting.Wait(whom, waiting.NETWORK, "look up")


def test_what_is_quick_is_silent_and_returns_or_raises(hurried, capsys):
    assert waiting.bounded(lambda: 7, wait()) == 7
    with pytest.raises(KeyError, match="x"):
        waiting.bounded(lambda: {}["x"], wait())
    with pytest.raises(TimeoutError, match="its own"):
        waiting.bounded(lambda: (_ for _ in ()).throw(TimeoutError("its own")), wait())
    assert capsys.readouterr().err == ""


def test_signs_of_life_keep_a_wait_going(hurried):
    count = itertools.count()

    def call():
        waiting.watch(lambda: next(count))  # of the wait that this runs in
        time.sleep(1.6)
        return "done"

    assert waiting.bounded(call, wait()) == "done"
    inner = lambda: waiting.bounded(call, wait("its phase"))  # noqa: E731
    assert waiting.bounded(inner, wait()) == "done"


def test_coroutines_are_cancelled(hurried):
    ended = []

    async def hang():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def main():
        with pytest.raises(waiting.NoAnswer):
            await waiting.answered(hang(), wait())
        await asyncio.sleep(0.01)
        return await waiting.answered(asyncio.sleep(0, "done"), wait())

    assert asyncio.run(main()) == "done" and ended


def test_of_many_that_wait_for_one_only_one_speaks(hurried, monkeypatch, capsys):
    monkeypatch.setattr(waiting, "NEXT_WORD", 60.0)

    def call():
        with pytest.raises(waiting.NoAnswer):
            waiting.bounded(lambda: time.sleep(1.5), wait())

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(("variable", "default"), [(waiting.NETWORK, 60), (waiting.PROCESS, 300)])
def test_limits(variable, default, monkeypatch):
    for value, seconds in ((" 2.5 ", 2.5), ("", default)):
        monkeypatch.setenv(variable, value)
        assert waiting.limit(variable) == seconds
    for value in ("soon", "0", "-5", "nan", "inf", "1e9"):
        monkeypatch.setenv(variable, value)
        with pytest.raises(UserError, match=f"{variable}={value}: must be a number of seconds"):
            waiting.check_limits()
