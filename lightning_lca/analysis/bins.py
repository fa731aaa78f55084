"""A run in bins: exact sums of a table's rows over tiles of time, for figures and dashboards alike.

One rule for a step that is not finite: it is left out of every sum, of every layer, and counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_lca.record.tables import Floats, Ints

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Bins:
    """A tiling of a run, and where it cuts a table of T rows.

    Attributes:
        edges: Bin k covers the optimizer steps above ``edges[k]`` up to ``edges[k + 1]`` [B + 1].
        cuts: Its rows are those from ``cuts[k]`` to before ``cuts[k + 1]`` [B + 1].
        finite: Which rows sums count [T]; None: all.
    """

    edges: Ints
    cuts: Ints
    finite: Bools | None = None

    @classmethod
    def by_steps(
        cls,
        steps: Ints,
        first: int,
        last: int,
        most: int,
        least_width: int = 1,
        finite: Bools | None = None,
    ) -> Bins:
        """Tiles the steps from first to last, both included, with at most so many equal bins.

        Args:
            steps: Optimizer steps done at the end of every row [T], rising.
            first: First optimizer step.
            last: Last optimizer step.
            most: Most bins.
            least_width: Least optimizer steps of a bin.
            finite: As the attribute.
        """
        width = max(-(-(last - first + 1) // most), least_width)
        edges = np.append(np.arange(first - 1, last, width, dtype=np.int64), last)
        return cls(edges, np.searchsorted(steps, edges, side="right"), finite)

    @classmethod
    def by_rows(
        cls, steps: Ints, most: int, start: int | None = None, finite: Bools | None = None
    ) -> Bins:
        """Cuts T rows into at most so many bins of equally many; the last takes what remains.

        Args:
            steps: Optimizer steps done at the end of every row [T], rising; at least one.
            most: Most bins.
            start: Where the first row starts, by default as far from its end as the others.
            finite: As the attribute.
        """
        cuts = np.append(np.arange(0, len(steps), -(-len(steps) // most)), len(steps))
        first = int(steps[0]) - spacing(steps) if start is None else start
        return cls(np.concatenate([[first], steps])[cuts], cuts, finite)

    def __len__(self) -> int:
        return len(self.cuts) - 1

    @property
    def rows(self) -> slice:
        """All rows of the range."""
        return slice(int(self.cuts[0]), int(self.cuts[-1]))

    @property
    def middles(self) -> Floats:
        """The optimizer step in the middle of every bin [B]."""
        return (self.edges[:-1] + self.edges[1:]) / 2

    @property
    def unit(self) -> str:
        """What a number per bin is per, in words: "per step" or "per 20 steps"."""
        width = int(np.median(np.diff(self.edges)))
        return "per step" if width == 1 else f"per {width:,} steps"

    @property
    def measured(self) -> Ints:
        """Number of rows in every bin [B]."""
        return np.diff(self.cuts)

    @property
    def counted(self) -> Ints:
        """Number of rows in every bin that sums count [B]."""
        if self.finite is None:
            return self.measured
        running = np.concatenate([[0], np.cumsum(self.finite, dtype=np.int64)])
        return np.diff(running[self.cuts])

    @property
    def not_finite(self) -> Ints:
        """Number of rows in every bin that sums leave out [B]."""
        return self.measured - self.counted

    def sums(self, values: npt.NDArray[Any], dtype: npt.DTypeLike = np.float64) -> Any:
        """Adds up the rows of every bin: [T, ...] -> [B, ...].

        Floats are nan where a bin has rows, and none that counts.
        """
        first, rows = int(self.cuts[0]), self.rows
        values = counted(values[rows], None if self.finite is None else self.finite[rows])
        cuts = self.cuts - first
        parts = (values[a:b].astype(dtype, copy=False).sum(0) for a, b in pairwise(cuts))
        total = np.stack(list(parts))
        if np.issubdtype(total.dtype, np.floating):
            total[(self.measured > 0) & (self.counted == 0)] = np.nan
        return total

    def running(self, values: npt.NDArray[Any]) -> Floats:
        """Adds up all rows up to every edge: [T, ...] -> [B + 1, ...], from 0.

        The end of a bin without a row that counts is nan where it has any: a gap in a line.
        """
        return accumulated(self.sums(values))


def accumulated(sums: Floats) -> Floats:
    """Adds up bins up to every edge: [B, ...] -> [B + 1, ...], from 0; nan stays, as a gap."""
    gaps = np.isnan(sums)
    total = np.where(gaps, 0.0, sums).cumsum(0)
    total[gaps] = np.nan
    return np.concatenate([np.zeros((1, *total.shape[1:])), total])


def counted(values: npt.NDArray[Any], finite: Bools | None) -> npt.NDArray[Any]:
    """Puts 0 in place of rows that sums leave out: [T, ...] -> [T, ...].

    So it does for the number that is not finite in a row that is, as the drift after a loss that
    was not.

    Args:
        values: A column of a table, or several.
        finite: Which rows count [T]; None: all.
    """
    if np.issubdtype(values.dtype, np.floating):
        whole = np.isfinite(values)
        if not whole.all():
            values = np.where(whole, values, 0)
    if finite is not None and not finite.all():
        values = np.where(finite.reshape(-1, *[1] * (values.ndim - 1)), values, 0)
    return values


def spacing(steps: Ints) -> int:
    """Finds the usual distance between steps: [T] -> at least 1."""
    return max(1, int(np.median(np.diff(steps)))) if len(steps) > 1 else 1
