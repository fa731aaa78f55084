"""What the figures draw, as arrays: the rows of a history that they show, over time in bins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_lca.analysis.bins import Bins, counted
from lightning_lca.record.history import History
from lightning_lca.record.tables import Floats, WindowTable

Array = npt.NDArray[Any]


def timeline(history: History, most: int) -> Bins:
    """Cuts the steps of a history into at most so many bins of equally many rows."""
    return Bins.by_rows(history.steps, most, finite=history.rows.finite)


def of_windows(history: History, windows: WindowTable, most: int) -> Bins:
    """Cuts the windows of a history, the first of which starts where the history does."""
    finite = (windows.measured > 0) & np.isfinite(windows.allocated).all(1)
    return Bins.by_rows(windows.steps, most, int(timeline(history, 1).edges[0]), finite)


@dataclass(frozen=True)
class Shown:
    """A table with a column per row of a figure.

    Attributes:
        names: (L,), in network order.
        values: [T, L].
    """

    names: tuple[str, ...]
    values: Array

    @classmethod
    def of(cls, history: History, column: Array) -> Shown:
        """Takes a column of a history. [T, G] -> [T, L]; neurons are added up per layer."""
        shown = history.shown
        return cls(shown.names, shown.sums(column))

    def __len__(self) -> int:
        return len(self.names)


def total(table: Array) -> Floats:
    """Adds up every column, from the terms that are finite. [T, N] -> [N]."""
    sums: Floats = counted(np.asarray(table, np.float64), None).sum(axis=0)
    return sums


def finite_or_nan(table: Array) -> Floats:
    """Makes infinities nan, whose sums give no warnings."""
    values = np.asarray(table, np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def credit(history: History) -> Shown:
    """Reads the LCA of what is shown of a history that has rows [T, L]; nan in steps left out.

    Raises:
        ValueError: It has none.
    """
    check(history)
    finite = history.rows.finite
    return Shown.of(history, np.where(finite[:, None], history.allocated, np.nan))


def check(history: History) -> None:
    """Refuses a history without rows.

    Raises:
        ValueError: It has none.
    """
    if not len(history) or not len(history.groups):
        raise ValueError(
            "There is nothing to draw: no step was measured yet. Train with LCACallback for at "
            "least every_n_steps steps first."
        )


def sample(history: History) -> WindowTable:
    """Reads the sampled single weights of a history.

    Raises:
        ValueError: It has none, or no window of steps is complete yet.
    """
    weights = history.weights
    if weights is None or not len(weights):
        raise ValueError(
            "This record has no single weights. Train with LCACallback(track_parameters=True), for "
            "at least one logging interval."
        )
    return weights
