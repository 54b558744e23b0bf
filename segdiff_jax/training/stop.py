"""Signals that ask a run to end after its current step."""

import contextlib
import os
import signal
from types import FrameType
from typing import Any


class Stopped(Exception):
    """SIGTERM or Ctrl-C asked for the end, and a checkpoint of this step is written."""


class GracefulStop:
    """Within this context the first SIGTERM or SIGINT sets `requested` instead of killing.

    The loop polls it after each step, saves a checkpoint and leaves. A second SIGINT (Ctrl-C twice)
    raises `KeyboardInterrupt`; further SIGTERMs change nothing. Main thread only. Each process
    sees its own signals: processes that run together must agree before they act on it.
    """

    def __init__(self) -> None:
        self.requested = False
        self._interrupts = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "GracefulStop":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.requested = True
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        # Not through logging: the handler may interrupt it while it holds its lock.
        with contextlib.suppress(OSError):
            os.write(2, f"{signal.Signals(number).name}: stopping after this step\n".encode())
