"""Waiting that can be seen, and that ends.

Whoever waits for another process or for the network says after ten seconds for whom and how long
still, now and then again, and gives up with one line. This module knows neither JAX nor files: a
`Wait` is the clock, `bounded` and `answered` are the two ways to wait by it.
"""

import asyncio
import concurrent.futures
import contextvars
import math
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from segdiff_jax.errors import UserError

NETWORK, PROCESS = "SEGDIFF_NETWORK_TIMEOUT", "SEGDIFF_PROCESS_TIMEOUT"
HELP = f"""Waiting is given up after {NETWORK} seconds without an answer from the network
(default: 60), and {PROCESS} seconds for another process (default: 300)."""

FIRST_WORD, NEXT_WORD = 10.0, 30.0  # seconds of silence before a line, and between two
LONGEST = 7 * 24 * 3600  # seconds

_DEFAULTS = {NETWORK: 60.0, PROCESS: 300.0}
_current: contextvars.ContextVar["Wait | None"] = contextvars.ContextVar("wait", default=None)
_said: dict[str, float] = {}  # for whom a line was printed, and when: of many threads, one speaks
_saying = threading.Lock()
_left: list[threading.Thread] = []  # calls that were given up

Result = TypeVar("Result")


class NoAnswer(UserError):
    """The end of a wait in which nobody answered: the same command may succeed later."""

    exit_code = os.EX_TEMPFAIL  # 75, on which `launch/supervise.sh` starts again


def limit(variable: str) -> float:
    """Return the seconds that `NETWORK` or `PROCESS` allows. Raise `UserError` for a bad value."""
    text = os.environ.get(variable, "").strip()
    try:
        seconds = float(text) if text else _DEFAULTS[variable]
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= LONGEST:  # false for NaN too
        raise UserError(f"{variable}={text}: must be a number of seconds from 1 to {LONGEST}")
    return seconds


def check_limits() -> None:
    """Raise `UserError` for bad values, before anything is waited for."""
    for variable in _DEFAULTS:
        limit(variable)


class Wait:
    """The clock of one wait: speaks, and ends it when `limit(variable)` seconds bring no answer.

    whom: who is waited for, or a function that finds out, called when it is to be said.
    variable: `NETWORK` or `PROCESS`; None for a wait that only speaks.
    advice: what a user can do when it ends.
    spent: seconds that were waited in vain before; at most half of the limit counts.
    """

    def __init__(
        self,
        whom: str | Callable[[], str],
        variable: str | None,
        advice: str = "",
        spent: float = 0.0,
    ):
        self._whom, self._variable, self._advice = whom, variable, advice
        self._parent = _current.get()
        self._limit = limit(variable) if variable else math.inf
        self._start = self._heard = time.monotonic() - min(spent, self._limit / 2)
        self._signs: list[Callable[[], int]] = []
        self._seen = self._marks = 0

    def seconds(self) -> float:
        """Return how long this has been waited for."""
        return time.monotonic() - self._start

    def heard(self) -> None:
        """Take note of a sign of life."""
        self._marks += 1
        if self._parent is not None:
            self._parent.heard()

    def watch(self, signs: Callable[[], int]) -> None:
        """Count signs of life by `signs()`: while it changes, nothing is given up."""
        self._signs.append(signs)
        if self._parent is not None:
            self._parent.watch(signs)

    def pause(self) -> float:
        """Return the seconds until `tick` is to be called, if the wait is not over."""
        now = time.monotonic()
        first = min(FIRST_WORD, self._limit) - (now - self._start)
        later = min(1.0, NEXT_WORD, self._heard + self._limit - now)
        return max(0.01, first if first > 0 else later)

    def tick(self) -> None:
        """Say that this waits, when it is time; raise `NoAnswer` when it was long enough."""
        now = time.monotonic()
        seen = self._marks + sum(1 + signs() for signs in self._signs)
        if seen != self._seen:
            self._seen, self._heard = seen, now
        silent = now - self._heard
        if silent >= self._limit:
            raise NoAnswer(
                f"{self._name()}: no answer for {silent:.0f} s: {self._advice}, "
                f"or allow more with {self._variable}=SECONDS"
            )
        if now - self._start >= FIRST_WORD:
            self._speak(now, self._limit - silent)

    def _speak(self, now: float, left: float) -> None:
        due = self._whom if isinstance(self._whom, str) else str(id(self))
        with _saying:
            if now - _said.get(due, -NEXT_WORD) < NEXT_WORD:
                return
            _said[due] = now
        line = f"waiting for {self._name()} for {now - self._start:.0f} s"
        if left < math.inf:
            line += f"; giving up if nothing is heard for {left:.0f} s more"
        print(line, file=sys.stderr, flush=True)

    def _name(self) -> str:
        return self._whom if isinstance(self._whom, str) else self._whom()


def watch(signs: Callable[[], int]) -> None:
    """Call `Wait.watch` of the wait in which this code runs, if any."""
    wait = _current.get()
    if wait is not None:
        wait.watch(signs)


def heard() -> None:
    """Call `Wait.heard` of the wait in which this code runs, if any."""
    wait = _current.get()
    if wait is not None:
        wait.heard()


def bounded(call: Callable[[], Result], wait: Wait) -> Result:
    """Return `call()`, made in a thread of its own, for as long as `wait` allows.

    The thread is left behind when the wait ends before it: see `left_behind`.
    """
    future, thread = _in_thread(call, wait)
    try:
        while not concurrent.futures.wait([future], wait.pause()).done:
            wait.tick()
    except BaseException:  # also Ctrl-C
        _left.append(thread)
        raise
    return future.result()


async def answered(awaitable: Awaitable[Result], wait: Wait) -> Result:
    """Await `awaitable` for as long as `wait` allows, and cancel it then."""
    token = _current.set(wait)
    try:
        task = asyncio.ensure_future(awaitable)
    finally:
        _current.reset(token)
    try:
        while not (await asyncio.wait([task], timeout=wait.pause()))[0]:
            wait.tick()
    except BaseException:
        task.cancel()
        raise
    return task.result()


def left_behind() -> bool:
    """Return whether calls that were given up still run: Python's own end may wait for them."""
    return any(thread.is_alive() for thread in _left)


def in_background(call: Callable[[], Result]) -> "concurrent.futures.Future[Result]":
    """Start `call()` in a thread that does not keep the process from ending."""
    return _in_thread(call, _current.get())[0]


def _in_thread(
    call: Callable[[], Result], wait: Wait | None
) -> tuple["concurrent.futures.Future[Result]", threading.Thread]:
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def run() -> None:
        _current.set(wait)
        try:
            result = call()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(run,), daemon=True, name="waited for")
    thread.start()
    return future, thread
