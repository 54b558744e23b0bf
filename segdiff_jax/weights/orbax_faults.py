"""Bound the waits and silence the tracebacks of Orbax and TensorStore when a disk or store fails.

TensorStore's client retries a store that does not answer 33 times, up to half a minute apart, in
threads that cannot be ended; so calls that may wait run in a thread that can be left behind. Both
libraries report a failed write for every array, hundreds of times, partly at interpreter exit. The
caller gets the error as well and reports it once, in one sentence.
"""

import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from segdiff_jax import waiting
from segdiff_jax.files import is_remote
from segdiff_jax.parallel import processes

# With these, libcurl ends a stalled transfer; TensorStore counts it as a failure and retries.
_STANDSTILL = "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"
_SLOW = "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES"
_CONNECT = "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS"
_COUNTERS = "/tensorstore/http/"


def seen(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a method of `Checkpoints` that may wait say so, and end when a store is silent."""

    @functools.wraps(method)
    def waited(self: Any, *arguments: Any, **options: Any) -> Any:
        call = functools.partial(method, self, *arguments, **options)
        if not is_remote(self.directory):
            if processes.count() == 1:
                return call()
            whom = f"all processes to read or write {self.directory}"
            return waiting.bounded(call, waiting.Wait(whom, None))  # Orbax ends these itself
        patience = waiting.limit(waiting.NETWORK) / 4
        for name, value in ((_STANDSTILL, patience), (_CONNECT, patience), (_SLOW, 1)):
            os.environ.setdefault(name, str(max(1, round(value))))  # read at the first request
        advice = "check the network and your access to the bucket"
        wait = waiting.Wait(f"{self.directory}", waiting.NETWORK, advice, patience)
        wait.watch(_traffic())
        return waiting.bounded(call, wait)

    return waited


def _traffic() -> Callable[[], int]:
    """Return a count that grows while TensorStore makes progress.

    TensorStore counts answers, and bytes only when an object is complete, which may be a gigabyte.
    So the count also grows while nothing has failed since the last answer: stalled transfers fail.
    """
    count, before = 0, _answers_and_failures()

    def signs() -> int:
        nonlocal count, before
        now = _answers_and_failures()
        if now[0] != before[0]:
            before = now
        count += now == before
        return count

    return signs


def _answers_and_failures() -> tuple[float, float]:
    import tensorstore  # slow to import, and not needed for local disks

    found = tensorstore.experimental_collect_matching_metrics(_COUNTERS)
    totals = {
        metric["name"].removeprefix(_COUNTERS): sum(v.get("value", 0) for v in metric["values"])
        for metric in found
    }
    answers = totals.get("response_codes", 0)
    return answers, totals.get("request_completed", 0) - answers


@functools.cache
def silence() -> None:
    """Drop tracebacks of failed reads and writes, and what Orbax warns of a read-only folder."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)
    sys.unraisablehook = functools.partial(_unless_left_over, sys.unraisablehook)


def _is_news(record: logging.LogRecord) -> bool:
    if record.levelno >= logging.ERROR and record.exc_info:
        return not _passed_orbax(record.exc_info[2])
    return not str(record.msg).startswith("Given directory is read only")


def _unless_left_over(otherwise: Callable[[Any], None], found: Any) -> None:
    """Ignore what ends after the first failure: tasks of Orbax, and reports to its closed loop."""
    error = found.exc_value
    closed = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
    if not closed and not _passed_orbax(found.exc_traceback):
        otherwise(found)


def _passed_orbax(trace: TracebackType | None) -> bool:
    return any("orbax" in frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace))
