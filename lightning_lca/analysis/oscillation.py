"""Whether credit comes and goes with a period: its autocorrelation, slow changes removed."""

from __future__ import annotations

import numpy as np

from lightning_lca.record.tables import Floats

WINDOW = 41  # Steps whose mean is removed around each.
LAGS = 16
CLEAR = 0.3  # An autocorrelation this far from zero is clear.
_NEAR = 0.8  # Of the highest.


def autocorrelation(credit: Floats, lags: int = LAGS) -> Floats:
    """Returns the autocorrelation of every column at lags 1 to ``lags``: [T, L] -> [lags, L].

    The mean of the 41 steps around each is removed first, and the scale of what is left: both
    change over a training. Steps that are not finite are left out. NaN where fewer than twice
    as many steps as lags are there, or nothing changes.

    Example:
        >>> wave = np.tile([1.0, -1.0], 50)[:, None]
        >>> autocorrelation(wave, 2).round(1).tolist()
        [[-1.0], [1.0]]
    """
    finite = credit[np.isfinite(credit).all(1)]
    steps, columns = finite.shape
    if steps < 2 * lags:
        return np.full((lags, columns), np.nan)
    rest = finite - _smooth(finite)
    scale = np.sqrt(_smooth(rest**2))
    rest = np.divide(rest, scale, out=np.zeros_like(rest), where=scale > 0)
    power = (rest**2).mean(0)
    found = np.full((lags, columns), np.nan)
    for lag in range(1, lags + 1):
        product = (rest[lag:] * rest[:-lag]).mean(0)
        np.divide(product, power, out=found[lag - 1], where=power > 0)
    return found


def period(found: Floats) -> int | None:
    """Returns the period in steps of one column of `autocorrelation` [lags], None if it has none.

    It has one if steps some way apart do clearly the opposite of one another, and others, further
    apart, clearly the same: the period is the first lag that comes near the highest of these.

    Example:
        >>> period(np.array([-0.8, 0.7, -0.6, 0.5]))
        2
    """
    dips = np.flatnonzero(np.nan_to_num(found) < -CLEAR)
    after = np.nan_to_num(found[dips[0] :]) if len(dips) else np.zeros(1)
    if after.max() < CLEAR:
        return None
    return int(dips[0] + np.flatnonzero(after >= _NEAR * after.max())[0]) + 1


def _smooth(values: Floats) -> Floats:
    """Takes the mean of the window around each step, of what there is of it: [T, L] -> [T, L]."""
    steps = len(values)
    sums = np.concatenate([np.zeros((1, values.shape[1])), values.cumsum(0)])
    first = np.maximum(np.arange(steps) - WINDOW // 2, 0)
    last = np.minimum(np.arange(steps) + WINDOW // 2 + 1, steps)
    mean: Floats = (sums[last] - sums[first]) / (last - first)[:, None]
    return mean
