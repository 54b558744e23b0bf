"""How far a long command is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0

Progress = Callable[[int, int], None]  # (done, total)


def reporter(label: str, unit: str = "image", enabled: bool = True) -> Progress:
    """A function to call with (0, total) at the start and with (done, total) after each piece.

    Shows rate and remaining time on stderr, or nothing where not `enabled` (all processes but the
    first). The rate of lines starts after the first piece, whose time is mostly compilation.
    """
    if not enabled:
        return lambda done, total: None
    if sys.stderr.isatty():
        return _bar(label, unit)
    return _lines(label, unit)


def _bar(label: str, unit: str) -> Progress:
    bars: list[tqdm] = []

    def report(done: int, total: int) -> None:
        if not bars:
            bars.append(tqdm(total=total, desc=label, unit=unit, smoothing=0.1))
        bars[0].update(done - bars[0].n)
        if done >= total:
            bars[0].close()

    return report


def _lines(label: str, unit: str) -> Progress:
    first: list[tuple[int, float]] = []  # pieces done and time when the first call returned
    shown = time.perf_counter()

    def report(done: int, total: int) -> None:
        nonlocal shown
        now = time.perf_counter()
        if done and not first:
            first.append((done, now))
        if not done or (done < total and now - shown < SECONDS_BETWEEN_LINES):
            return
        shown = now
        line = f"{label}: {done}/{total} {unit}s"
        since_done, since = first[0]
        if done > since_done:
            rate = (done - since_done) / max(now - since, 1e-9)
            line += f", {rate:.2f} {unit}s/s, ETA {tqdm.format_interval((total - done) / rate)}"
        print(line, file=sys.stderr, flush=True)

    return report
