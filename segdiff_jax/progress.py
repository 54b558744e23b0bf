"""How far a long command is: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0
_TICK = 0.5  # seconds: on a terminal something moves that often

Progress = Callable[[float, int], None]  # (done, total)


@contextlib.contextmanager
def working(what: str, enabled: bool = True) -> Iterator[None]:
    """Show on a terminal what is going on, and for how long; nothing elsewhere."""
    if not enabled or not sys.stderr.isatty():
        yield
        return
    over, start = threading.Event(), time.monotonic()

    def show() -> None:
        waits = 0
        while not over.wait(_TICK if waits else 0.0):
            dots = "." * (1 + waits % 3)
            line = f"\r{what} {dots:<3} {time.monotonic() - start:.0f} s"
            print(line, end="", file=sys.stderr, flush=True)
            waits += 1

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def reporter(label: str, unit: str = "image", enabled: bool = True) -> Progress:
    """Return a function to call with (0, total) first and with (done, total) after each piece.

    It shows rate and remaining time on stderr, or nothing where not `enabled` (all processes but
    the first). The rate of lines starts after the first piece, whose time is mostly compilation.
    A fraction of `done` is how much of the piece in work is finished.
    """
    if not enabled:
        return lambda done, total: None
    if sys.stderr.isatty():
        return _bar(label, unit)
    return _lines(label, unit)


def _bar(label: str, unit: str) -> Progress:
    bars: list[tqdm] = []

    def tick(bar: tqdm) -> None:
        while not bar.disable:  # until it is closed: the clock shows that it is alive
            time.sleep(_TICK)
            bar.refresh()

    def report(done: float, total: int) -> None:
        if not bars:
            form = "{desc}: {percentage:3.0f}%|{bar}| {n:.10g}/{total_fmt} [{elapsed}<{remaining}]"
            bars.append(tqdm(total=total, desc=label, unit=unit, bar_format=form))
            threading.Thread(target=tick, args=bars, daemon=True).start()
        bars[0].update(done - bars[0].n)
        if done >= total:
            bars[0].close()

    return report


def _lines(label: str, unit: str) -> Progress:
    first: list[tuple[float, float]] = []  # pieces done and time when the first call returned
    shown = time.perf_counter()

    def report(done: float, total: int) -> None:
        nonlocal shown
        now = time.perf_counter()
        if done and not first:
            first.append((done, now))
        if not done or (done < total and now - shown < SECONDS_BETWEEN_LINES):
            return
        shown = now
        whole = math.floor(done) if total > 1 else done  # of one large photo its part counts
        line = f"{label}: {whole:.10g}/{total} {unit}s"
        since_done, since = first[0]
        if done > since_done:
            rate = (done - since_done) / max(now - since, 1e-9)
            digits = 2 if rate < 10 else 1 if rate < 100 else 0
            left = tqdm.format_interval((total - done) / rate)
            line += f", {rate:.{digits}f} {unit}s/s, ETA {left}"
        print(line, file=sys.stderr, flush=True)

    return report
