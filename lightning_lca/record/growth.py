"""Rows that are added at the end of a table, without copying the table each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lightning_lca.record.tables import StepTable

_MORE = 1.5  # By what arrays grow, so that a row is copied three times at most on average.

Allocate = Callable[[tuple[int, ...], Any], Any]


class GrowingArray:
    """An array with room to spare behind its last row.

    What is handed out stays as it is: rows that come later lie behind it.
    """

    def __init__(self, allocate: Allocate = np.empty) -> None:
        """Holds nothing yet.

        Args:
            allocate: Makes an array of a shape and a dtype, whatever it holds.
        """
        self._allocate = allocate
        self._room: Any = None
        self._rows = 0

    def extend(self, new: Sequence[Any]) -> Any:
        """Adds the rows of at least one array; returns all rows there are."""
        start, stop = self._rows, self._rows + sum(map(len, new))
        room = self._room
        dtype = np.result_type(
            *(array.dtype for array in ([*new] if room is None else [room, *new]))
        )
        if room is None or len(room) < stop or room.dtype != dtype:
            size = stop if room is None else max(stop, int(_MORE * len(room)))
            self._room = self._allocate((size, *new[0].shape[1:]), dtype)  # Or of more rows.
            if room is not None:
                self._room[:start] = room[:start]
        np.concatenate(new, out=self._room[start:stop], casting="same_kind")
        self._rows = stop
        return self._room[:stop]


class GrowingTable:
    """The same for a table of steps."""

    def __init__(self, allocate: Allocate = np.empty) -> None:
        """Holds nothing yet.

        Args:
            allocate: As of an array.
        """
        self._allocate = allocate
        self._columns: dict[str, GrowingArray] = {}
        self._latest: StepTable | None = None

    def join(self, parts: Sequence[StepTable]) -> StepTable:
        """Stacks tables; fast if the first of them is what was handed out last."""
        first, new = parts[0], list(parts[1:])
        if first is not self._latest:
            new = list(parts)
            self._columns = {name: GrowingArray(self._allocate) for name in first.arrays}
        if not new:
            return first
        arrays = [part.arrays for part in new]
        self._latest = StepTable.of_arrays(
            {
                name: column.extend([a[name] for a in arrays])
                for name, column in self._columns.items()
            }
        )
        return self._latest
