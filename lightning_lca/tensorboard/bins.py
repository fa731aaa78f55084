"""Bins: a range of optimizer steps, tiled, and exact sums of a table's rows over the tiles."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_lca.record.tables import Ints
from lightning_lca.tensorboard.query import MOST_BINS, QueryError
from lightning_lca.tensorboard.snapshot import Table


@dataclass(frozen=True)
class Bins:
    """A tiling of a range of optimizer steps, and where it cuts a table.

    Attributes:
        edges: Bin k covers the steps above ``edges[k]`` up to ``edges[k + 1]`` [B + 1].
        cuts: Its rows are those from ``cuts[k]`` to before ``cuts[k + 1]`` [B + 1].
    """

    edges: Ints
    cuts: Ints

    @classmethod
    def of(cls, steps: Ints, first: int, last: int, most: int, least_width: int) -> Bins:
        """Tiles the steps from first to last, both included, with at most so many bins."""
        width = max(-(-(last - first + 1) // most), least_width)
        edges = np.append(np.arange(first - 1, last, width, dtype=np.int64), last)
        return cls(edges, np.searchsorted(steps, edges, side="right"))

    @property
    def rows(self) -> slice:
        """All rows of the range."""
        return slice(int(self.cuts[0]), int(self.cuts[-1]))

    @property
    def measured(self) -> Ints:
        """Number of rows in every bin [B]."""
        return np.diff(self.cuts)

    def sums(self, values: npt.NDArray[Any], dtype: npt.DTypeLike = np.float64) -> Any:
        """Adds up the rows of every bin: [T, ...] -> [B, ...]."""
        parts = (values[a:b].astype(dtype, copy=False) for a, b in pairwise(self.cuts))
        return np.stack([part.sum(0) for part in parts])


@dataclass(frozen=True)
class Range:
    """Which steps to show, and how finely; None for an open end."""

    start: int | None = None
    stop: int | None = None
    bins: int = MOST_BINS // 4

    def of(self, *tables: Table) -> tuple[int, int]:
        """Gives the first and last step for these tables.

        Raises:
            QueryError: One end was given, and lies beyond the other one.
        """
        first = min(t.first_step for t in tables) if self.start is None else self.start
        last = max(t.last_step for t in tables) if self.stop is None else self.stop
        if first > last:
            given, found = ("start", first) if self.stop is None else ("stop", last)
            raise QueryError(
                f"{given}={found} lies outside the measured steps, {tables[0].first_step} to "
                f"{tables[0].last_step}. Give a step within them, or both ends."
            )
        return first, last

    def tile(self, table: Table, steps: Ints | None = None, least_width: int = 1) -> Bins:
        """Tiles the range for a table, or for other steps than those of its rows."""
        first, last = self.of(table)
        steps = table.rows.steps if steps is None else steps
        return Bins.of(steps, first, last, self.bins, max(table.spacing, least_width))


def plain(values: Any) -> Any:
    """Turns numbers into what JSON can hold, with None for what is not finite."""
    numbers: Any = np.asarray(values, np.float64)
    finite = np.isfinite(numbers)
    if not finite.all():
        numbers = np.where(finite, numbers.astype(object), None)
    return numbers.tolist()
