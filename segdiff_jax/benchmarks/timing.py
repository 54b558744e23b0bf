"""Two programs side by side: equal outputs first, then rounds in turn, as ratios with a spread.

A ratio is our time over theirs in the same round, so that what else the machine does meanwhile
meets both. Ratios of processor time stand beside those of the clock: where cores are shared they
are the steadier ones, and for accelerators they mean nothing.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from segdiff_jax.errors import UserError

Run = Callable[[], Any]  # does the work to its end, and gives arrays


class Spread(NamedTuple):
    """Of several measurements."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Ratio:
    """Our time over another program's: below 1 is faster."""

    name: str
    ratio: Spread
    cpu: Spread  # the same of processor time
    ours: Spread  # seconds
    theirs: Spread  # seconds
    ours_cpu: Spread  # seconds
    aim: float | None = None  # at most
    notes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """What stands by itself, and is not compared with earlier runs."""

    name: str
    value: Spread
    unit: str


@dataclass(frozen=True)
class NotRun:
    name: str
    why: str
    failed: bool = False  # and not left out


Result = Ratio | Figure | NotRun


def side_by_side(
    name: str, ours: Run, theirs: Run, rounds: int, tolerance: float, aim: float | None = None
) -> Ratio:
    """Time two programs whose first outputs are equal. Raises `UserError` where they are not."""
    check_equal(name, ours(), theirs(), tolerance)
    return in_turn(name, ours, theirs, rounds, aim)


def in_turn(name: str, ours: Run, theirs: Run, rounds: int, aim: float | None = None) -> Ratio:
    """Time two programs that have run once already; who goes first changes with each round."""
    pairs = []
    for number in range(rounds):
        if number % 2:
            other = timed(theirs)
            own = timed(ours)
        else:
            own = timed(ours)
            other = timed(theirs)
        pairs.append((*own, *other))
    return Ratio(
        name,
        spread([own / other for own, _, other, _ in pairs]),
        spread([own / max(other, 1e-6) for _, own, _, other in pairs]),
        spread([own for own, *_ in pairs]),
        spread([other for *_, other, _ in pairs]),
        spread([own for _, own, *_ in pairs]),
        aim,
    )


def timed(run: Run) -> tuple[float, float]:
    """Return (seconds by the clock, seconds of processors, those of ended children too)."""
    start, used = time.perf_counter(), _processors()
    run()
    return time.perf_counter() - start, _processors() - used


def _processors() -> float:
    return time.process_time() + sum(os.times()[2:4])


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def rate(name: str, count: int, seconds: Spread, unit: str) -> Figure:
    """Return how many of `count` are done in a second, from the time for all of them."""
    median, low, high = (count / value for value in seconds)
    return Figure(name, Spread(median, high, low), unit)


def check_equal(name: str, ours: Any, theirs: Any, tolerance: float) -> None:
    """Raise `UserError` unless ‖ours − theirs‖ ≤ tolerance · ‖theirs‖, array by array."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    for own, other in pairs:
        actual, expected = np.asarray(own, np.float64), np.asarray(other, np.float64)
        if actual.shape != expected.shape:
            raise UserError(f"{name}: outputs of {actual.shape} and {expected.shape}: not timed")
        scale = max(float(np.linalg.norm(expected)), 1e-30)
        error = float(np.linalg.norm(actual - expected)) / scale
        if not error <= tolerance:  # NaN too
            raise UserError(
                f"{name}: the outputs differ by {error:.1e} of their norm, more than "
                f"{tolerance:g}: two programs that do not compute the same are not timed"
            )
