"""From what single runs gave to what a reader is told: means with intervals, over seeds and over questions."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zephyr.evaluation.intervals import bootstrap

# The 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds. Intervals of 95 %: how far other seeds would move it, and other questions."""

    mean: float
    seeds: Interval | None  # None of a single seed
    questions: Interval | None  # None where single questions are not known
    values: Sequence[float]  # of each seed


def estimate(values: Sequence[float], questions: Sequence[Sequence[float]] = ()) -> Estimate:
    """Of a value a seed, and of the values of the same questions in each seed, `[seeds][questions]`."""
    over = bootstrap(np.mean(np.asarray(questions), axis=0)) if len(questions) and len(questions[0]) else None
    return Estimate(statistics.fmean(values), t_interval(values), over, list(values))


def t_interval(values: Sequence[float]) -> Interval | None:
    """Student's interval of a mean, 95 %; None of fewer than two values."""
    if len(values) < 2:
        return None
    degrees = len(values) - 1
    quantile = _T[degrees - 1] if degrees <= len(_T) else 1.95996 + 2.3723 / degrees + 2.82 / degrees**2
    mean, reach = statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))
    return mean - reach, mean + reach


def wins(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """For each question whether ours scored higher, in percent: 100, or 50 for a tie, or 0."""
    return [50.0 * (1 + (a > b) - (a < b)) for a, b in zip(ours, theirs, strict=True)]
