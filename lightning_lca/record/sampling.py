"""How far credit holds on other data: from the batches of a probe, of which each has its own.

Credit is exact on the probe. Other data of the same kind would give other credit; how far the
probe's batches lie apart tells how far (Student's t over K batches). Two batches tell next to
nothing, four to eight tell it well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lightning_lca.record.layers import Layers
from lightning_lca.record.statistics import Floats, error_of_mean, quantile
from lightning_lca.record.tree import Folded

if TYPE_CHECKING:
    from lightning_lca.record.history import History

_SURE = 0.95
LEAST = 4  # Batches that a statement about single steps needs.
_MOST = 1e9  # Examples.


@dataclass(frozen=True)
class OfRun:
    """Credit of a run on other data like the probe's.

    Attributes:
        batches: K.
        reach: Half of the 95% interval of every column's credit over the run, in loss units.
    """

    batches: int
    reach: Floats


def of_run(history: History, layers: Layers | Folded | None = None) -> OfRun | None:
    """Looks how far the batches lie apart over all finite steps; None where there is one batch.

    Args:
        history: The run.
        layers: What columns are added up to; None: groups as they are.
    """
    by_batch = history.by_batch
    if by_batch is None:
        return None
    values = by_batch.allocated
    known = history.finite & np.isfinite(values).all((1, 2))
    count = values.shape[2]
    if not known.any() or count < 2:
        return None
    sums = values[known].sum(0).T
    sums = sums if layers is None else layers.sums(sums)
    return OfRun(count, quantile((1 + _SURE) / 2, count - 1) * error_of_mean(sums, 0))


@dataclass(frozen=True)
class Signs:
    """How often the probe tells the sign right that a layer's credit has on all data, in a step.

    Attributes:
        right: Share of layers and steps, as it is now.
        examples: So many the probe would need for 95 %; None: more than could be told.
    """

    right: float
    examples: int | None


def signs(history: History, examples: int) -> Signs | None:
    """Estimates how often signs are right; None with fewer than four batches or ten finite steps.

    Credit on all data is not known: its size is estimated per layer, as what is left of that on the
    probe after the error is taken off, Σ A² − Σ error². An error of N examples falls as 1/√N.

    Args:
        history: The run.
        examples: How many the probe has.
    """
    by_batch = history.by_batch
    if by_batch is None or len(by_batch.names) < LEAST:
        return None
    known = history.finite & np.isfinite(by_batch.allocated).all((1, 2))
    layers = history.shown
    if known.sum() < 10:
        return None
    credit = layers.sums(history.allocated[known])
    each = layers.sums(by_batch.allocated[known].transpose(0, 2, 1))
    error = error_of_mean(each, 1)
    moves = (credit**2).sum(0) > 0
    if not moves.any():
        return None
    credit, noise = credit[:, moves], np.sqrt((error[:, moves] ** 2).mean(0))
    size = (credit**2).mean(0)
    kept = np.sqrt(np.clip(1 - noise**2 / size, 0, None))
    with np.errstate(divide="ignore"):
        steep = np.where(noise > 0, np.abs(credit) * kept / noise, np.inf)

    def right(times: float) -> float:
        return float(_normal(steep * math.sqrt(times)).mean())

    low, high = 1 / examples, _MOST / examples
    if right(high) < _SURE:
        return Signs(right(1.0), None)
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if right(middle) >= _SURE else (middle, high)
    return Signs(right(1.0), math.ceil(high * examples))


def _normal(values: Floats) -> Floats:
    """The chance that a standard normal number lies below [...]."""
    found: Floats = np.vectorize(math.erf, otypes=[np.float64])(values / math.sqrt(2))
    return 0.5 + found / 2
