"""What is made once of every row of a probe, and kept while rows are added."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from lightning_lca.analysis.sums import BLOCK, Column, block_sums
from lightning_lca.record.growth import Allocate, GrowingArray
from lightning_lca.record.history import History
from lightning_lca.record.layers import Layers
from lightning_lca.record.summary import PerStep
from lightning_lca.record.tables import StepTable
from lightning_lca.tensorboard.spill import memory

_CELLS = 2**20  # Numbers that are looked at at once: bounds memory whatever the run's length.
_WIDE = ("allocated", "helping", "hurting")


@dataclass(frozen=True)
class Digest:
    """Of T rows, as they were at one moment.

    Attributes:
        per_step: Which rows are finite, and what judges them.
        columns: Credit, counts, and the shares of breakdowns by their name, with sums of blocks.
    """

    per_step: PerStep
    columns: Mapping[str, Column]

    @property
    def bytes(self) -> int:
        """Memory that it takes beside the rows."""
        blocks = [column.blocks for column in self.columns.values()]
        blocks += [getattr(self.per_step, field.name) for field in fields(PerStep)]
        return sum(map(memory, blocks))


class Digester:
    """Makes the digest of a history's rows, looking at each row once."""

    def __init__(self, history: History, allocate: Allocate = np.empty) -> None:
        """Has seen no row yet.

        Args:
            history: Whose rows these are.
            allocate: Makes arrays, as of `growth.GrowingArray`.
        """
        self._layers = Layers.of(history.layers)
        self._shares = list(history.shares)
        self._grown: dict[str, GrowingArray] = {}
        self._allocate = allocate
        self._seen = 0

    def digest(self, rows: StepTable) -> Digest:
        """Looks at the rows that are new; those before must be the ones that it has seen."""
        step = max(BLOCK, _CELLS // max(1, rows.allocated.shape[1]))
        arrays = self._look(rows, self._seen, min(self._seen + step, len(rows)))
        for start in range(self._seen + step, len(rows), step):
            arrays = self._look(rows, start, min(start + step, len(rows)))
        self._seen = len(rows)
        per_step = PerStep(*(arrays[field.name] for field in fields(PerStep)))
        columns = {
            name: Column(values, arrays.get(f"known {name}", per_step.finite), arrays[name])
            for name, values in self._wide(rows).items()
        }
        return Digest(per_step, columns)

    def _look(self, rows: StepTable, start: int, stop: int) -> dict[str, Any]:
        """Adds what a stretch of rows has; returns what all rows up to its end have."""
        some = rows[start:stop]
        judged = PerStep.of(some, self._layers)
        arrays = {
            field.name: self._add(field.name, getattr(judged, field.name))
            for field in fields(PerStep)
        }
        first, last = start // BLOCK * BLOCK, stop // BLOCK * BLOCK
        for name, values in self._wide(rows).items():
            counts = arrays["finite"]
            if name in self._shares:
                known = judged.finite & np.isfinite(values[start:stop]).all((1, 2))
                arrays[f"known {name}"] = counts = self._add(f"known {name}", known)
            sums = block_sums(values[first:last], counts[first:last])
            arrays[name] = self._add(name, sums)
        return arrays

    def _wide(self, rows: StepTable) -> dict[str, Any]:
        """Finds the columns that are added up."""
        shares = {name: rows.shares[name] for name in self._shares}
        return {name: getattr(rows, name) for name in _WIDE} | shares

    def _add(self, name: str, new: Any) -> Any:
        return self._grown.setdefault(name, GrowingArray(self._allocate)).extend([new])
