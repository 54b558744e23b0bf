"""What Orbax and TensorStore print, from their threads, of a write that fails.

They tell of it for every array, hundreds of times, some of it when the interpreter ends; the caller
gets the error as well and says it once, in one sentence.
"""

import functools
import logging
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any


@functools.cache
def silence_failed_writes() -> None:
    """Drops those tracebacks, and no others, from now on. May be called again."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)
    sys.unraisablehook = functools.partial(_unless_loop_is_closed, sys.unraisablehook)


def _is_news(record: logging.LogRecord) -> bool:
    if record.levelno < logging.ERROR or not record.exc_info:
        return True
    return not _passed_orbax(record.exc_info[2])


def _passed_orbax(trace: TracebackType | None) -> bool:
    return any("orbax" in frame.filename for frame in traceback.extract_tb(trace))


def _unless_loop_is_closed(otherwise: Callable[[Any], None], found: Any) -> None:
    """TensorStore reports to event loops that Orbax has closed after the first failure."""
    if not (
        isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"
    ):
        otherwise(found)
