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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_SHIFTS = np.array([-2, -1, 1, 2])
_LOOKED_AT = 2**18  # Numbers compared at once.
_CELLS = 2_000_000  # Numbers held at once while drawing: bounds memory whatever the run's length.


@dataclass(frozen=True)
class Dips:
    """Moments of learning of G layers, one after the other in time.

    Attributes:
        at: The iteration of each [M].
        layer: The layer of each, by its place [M].
        depth: Its LCA there [M].
        layers: G.
    """

    at: Ints
    layer: Ints
    depth: npt.NDArray[np.floating]
    layers: int

    @classmethod
    def of(
        cls, table: npt.NDArray[np.floating], strongest: int, counts: Bools | None = None
    ) -> Dips:
        """Finds the strongest of every layer: [T, G]; see `moments_of_learning`.

        Iterations are looked at in blocks. Only what is below the lowest found so far is kept.

        Args:
            table: LCA per iteration and layer.
            strongest: Most of a layer.
            counts: Iterations that are as good as finite [T]; None: all.
        """
        steps, layers = table.shape
        block = max(1, _LOOKED_AT // max(1, layers))
        enough = np.full(layers, np.inf, table.dtype)
        found, waiting = [cls.none(layers)], 0
        for first in range(0, steps - 2, block):
            part = table[first : first + block + 2]
            before, middle, after = part[:-2], part[1:-1], part[2:]
            # Far faster flat than in two dimensions.
            cells = np.flatnonzero((middle < before) & (middle < after) & (middle < enough))
            row, layer = np.divmod(cells, layers)
            values = np.stack([part[row + i, layer] for i in range(3)])
            finite = np.isfinite(values).all(0)
            if counts is not None:
                finite &= np.all([counts[first + row + i] for i in range(3)], 0)
            row, layer, depth = row[finite], layer[finite], values[1, finite]
            found.append(cls(first + 1 + row, layer, depth, layers))
            waiting += len(row)
            if waiting > 4 * strongest * layers:
                found, waiting = [cls.strongest(found, strongest)], 0
                kept = np.bincount(found[0].layer, minlength=layers)
                enough[kept == strongest] = -np.inf
                np.maximum.at(enough, found[0].layer, found[0].depth)
                enough[kept < strongest] = np.inf
        return cls.strongest(found, strongest)

    @classmethod
    def none(cls, layers: int) -> Dips:
        """Makes none."""
        nothing = np.empty(0, np.int64)
        return cls(nothing, nothing, nothing.astype(float), layers)

    @classmethod
    def strongest(cls, parts: Sequence[Dips], strongest: int) -> Dips:
        """Picks the strongest of every layer among parts that follow one another in time."""
        at, layer, depth = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("at", "layer", "depth")
        )
        # By layer and depth, the earlier one first where two are equal.
        order = np.lexsort((at, depth, layer))
        first = np.searchsorted(layer[order], np.arange(parts[0].layers))
        rank = np.arange(len(order)) - first[layer[order]]
        kept = np.sort(order[rank < strongest])
        return cls(at[kept], layer[kept], depth[kept], parts[0].layers)

    def moments(self, steps: int) -> Bools:
        """Marks them in a table [steps, G]."""
        found = np.zeros((steps, self.layers), bool)
        found[self.at, self.layer] = True
        return found

    @classmethod
    def marked(cls, moments: Bools) -> Dips:
        """Reads them from such a table; how deep they are is not known."""
        at, layer = moments.nonzero()
        return cls(at, layer, np.full(len(at), np.nan), moments.shape[1])


@dataclass(frozen=True)
class Synchrony:
    """How far the moments of learning of G layers coincide over T iterations.

    `synchronized` and `pairs` count the same thing in two ways, which agree where few layers peak
    together. Where many do, `synchronized` loses its force: four shifts cannot take fifty layers
    apart, nearly every moment still has company in the null, and `p_value` is large. `pairs` keeps
    its force: a pair of layers that always coincides does so in one draw of four.

    Attributes:
        dips: The moments of learning, in order of time.
        coincidences: Number of layers with a moment at each iteration [T].
        synchronized: Number of moments that share their iteration with another layer's.
        null: The same count in each draw of the null [draws].
        p_value: Share of draws with at least as many synchronized moments, in (0, 1].
        pairs: Number of pairs of layers that coincide, summed over iterations.
        null_pairs: The same count in each draw of the null [draws].
        p_pairs: Share of draws with at least as many pairs, in (0, 1].
        rates: Coincident pairs in bins, where edges were given.
        table: LCA per iteration and layer [T, G], where it was given.
    """

    dips: Dips
    coincidences: Ints
    synchronized: int
    null: Ints
    p_value: float
    pairs: int
    null_pairs: Ints
    p_pairs: float
    rates: Rates | None = None
    table: npt.NDArray[np.floating] | None = None

    @classmethod
    def of(
        cls,
        dips: Dips,
        steps: int,
        draws: int = 1000,
        seed: int = 0,
        *,
        edges: npt.ArrayLike | None = None,
        table: npt.NDArray[np.floating] | None = None,
    ) -> Synchrony:
        """Compares moments of learning with chance; as `synchrony`, whose arguments these are.

        Args:
            dips: The moments, within the iterations.
            steps: T.
            draws: Number of draws of the null.
            seed: Of the draws.
            edges: Of bins, as of `rates`.
            table: LCA per iteration and layer [T, G], for the correlation.
        """
        coincidences = np.bincount(dips.at, minlength=steps)
        shared, pairs = int(_shared(coincidences)), int(_pairs(coincidences).sum())
        null, null_pairs, binned = _null(dips, draws, seed, edges)
        return cls(
            dips=dips,
            coincidences=coincidences,
            synchronized=shared,
            null=null,
            p_value=(1 + int((null >= shared).sum())) / (1 + draws),
            pairs=pairs,
            null_pairs=null_pairs,
            p_pairs=(1 + int((null_pairs >= pairs).sum())) / (1 + draws),
            rates=None if edges is None else _rates(coincidences, edges, binned),
            table=table,
        )

    @cached_property
    def moments(self) -> Bools:
        """Where each layer has a moment of learning [T, G]."""
        return self.dips.moments(len(self.coincidences))

    @cached_property
    def _expected_and_band(self) -> tuple[Floats, Floats]:
        return _band(self.dips, len(self.coincidences))

    @property
    def expected(self) -> Floats:
        """The null's mean of `coincidences` [T], exact."""
        return self._expected_and_band[0]

    @property
    def band(self) -> Floats:
        """`expected` plus two standard deviations [T], exact."""
        return self._expected_and_band[1]

    @cached_property
    def correlation(self) -> Floats:
        """Pearson's between the layers' LCA [G, G], over the iterations where all are finite.

        It is nan where a layer is constant, or no table was given.
        """
        if self.table is None:
            return np.full((self.dips.layers,) * 2, np.nan)
        return _correlation(self.table.astype(np.float64, copy=False))

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
    return Dips.of(table, _count("strongest", strongest)).moments(len(table))


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
    strongest, draws = _count("strongest", strongest), _count("draws", draws)
    seed = _count("seed", seed, least=0)
    return Synchrony.of(Dips.of(table, strongest), len(table), draws, seed, table=table)


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
    _, _, binned = _null(Dips.marked(moments), draws, seed, borders)
    return _rates(moments.sum(1), borders, binned)


def _rates(coincidences: Ints, edges: npt.ArrayLike, null: Ints) -> Rates:
    """Divides counts of pairs in bins, and in draws of bins [draws, B], by the bins' iterations."""
    borders = np.asarray(edges, np.int64)
    width = np.diff(borders)
    running = np.concatenate([[0], _pairs(coincidences).cumsum()])
    drawn = null / width
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return Rates(np.diff(running[borders]) / width, drawn.mean(0), low, high)


def _null(
    dips: Dips, draws: int, seed: int, edges: npt.ArrayLike | None = None
) -> tuple[Ints, Ints, Ints]:
    """Draws the null: shared moments [draws], pairs [draws], and pairs in bins [draws, B]."""
    borders = np.empty(0, np.int64) if edges is None else np.asarray(edges, np.int64)
    shared, pairs = np.zeros(draws, np.int64), np.zeros(draws, np.int64)
    binned = np.zeros((draws, max(0, len(borders) - 1)), np.int64)
    for rows, places, counts in _shifted(dips, draws, seed):
        drawn = _pairs(counts)
        shared[rows], pairs[rows] = _shared(counts), drawn.sum(-1)
        if len(borders):
            # Only bins that a shifted moment can reach have any.
            cuts = np.searchsorted(places, borders)
            reached = np.flatnonzero(np.diff(cuts))
            if len(reached):
                within = drawn[:, : cuts[-1]]
                binned[rows, reached] = np.add.reduceat(within, cuts[reached], axis=1)
    return shared, pairs, binned


def _shifted(dips: Dips, draws: int, seed: int) -> Iterator[tuple[slice, Ints, Ints]]:
    """Draws shifts; yields (which draws, iterations [U], layers' moments on them [draws, U]).

    Moments that a shift takes off either end keep their place there, so none is lost.
    """
    at, layer = dips.at, dips.layer
    places, landing = np.unique(at[:, None] + _SHIFTS, return_inverse=True)
    landing = landing.reshape(len(at), len(_SHIFTS)).astype(np.int32)
    random = np.random.default_rng(seed)
    # Kept small, so that what is drawn does not depend on how the draws are cut into blocks.
    choices = random.integers(len(_SHIFTS), size=(draws, dips.layers), dtype=np.uint8)
    block = max(1, _CELLS // max(1, len(at) + len(places)))
    for first in range(0, draws, block):
        chosen = choices[first : first + block]
        where = landing[np.arange(len(at)), chosen[:, layer]]
        where += np.arange(len(chosen), dtype=np.int32)[:, None] * np.int32(len(places))
        counts = np.bincount(where.ravel(), minlength=len(chosen) * len(places))
        yield slice(first, first + block), places, counts.reshape(len(chosen), len(places))


def _shared(counts: Ints) -> Ints:
    shared: Ints = (counts * (counts > 1)).sum(-1)
    return shared


def _pairs(counts: Ints) -> Ints:
    return counts * (counts - 1) // 2


def _band(dips: Dips, steps: int) -> tuple[Floats, Floats]:
    """Returns the null's exact mean and mean plus two sd of the coincidences. [M] -> [T] twice.

    A layer's moments move together, so that only one can land on an iteration in a draw: a layer is
    one coin, of chance 1/4 per moment in reach.
    """
    lands = dips.at[:, None] + _SHIFTS
    inside = (lands >= 0) & (lands < steps)
    cells = (lands * dips.layers + dips.layer[:, None])[inside]
    cell, reach = np.unique(cells, return_counts=True)
    chance = reach / len(_SHIFTS)
    step = cell // max(1, dips.layers)
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


def _table(allocated: npt.ArrayLike) -> npt.NDArray[np.floating]:
    try:
        raw = np.asarray(allocated)
        # What is a record's stays as it is: comparisons are the same.
        dtype = raw.dtype if raw.dtype == np.float32 else np.float64
        table: npt.NDArray[np.floating] = raw.astype(dtype, casting="same_kind", copy=False)
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
