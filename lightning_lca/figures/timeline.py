"""What the figures draw, as arrays: time in bins that lose nothing, neurons folded into layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_lca.record.history import History
from lightning_lca.record.tables import WindowTable

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Timeline:
    """Rows of a table in B bins of equally many rows; the last bin takes what remains.

    Attributes:
        rows: Row numbers at the borders of the bins [B + 1].
        steps: Optimizer steps done at the borders [B + 1].
    """

    rows: Ints
    steps: Ints

    @classmethod
    def of(cls, steps: Ints, most: int, start: int | None = None) -> Timeline:
        """Cuts T rows that end at `steps` into at most `most` bins. [T] -> [B + 1] twice.

        The first row starts at `start`, by default as far from its end as the others.
        """
        spacing = int(np.median(np.diff(steps))) if len(steps) > 1 else 1
        rows = np.append(np.arange(0, len(steps), -(-len(steps) // most)), len(steps))
        first = steps[0] - spacing if start is None else start
        return cls(rows, np.concatenate([[first], steps])[rows])

    @classmethod
    def of_windows(cls, history: History, windows: WindowTable, most: int) -> Timeline:
        """Cuts the windows of a history, the first of which starts where the history does."""
        return cls.of(windows.steps, most, int(cls.of(history.steps, 1).steps[0]))

    def __len__(self) -> int:
        return len(self.rows) - 1

    @property
    def middles(self) -> Floats:
        """The optimizer step in the middle of every bin [B]."""
        return (self.steps[:-1] + self.steps[1:]) / 2

    @property
    def unit(self) -> str:
        """What a number per bin is per, in words: "per step" or "per 20 steps"."""
        width = int(np.median(np.diff(self.steps)))
        return "per step" if width == 1 else f"per {width:,} steps"

    def sums(self, table: Array) -> Floats:
        """Adds up the rows of every bin. [T, ...] -> [B, ...]; nan where a term is not finite."""
        return np.add.reduceat(finite_or_nan(table), self.rows[:-1], axis=0)

    def running(self, table: Array) -> Floats:
        """Adds up all rows until every border. [T, ...] -> [B + 1, ...], from 0.

        Terms that are not finite count as 0, and the end of their bin is nan: a gap in a line.
        """
        values = finite_or_nan(table)
        total = np.add.reduceat(values, self.rows[:-1], axis=0)
        gaps = np.isnan(total)
        if gaps.any():
            total = np.add.reduceat(np.nan_to_num(values), self.rows[:-1], axis=0)
        total = total.cumsum(0)
        total[gaps] = np.nan
        return np.concatenate([np.zeros((1, *total.shape[1:])), total])


@dataclass(frozen=True)
class Layers:
    """A table with a column per row of a figure: layers, or parameters if the record has those.

    Attributes:
        names: (L,), in network order.
        values: [T, L].
    """

    names: tuple[str, ...]
    values: Array

    @classmethod
    def of(cls, history: History, column: Array) -> Layers:
        """Takes a column of a history. [T, G] -> [T, L]; neurons are added up per layer."""
        names = tuple(history.groups)
        if history.group_by != "neuron" or not names:
            return cls(names, column)
        layers, owner = fold(names)
        order = np.argsort(owner, kind="stable")
        first = np.searchsorted(owner[order], np.arange(len(layers)))
        return cls(layers, np.add.reduceat(column[:, order], first, axis=1))

    def __len__(self) -> int:
        return len(self.names)


def fold(names: tuple[str, ...]) -> tuple[tuple[str, ...], Ints]:
    """Finds the layers of neurons. (N,) -> (names (L,), layer of every neuron [N]).

    >>> fold(("conv/0", "conv/1", "fc/0"))
    (('conv', 'fc'), array([0, 0, 1]))
    """
    index: dict[str, int] = {}
    owner = [index.setdefault(name.rpartition("/")[0], len(index)) for name in names]
    return tuple(index), np.array(owner, np.int64)


def total(table: Array) -> Floats:
    """Adds up all finite terms of every column. [T, N] -> [N]."""
    sums: Floats = np.nansum(finite_or_nan(table), axis=0)
    return sums


def finite_or_nan(table: Array) -> Floats:
    """Makes infinities nan, whose sums give no warnings."""
    values = np.asarray(table, np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def credit(history: History) -> Layers:
    """Reads the LCA of the layers of a history that has rows [T, L].

    Raises:
        ValueError: It has none.
    """
    check(history)
    return Layers.of(history, finite_or_nan(history.allocated))


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
