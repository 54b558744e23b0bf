"""What measurements under several settings say: a table, a plot, and a verdict on claims.

measurements (setting, seed) → rows (setting) with mean ± spread over seeds → Markdown, PNG, words
"""

import io
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Setting = Mapping[str, str | int]  # what distinguishes a row, such as {"steps": 10}

# Differences below this are no finding where seeds do not show how much is chance.
TOLERANCE = 0.01
NAMES = {
    "miou_present": "mIoU",
    "miou_trained": "mIoU, trained",
    "miou_novel": "mIoU, never trained",
    "miou_harmonic": "harmonic mean",
    "miou_ceiling": "ceiling",
    "pixel_accuracy": "pixel accuracy",
    "agreement": "agreement",
    "error_auroc": "error AUROC",
    "presence_auroc": "presence AUROC",
    "false_alarms": "false alarms",
}


class Measurement(NamedTuple):
    setting: Setting
    seed: int
    figures: Mapping[str, float | None]


class Claim(NamedTuple):
    """That `figure` is higher where `key` is `better` than where it is `worse`, all else equal."""

    text: str
    figure: str
    key: str  # of the settings
    better: str | int
    worse: str | int
    same: Setting = {}  # where the two are one program, which says nothing


class Elbow(NamedTuple):
    """That `figure` rises with the number `key`, and from `bound` on hardly any more."""

    text: str
    figure: str
    key: str
    bound: int


class Estimate(NamedTuple):
    mean: float
    spread: float | None  # standard deviation over seeds; None of one seed


class Row(NamedTuple):
    setting: Setting
    figures: Mapping[str, Estimate]


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean and standard deviation (n - 1) of one value or more."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), spread)


def rows(measurements: Sequence[Measurement]) -> list[Row]:
    """Make a row for each setting, in the order in which settings first appear."""
    found: list[Row] = []
    for setting in _distinct(m.setting for m in measurements):
        same = [m.figures for m in measurements if m.setting == setting]
        names = _distinct(name for figures in same for name in figures)
        known = {n: [v for f in same if (v := f.get(n)) is not None] for n in names}
        found.append(Row(setting, {n: estimate(v) for n, v in known.items() if v}))
    return found


def _distinct(items: Any) -> list[Any]:
    kept: list[Any] = []
    for item in items:
        if item not in kept:
            kept.append(item)
    return kept


def _without(key: str, settings: Iterable[Setting]) -> list[Setting]:
    """Return the distinct settings that are left without a key."""
    return _distinct({k: v for k, v in setting.items() if k != key} for setting in settings)


def table(
    found: Sequence[Row], axis: str, figures: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Return columns and cells: a column for each value of `axis`, a row for each other setting.

    One figure follows another; those that no row has are left out.
    """
    values = _distinct(row.setting[axis] for row in found)
    others = _without(axis, (row.setting for row in found))
    cells = []
    for name in figures:
        for rest in others:
            of_values = [_cell(_figure(found, {**rest, axis: v}, name)) for v in values]
            if any(of_values):
                cells.append([NAMES.get(name, name), *map(str, rest.values()), *of_values])
    keys = list(others[0]) if others else []
    return ["figure", *keys, *(f"{axis} {value}" for value in values)], cells


def _figure(found: Sequence[Row], setting: Setting, name: str) -> Estimate | None:
    return next((row.figures.get(name) for row in found if row.setting == setting), None)


def _cell(value: Estimate | None) -> str:
    if value is None:
        return ""
    spread = "" if value.spread is None else f" ± {value.spread:.3f}"
    return f"{value.mean:.3f}{spread}"


def verdict(claims: Sequence[Claim | Elbow], measurements: Sequence[Measurement]) -> list[str]:
    """Say of each claim in how many settings the measurements agree with it, and by how much."""
    judge = [
        _elbow(c, measurements) if isinstance(c, Elbow) else _claim(c, measurements) for c in claims
    ]
    seeds = len({m.seed for m in measurements})
    equal = (
        f"the standard deviation over {seeds} seeds" if seeds > 1 else f"{TOLERANCE}, of one seed"
    )
    return [line for line in judge if line] + [f"Equal: within {equal}."]


def _claim(claim: Claim, measurements: Sequence[Measurement]) -> str:
    found = []
    for context in _without(claim.key, (m.setting for m in measurements)):
        if claim.same and claim.same.items() <= context.items():
            continue
        better, worse = (
            _by_seed(claim.figure, {**context, claim.key: value}, measurements)
            for value in (claim.better, claim.worse)
        )
        gains = [better[seed] - worse[seed] for seed in sorted(better.keys() & worse.keys())]
        if gains:
            found.append(estimate(gains))
    return _line(claim.text, [_vote(gain) for gain in found], [gain.mean for gain in found])


def _vote(gain: Estimate) -> int:
    """Return 1 for a gain beyond chance, -1 for a loss beyond it, 0 for neither."""
    chance = TOLERANCE if gain.spread is None else gain.spread
    return (gain.mean > chance) - (gain.mean < -chance)


def _line(claim: str, votes: Sequence[int], gains: Sequence[float]) -> str:
    """Count the votes, with the least and the greatest gain; "" without any."""
    if not votes:
        return ""
    counts = [(votes.count(1), "for"), (votes.count(-1), "against"), (votes.count(0), "equal")]
    least, most = (f"{end(gains):+.3f}" for end in (min, max))
    between = least if len(gains) == 1 else f"{least} to {most}"
    return f"{claim}: {', '.join(f'{n} {what}' for n, what in counts if n)} ({between})."


def _elbow(claim: Elbow, measurements: Sequence[Measurement]) -> str:
    votes, gains = [], []
    for context in _without(claim.key, (m.setting for m in measurements)):
        curve = {}
        for value in sorted({int(m.setting[claim.key]) for m in measurements}):
            of_seeds = _by_seed(claim.figure, {**context, claim.key: value}, measurements)
            if of_seeds:
                curve[value] = estimate(list(of_seeds.values()))
        if len(curve) < 2:
            continue
        best = max(curve.values(), key=lambda e: e.mean)
        chance = max(TOLERANCE, best.spread or 0.0)
        elbow = next(v for v, e in curve.items() if e.mean >= best.mean - chance)
        first, last = list(curve)[0], list(curve)[-1]
        rises = curve[last].mean - curve[first].mean
        votes.append(0 if abs(rises) <= chance else 1 if rises > 0 and elbow <= claim.bound else -1)
        gains.append(rises)
    return _line(claim.text, votes, gains)


def _by_seed(
    figure: str, setting: Setting, measurements: Sequence[Measurement]
) -> dict[int, float]:
    return {
        m.seed: value
        for m in measurements
        if m.setting == setting and (value := m.figures.get(figure)) is not None
    }


def plot(found: Sequence[Row], key: str, figures: Sequence[str], title: str) -> bytes:
    """Draw each figure over the setting `key`, a line for each combination of the others: PNG."""
    from matplotlib.figure import Figure  # only studies draw

    shown = [name for name in figures if any(name in row.figures for row in found)]
    values = _distinct(row.setting[key] for row in found)
    others = _without(key, (row.setting for row in found))
    drawing = Figure(figsize=(5.5 * len(shown), 4.2), layout="constrained")
    drawing.suptitle(title)
    for number, name in enumerate(shown, 1):
        axes = drawing.add_subplot(1, len(shown), number)
        for rest, marker in zip(others, itertools.cycle("osD^vP*X")):
            of_values = [_figure(found, {**rest, key: value}, name) for value in values]
            known = [(place, e.mean, e.spread or 0.0) for place, e in enumerate(of_values) if e]
            label = ", ".join(f"{k} {v}" for k, v in rest.items())
            axes.errorbar(*np.reshape(known, (-1, 3)).T, marker=marker, capsize=3, label=label)
        axes.set_xticks(range(len(values)), [str(v) for v in values])
        axes.set_xlabel(key)
        axes.set_ylabel(NAMES.get(name, name))
        axes.grid(alpha=0.3)
    if any(others):
        axes.legend(fontsize="small")
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
