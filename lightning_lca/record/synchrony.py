"""Do layers learn together? Moments of learning, coincidences, and what chance would give.

After Lan et al. 2019 ("LCA: Loss Change Allocation for Neural Network Training"), with the
definitions adopted here. A *moment of learning* is an iteration where a layer's LCA is a local
minimum. Moments are *synchronized* when two or more layers have one on the same iteration. The
*null* shifts each layer's whole series by one or two iterations, earlier or later, at random: that
keeps every layer's own rhythm and the slow trend, and breaks only the coincidence.

An iteration is a row of the table, that is a measured step.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_SHIFTS = np.array([-2, -1, 1, 2])
_CELLS = 2_000_000  # Numbers held at once while drawing: bounds memory whatever the run's length.


@dataclass(frozen=True)
class Synchrony:
    """How far the moments of learning of G layers coincide over T iterations.

    `synchronized` and `pairs` count the same thing in two ways, which agree where few layers peak
    together. Where many do, `synchronized` loses its force: four shifts cannot take fifty layers
    apart, nearly every moment still has company in the null, and `p_value` is large. `pairs` keeps
    its force: a pair of layers that always coincides does so in one draw of four.

    Attributes:
        moments: Where each layer has a moment of learning [T, G].
        coincidences: Number of layers with a moment at each iteration [T].
        expected: The null's mean of `coincidences` [T], exact.
        band: `expected` plus two standard deviations [T], exact.
        synchronized: Number of moments that share their iteration with another layer's.
        null: The same count in each draw of the null [draws].
        p_value: Share of draws with at least as many synchronized moments, in (0, 1].
        pairs: Number of pairs of layers that coincide, summed over iterations.
        null_pairs: The same count in each draw of the null [draws].
        p_pairs: Share of draws with at least as many pairs, in (0, 1].
        correlation: Pearson's between the layers' LCA [G, G], over the iterations where all layers
            are finite; nan where a layer is constant.
    """

    moments: Bools
    coincidences: Ints
    expected: Floats
    band: Floats
    synchronized: int
    null: Ints
    p_value: float
    pairs: int
    null_pairs: Ints
    p_pairs: float
    correlation: Floats

    @property
    def excess(self) -> float | None:
        """Coincident pairs over those by chance, minus 1; None where chance gives none."""
        chance = float(self.null_pairs.mean())
        return self.pairs / chance - 1 if chance else None

    @property
    def excess_range(self) -> tuple[float, float]:
        """What `excess` would be by chance, in 95 % of draws; (0, 0) where chance gives none."""
        low, high = np.quantile(self.null_pairs, [0.025, 0.975])
        chance = float(self.null_pairs.mean())
        return (float(low / chance - 1), float(high / chance - 1)) if chance else (0.0, 0.0)


@dataclass(frozen=True)
class Rates:
    """Coincident pairs of layers per iteration in B bins, against the null.

    Attributes:
        observed: Pairs per iteration [B].
        expected: The null's mean [B].
        low: The null's 2.5 % quantile [B].
        high: The null's 97.5 % quantile [B].
    """

    observed: Floats
    expected: Floats
    low: Floats
    high: Floats


def moments_of_learning(allocated: npt.ArrayLike, strongest: int = 20) -> Bools:
    """Finds each layer's strongest moments of learning. [T, G] -> bool [T, G].

    A moment is an iteration whose LCA is lower than that of the iteration before and of the one
    after. Of each layer's the lowest are kept, the earlier one where two are equal. All three
    values must be finite.

    Args:
        allocated: LCA per iteration and layer [T, G], in loss units; negative = helped.
        strongest: Most moments per layer, at least 1.

    Raises:
        ValueError: `allocated` is not a table of real numbers, or `strongest` is below 1.

    Source: after Lan et al. 2019, with the definitions adopted here.

    >>> moments_of_learning([[0.0], [-3.0], [-1.0], [-2.0], [0.0]]).nonzero()[0]
    array([1, 3])
    >>> moments_of_learning([[0.0], [-3.0], [-1.0], [-2.0], [0.0]], strongest=1).nonzero()[0]
    array([1])
    """
    table = _table(allocated)
    strongest = _count("strongest", strongest)
    found = np.zeros(table.shape, bool)
    for layer, series in enumerate(table.T):
        values = np.where(np.isfinite(series), series, np.nan)
        middle = values[1:-1]
        at = 1 + np.flatnonzero((middle < values[:-2]) & (middle < values[2:]))
        if len(at) > strongest:
            depth = values[at]
            last = np.partition(depth, strongest - 1)[strongest - 1]
            below = at[depth < last]
            at = np.concatenate([below, at[depth == last][: strongest - len(below)]])
        found[at, layer] = True
    return found


def synchrony(
    allocated: npt.ArrayLike, strongest: int = 20, draws: int = 1000, seed: int = 0
) -> Synchrony:
    """Compares the coincidences of moments of learning with those of shifted series. [T, G].

    In a draw two layers keep their alignment with probability 1/4. So the test is conservative: of
    1,000 sets of independent series, white or autocorrelated, 1.5 to 5 % had p of at most 0.05,
    measured for 4 to 50 layers. And p cannot fall below about 1/4 for two layers, 1/16 for three,
    1/64 for four: with fewer than four layers nothing is significant at 5 %.

    Args:
        allocated: LCA per iteration and layer [T, G], in loss units; negative = helped.
        strongest: Most moments per layer, at least 1.
        draws: Number of draws of the null, at least 1.
        seed: Of the draws; the same seed gives the same answer.

    Raises:
        ValueError: `allocated` is not a table of real numbers, or a count is out of range.

    Source: after Lan et al. 2019, with the definitions adopted here.

    >>> series = np.random.default_rng(0).normal(size=(500, 1)) + np.zeros((1, 6))
    >>> together = synchrony(series)
    >>> together.synchronized, together.p_pairs < 0.01
    (120, True)
    """
    table = _table(allocated)
    moments = moments_of_learning(table, strongest)
    draws, seed = _count("draws", draws), _count("seed", seed, least=0)
    coincidences = moments.sum(1)
    shared, pairs = _shared(coincidences), _pairs(coincidences)
    null, null_pairs = np.zeros(draws, np.int64), np.zeros(draws, np.int64)
    for rows, _, counts in _shifted(moments, draws, seed):
        null[rows], null_pairs[rows] = _shared(counts), _pairs(counts).sum(-1)
    expected, band = _band(moments)
    return Synchrony(
        moments=moments,
        coincidences=coincidences,
        expected=expected,
        band=band,
        synchronized=int(shared),
        null=null,
        p_value=(1 + int((null >= shared).sum())) / (1 + draws),
        pairs=int(pairs.sum()),
        null_pairs=null_pairs,
        p_pairs=(1 + int((null_pairs >= pairs.sum()).sum())) / (1 + draws),
        correlation=_correlation(table),
    )


def rates(moments: Bools, edges: npt.ArrayLike, draws: int = 1000, seed: int = 0) -> Rates:
    """Counts coincident pairs of layers per iteration in bins of a long run. [T, G] -> [B].

    Args:
        moments: What `moments_of_learning` gave [T, G].
        edges: Row numbers [B + 1], rising from 0 or later to at most T; bin k holds the rows from
            ``edges[k]`` to before ``edges[k + 1]``.
        draws: Number of draws of the null, at least 1.
        seed: Of the draws.

    Raises:
        ValueError: `edges` do not rise or reach beyond the table, or a count is out of range.

    Source: after Lan et al. 2019, with the definitions adopted here.

    >>> rates(np.eye(4, 2, dtype=bool) | np.eye(4, 2, -1, dtype=bool), [0, 2, 4]).observed
    array([0.5, 0. ])
    """
    moments = np.asarray(moments, bool)
    borders = np.asarray(edges, np.int64)
    if borders.ndim != 1 or len(borders) < 2 or (np.diff(borders) < 1).any():
        raise ValueError(f"Edges must be at least two rising row numbers, got {edges!r}.")
    if borders[0] < 0 or borders[-1] > len(moments):
        raise ValueError(f"Edges must lie within 0 and {len(moments)} rows, got {edges!r}.")
    draws, seed = _count("draws", draws), _count("seed", seed, least=0)
    width = np.diff(borders)
    running = np.concatenate([[0], _pairs(moments.sum(1)).cumsum()])
    null = np.zeros((draws, len(width)))
    for rows, places, counts in _shifted(moments, draws, seed):
        drawn = np.pad(_pairs(counts).cumsum(1), ((0, 0), (1, 0)))
        null[rows] = np.diff(drawn[:, np.searchsorted(places, borders)], axis=1)
    null /= width
    low, high = np.quantile(null, [0.025, 0.975], axis=0)
    return Rates(np.diff(running[borders]) / width, null.mean(0), low, high)


def _shifted(moments: Bools, draws: int, seed: int) -> Iterator[tuple[slice, Ints, Ints]]:
    """Draws shifts; yields (which draws, iterations [U], layers' moments on them [draws, U]).

    Moments that a shift takes off either end keep their place there, so none is lost.
    """
    at, layer = moments.nonzero()
    places, landing = np.unique(at[:, None] + _SHIFTS, return_inverse=True)
    landing = landing.reshape(len(at), len(_SHIFTS))
    random = np.random.default_rng(seed)
    # Kept small, so that what is drawn does not depend on how the draws are cut into blocks.
    choices = random.integers(len(_SHIFTS), size=(draws, moments.shape[1]), dtype=np.uint8)
    block = max(1, _CELLS // max(1, len(at) + len(places)))
    for first in range(0, draws, block):
        chosen = choices[first : first + block]
        where = landing[np.arange(len(at)), chosen[:, layer]]
        where += np.arange(len(chosen))[:, None] * len(places)
        counts = np.bincount(where.ravel(), minlength=len(chosen) * len(places))
        yield slice(first, first + block), places, counts.reshape(len(chosen), len(places))


def _shared(counts: Ints) -> Ints:
    shared: Ints = (counts * (counts > 1)).sum(-1)
    return shared


def _pairs(counts: Ints) -> Ints:
    return counts * (counts - 1) // 2


def _band(moments: Bools) -> tuple[Floats, Floats]:
    """Returns the null's exact mean and mean plus two sd of the coincidences. [T, G] -> [T] twice.

    A layer's moments move together, so that only one can land on an iteration in a draw: a layer is
    one coin, of chance 1/4 per moment in reach.
    """
    steps, layers = moments.shape
    at, layer = moments.nonzero()
    lands = at[:, None] + _SHIFTS
    inside = (lands >= 0) & (lands < steps)
    cells = (lands * layers + layer[:, None])[inside]
    cell, reach = np.unique(cells, return_counts=True)
    chance = reach / len(_SHIFTS)
    step = cell // max(1, layers)
    expected = np.bincount(step, chance, steps).astype(float)
    variance = np.bincount(step, chance * (1 - chance), steps).astype(float)
    return expected, expected + 2 * np.sqrt(variance)


def _correlation(table: Floats) -> Floats:
    finite = np.isfinite(table).all(1)
    series = table if finite.all() else table[finite]
    if not series.size:
        return np.full((table.shape[1],) * 2, np.nan)
    # Scaled first: squares of very large or small credits stay in the range of floats, and a
    # constant becomes ones, whose mean is exact.
    scale = np.abs(series).max(0)
    series = series / np.where(scale > 0, scale, 1)
    series -= series.mean(0)
    norm = np.sqrt(np.einsum("tg,tg->g", series, series))
    series /= np.where(norm > 0, norm, np.nan)
    return np.clip(series.T @ series, -1, 1)


def _table(allocated: npt.ArrayLike) -> Floats:
    try:
        raw = np.asarray(allocated)
        table = raw.astype(np.float64, casting="same_kind", copy=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The LCA must be real numbers [iterations, layers], got {allocated!r:.80}."
        ) from error
    if table.ndim != 2:
        raise ValueError(f"The LCA must be [iterations, layers], got shape {list(table.shape)}.")
    return table


def _count(name: str, value: int, least: int = 1) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    return number
