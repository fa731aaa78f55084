"""From groups to the layers that are shown: in figures, dashboards and sums alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_lca.record.tables import Ints

MOST = 40  # Layers that have a row each where they are listed; of more, blocks stand for some.


@dataclass(frozen=True)
class Layers:
    """Layers in network order, and which columns of a table belong to each.

    Attributes:
        names: (L,).
        owner: The layer of every column [G], as its place among the names.

    Example:
        >>> layers = Layers.of(["conv", "conv", "fc"])
        >>> layers.names, layers.sums(np.array([[1, 2, 4]])).tolist()
        (('conv', 'fc'), [[3, 4]])
    """

    names: tuple[str, ...]
    owner: Ints

    @classmethod
    def of(cls, layers: Sequence[str]) -> Layers:
        """Collects the layers of columns (G,), in the order in which they come first."""
        index: dict[str, int] = {}
        owner = [index.setdefault(layer, len(index)) for layer in layers]
        return cls(tuple(index), np.array(owner, np.int64))

    def __len__(self) -> int:
        return len(self.names)

    def sums(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Adds what belongs to one layer: [..., G] -> [..., L]; counts are widened to int64."""
        if len(self.names) == len(self.owner):
            return values
        wide = np.int64 if np.issubdtype(values.dtype, np.integer) else values.dtype
        order = np.argsort(self.owner, kind="stable")
        first = np.searchsorted(self.owner[order], np.arange(len(self.names)))
        ordered = values[..., order].astype(wide, copy=False)
        total: npt.NDArray[Any] = np.add.reduceat(ordered, first, axis=-1)
        return total

    def columns(self, layer: int) -> Ints:
        """Finds the columns of a layer, by its place."""
        return np.flatnonzero(self.owner == layer)
