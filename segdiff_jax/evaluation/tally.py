"""Histograms of yes/no answers over values, and the figures that follow from them.

A tally is int64 [V, 2]: how often the answer was no and yes at each of the V values that a
non-negative finite float of 16 bits can take, whose bit patterns are in the order of the values.
So tallies of images and of processes add up, whatever the range of the values is, and figures are
exact for values of three decimal digits.
"""

import numpy as np
from scipy import optimize, special

VALUES = np.arange(31_744, dtype=np.uint16).view(np.float16).astype(np.float64)  # [V], ascending
_BINS = 15  # of the calibration error, as in its definition (arXiv 1706.04599)
_CERTAIN = 1e-4  # scores have four decimals: 0 and 1 are within this of the ends
_HOTTEST = 20.0  # temperatures beyond make no difference that scores could show


def nothing() -> np.ndarray:
    """Return the tally of no question."""
    return np.zeros((len(VALUES), 2), np.int64)


def count(values: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Tally values [n], 0 or more, and their answers bool [n]."""
    rounded = (np.clip(values, 0.0, VALUES[-1]) + 0.0).astype(np.float16)  # + 0: no negative zero
    rows = rounded.view(np.uint16).astype(np.int64)
    counts = np.bincount(2 * rows + np.asarray(answers, bool), minlength=2 * len(VALUES))
    return counts.reshape(len(VALUES), 2)


def auroc(tally: np.ndarray) -> float | None:
    """Return the chance that a yes has a higher value than a no; equal values count half.

    None without a yes, or without a no.
    """
    no, yes = tally.sum(0, dtype=np.float64)
    if not no or not yes:
        return None
    below = np.cumsum(tally[:, 0], dtype=np.float64) - tally[:, 0] / 2
    return float((tally[:, 1] / yes) @ (below / no))


def best_mcc(tally: np.ndarray) -> float | None:
    """Return Matthews' correlation of the answers with "value ≥ threshold", at the best threshold.

    0 is no better than chance. None without a yes, or without a no.
    """
    no, yes = tally.sum(0, dtype=np.float64)
    if not no or not yes:
        return None
    false, true = np.cumsum(tally[::-1], axis=0, dtype=np.float64).T  # [V] each, from the top
    said = true + false
    spread = np.sqrt(said * (no + yes - said) * no * yes)
    determinant = true * (no - false) - false * (yes - true)
    mcc = np.divide(determinant, spread, out=np.zeros_like(spread), where=spread > 0)
    return float(mcc.max())


def aurc(tally: np.ndarray) -> float | None:
    """Return the area under the risk-coverage curve: a yes is an error, a value its warning.

    The mean, over all questions, of the share of errors among those with no higher value. 0 is
    perfect; the share of errors is what a useless warning gives. None without a question.
    """
    questions = tally.sum(1)
    seen, errors = np.cumsum(questions), np.cumsum(tally[:, 1])
    if not seen[-1]:
        return None
    risk = np.divide(errors, seen, out=np.zeros(len(tally)), where=seen > 0)
    return float(questions @ risk / seen[-1])


def calibration_error(tally: np.ndarray, values: np.ndarray = VALUES) -> float | None:
    """Return how far values in [0, 1] are from the share of yes, on average over 15 equal bins.

    values: float [V], what the values of the tally become. None without a question.
    """
    questions = tally.sum(1)
    if not questions.any():
        return None
    bins = np.minimum((values * _BINS).astype(np.int64), _BINS - 1)
    gaps = np.bincount(bins, tally[:, 1] - questions * values, minlength=_BINS)
    return float(np.abs(gaps).sum() / questions.sum())


def tempered(temperature: float) -> np.ndarray:
    """Return the values in [0, 1] after their logits are divided by a temperature: float [V]."""
    shares = VALUES.clip(_CERTAIN, 1.0 - _CERTAIN)
    return special.expit(special.logit(shares) / temperature)


def temperature(tally: np.ndarray) -> float | None:
    """Fit the temperature, from 1/20 to 20, at which values in [0, 1] predict the answers best.

    By their likelihood (arXiv 1706.04599, section 4.2). None without a question.
    """
    if not tally.any():
        return None

    def surprise(log_temperature: float) -> float:
        shares = tempered(float(np.exp(log_temperature))).clip(_CERTAIN, 1.0 - _CERTAIN)
        return -float(tally[:, 1] @ np.log(shares) + tally[:, 0] @ np.log1p(-shares))

    bounds = -np.log(_HOTTEST), np.log(_HOTTEST)
    return float(np.exp(optimize.minimize_scalar(surprise, bounds=bounds, method="bounded").x))
