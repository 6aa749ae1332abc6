"""How far a score would move if the questions had been others: percentile intervals of the bootstrap."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_NUMBERS = 4_000_000  # of resampled values held at once, 32 MB

Array = NDArray[np.float64]


def mean(samples: Array) -> Array:
    """Of each resample, `[resamples, n]` to `[resamples]`."""
    return samples.mean(axis=1)


def ratio(samples: Array) -> Array:
    """Of resampled pairs (sum, number): the mean of all that the drawn questions hold, NaN where they hold nothing."""
    total = samples.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return total[:, 0] / total[:, 1]


def bootstrap(
    values: ArrayLike,
    statistic: Callable[[Array], Any] = mean,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """The interval that holds the middle `level` of a statistic over resamples (Efron and Tibshirani, 1993, 13.3).

    `values` has a row for each unit that is drawn with replacement: `[n]` or `[n, k]`. `statistic` is given
    `[resamples, n]` or `[resamples, n, k]` and gives `[resamples]`; resamples for which it is NaN are left out.
    Equal seeds draw equal resamples. Raises ValueError where there is nothing to draw from.
    """
    rows = np.asarray(values, dtype=np.float64)
    if rows.size == 0:
        raise ValueError("no values, so no interval")
    random = np.random.default_rng(seed)
    step = max(1, _NUMBERS // rows.size)
    found: list[Array] = []
    for start in range(0, resamples, step):
        drawn = random.integers(len(rows), size=(min(step, resamples - start), len(rows)))
        found.append(np.asarray(statistic(rows[drawn]), dtype=np.float64))
    tail = (1 - level) / 2
    low, high = np.nanquantile(np.concatenate(found), [tail, 1 - tail])
    return float(low), float(high)
