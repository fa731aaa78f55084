"""Rows that are added at the end of a table, without copying the table each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lightning_lca.record.tables import StepTable

_MORE = 1.5  # By what arrays grow, so that a row is copied three times at most on average.

Allocate = Callable[[tuple[int, ...], Any], Any]


class Growing:
    """Arrays with room to spare behind a table's last row.

    What is handed out stays as it is: rows that come later lie behind it.
    """

    def __init__(self, allocate: Allocate = np.empty) -> None:
        """Holds nothing yet.

        Args:
            allocate: Makes an array of a shape and a dtype, whatever it holds.
        """
        self._allocate = allocate
        self._room: dict[str, Any] = {}
        self._latest: StepTable | None = None

    def join(self, parts: Sequence[StepTable]) -> StepTable:
        """Stacks tables; fast if the first of them is what was handed out last."""
        first = parts[0]
        if first is not self._latest:
            self._room, new = {}, list(parts)
        else:
            new = list(parts[1:])
        if not new:
            return first
        start = len(first) if self._room else 0
        stop = sum(map(len, parts))
        columns = {
            name: self._extend(name, [part.arrays[name] for part in new], start, stop)
            for name in first.arrays
        }
        self._latest = StepTable.of_arrays(columns)
        return self._latest

    def _extend(self, name: str, new: Sequence[Any], start: int, stop: int) -> Any:
        """Writes rows behind the first so many of a column; returns all rows."""
        room = self._room.get(name)
        there = [] if room is None else [room]
        dtype = np.result_type(*(array.dtype for array in [*there, *new]))
        if room is None or len(room) < stop or room.dtype != dtype:
            size = stop if room is None else max(stop, int(_MORE * len(room)))
            larger = self._allocate((size, *new[0].shape[1:]), dtype)
            if room is not None:
                larger[:start] = room[:start]
            self._room[name] = room = larger
        np.concatenate(new, out=room[start:stop], casting="same_kind")
        return room[:stop]
