"""Exact sums of a table's rows over any range, at the cost of a hundred rows.

Every 64 rows are added up once. A range is then the sum of the blocks within it, and of the rows
at either end that fill no block: nothing is subtracted, so that nothing cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_lca.analysis.bins import Bins, Bools, counted

BLOCK = 64  # Rows.


@dataclass(frozen=True)
class Column:
    """A column of a table, and the sums of its blocks.

    Attributes:
        values: [T, ...].
        counts: Which rows sums count [T].
        blocks: Sums of the rows that count, in blocks from the first row on [T // 64, ...].
    """

    values: npt.NDArray[Any]
    counts: Bools
    blocks: npt.NDArray[Any]

    @classmethod
    def of(cls, values: npt.NDArray[Any], counts: Bools) -> Column:
        """Adds up the blocks of a column."""
        return cls(values, counts, block_sums(values, counts))

    def total(self, rows: slice) -> Any:
        """Adds up the rows of a range that count: [T, ...] -> [...].

        Floats are nan where the range has rows, and none that counts.
        """
        counts = self.counts[rows]
        total = self._between(rows.start, rows.stop)
        nothing = len(counts) and not counts.any() and total.dtype.kind == "f"
        return total * np.nan if nothing else total

    def per_bin(self, tiles: Bins) -> Any:
        """Adds up the rows of every bin that count: [T, ...] -> [B, ...].

        Floats are nan where a bin has rows, and none that counts.
        """
        total = self.between(tiles.cuts)
        if total.dtype.kind == "f":
            total[(tiles.measured > 0) & (tiles.counted == 0)] = np.nan
        return total

    def between(self, cuts: Sequence[int] | npt.NDArray[np.int64]) -> Any:
        """Adds up the rows between cuts that count: [T, ...] -> [len(cuts) - 1, ...]."""
        places = np.asarray(cuts).tolist()
        total = np.empty((len(places) - 1, *self.values.shape[1:]), self.blocks.dtype)
        first, last = places[0], places[-1]
        if last - first <= BLOCK * len(total):
            # Few rows to a bin: what does not count is taken out of all of them at once.
            rows = counted(self.values[first:last], self.counts[first:last])
            for k, (start, stop) in enumerate(pairwise(places)):
                rows[start - first : stop - first].sum(0, dtype=total.dtype, out=total[k])
        else:
            for k, (start, stop) in enumerate(pairwise(places)):
                total[k] = self._between(start, stop)
        return total

    def _between(self, start: int, stop: int) -> Any:
        first, last = -(-start // BLOCK), stop // BLOCK
        if first >= last:
            return self._add_up(start, stop)
        whole = self.blocks[first:last].sum(0)
        return self._add_up(start, first * BLOCK) + whole + self._add_up(last * BLOCK, stop)

    def _add_up(self, start: int, stop: int) -> Any:
        values = counted(self.values[start:stop], self.counts[start:stop])
        return values.sum(0, dtype=self.blocks.dtype)


def block_sums(values: npt.NDArray[Any], counts: Bools) -> npt.NDArray[Any]:
    """Adds up the rows of every whole block that count: [T, ...] -> [T // 64, ...].

    Floats become float64, whole numbers int64.
    """
    blocks = len(values) // BLOCK
    rows = blocks * BLOCK
    dtype = np.float64 if values.dtype.kind == "f" else np.int64
    parts = counted(values[:rows], counts[:rows]).reshape(blocks, BLOCK, *values.shape[1:])
    sums: npt.NDArray[Any] = parts.sum(1, dtype=dtype)
    return sums
