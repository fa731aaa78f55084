"""What is shown: a run at one moment, and the table of each of its probes, by layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from lightning_lca.record.history import History
from lightning_lca.record.tables import Ints, StepTable, WindowTable
from lightning_lca.tensorboard.query import QueryError, show


@dataclass(frozen=True)
class Table:
    """One probe's history as it was at one moment; safe to read while the run goes on.

    Attributes:
        key: Tells tables apart: run, stamp and probe.
        groups: Name of every column of the rows (G,).
        sizes: Number of weights of every group [G].
        group_by: What a group is: "layer", "parameter" or "neuron".
        rows: One row for each measured step.
        neurons: Credit of channels over windows of steps; None if they were not recorded.
    """

    key: tuple[str, ...]
    groups: tuple[str, ...]
    sizes: Ints
    group_by: str
    rows: StepTable
    neurons: WindowTable | None

    @classmethod
    def of(cls, history: History, *key: str) -> Table:
        """Takes what a history holds now; rows that come later go to new arrays."""
        # The rows of neurons are windows already; as such they would be copied to float64.
        neurons = None if history.group_by == "neuron" else history.neurons
        return cls(key, history.groups, history.sizes, history.group_by, history.rows, neurons)

    @cached_property
    def columns(self) -> dict[str, list[int]]:
        """Gives the columns that make up each layer shown; neurons are shown as their layer."""
        columns: dict[str, list[int]] = {}
        for column, group in enumerate(self.groups):
            layer = group.rpartition("/")[0] if self.group_by == "neuron" else group
            columns.setdefault(layer, []).append(column)
        return columns

    @property
    def layers(self) -> list[str]:
        """Names of the layers shown, in network order."""
        return list(self.columns)

    @cached_property
    def layer_sizes(self) -> Ints:
        """Number of weights of every layer shown [L]."""
        sizes: Ints = self.by_layer(self.sizes)
        return sizes

    def by_layer(self, values: Any) -> Any:
        """Adds what belongs to one layer: [..., G] -> [..., L]."""
        if len(self.columns) == len(self.groups):
            return values
        return np.stack([values[..., c].sum(-1) for c in self.columns.values()], -1)

    def find(self, layer: str) -> int:
        """Gives a layer's place among those shown.

        Raises:
            QueryError: No such layer.
        """
        try:
            return self.layers.index(layer)
        except ValueError:
            raise QueryError(f"No layer {show(layer)}. {listing('layers', self.layers)}") from None

    @cached_property
    def spacing(self) -> int:
        """Optimizer steps from one row to the next, as a rule."""
        return spacing(self.rows.steps)

    @property
    def first_step(self) -> int:
        """The first optimizer step that the rows cover."""
        return max(1, int(self.rows.steps[0]) - self.spacing + 1)

    @property
    def last_step(self) -> int:
        """The last optimizer step that the rows cover."""
        return int(self.rows.steps[-1])

    @property
    def bytes(self) -> int:
        """Memory that the arrays take."""
        columns = [getattr(self.rows, f.name) for f in fields(self.rows)]
        columns += [] if self.neurons is None else [self.neurons.allocated]
        return sum(column.nbytes for column in columns)


@dataclass(frozen=True)
class Run:
    """A run as it was at one moment.

    Attributes:
        name: TensorBoard's name for it.
        stamp: Changes when data were added.
        tables: By name of the probe, "" for a single unnamed one.
        meta: What the latest session says of itself; None if nothing of it can be read.
        lost: Pieces of the record that could not be read.
    """

    name: str
    stamp: str
    tables: Mapping[str, Table]
    meta: Mapping[str, Any] | None
    lost: int

    def table(self, probe: str | None) -> Table:
        """Gives a probe's table; the first where none was named.

        Raises:
            QueryError: No such probe, or nothing was measured yet.
        """
        if self.error:
            raise QueryError(f"Run {show(self.name)}: {self.error}")
        name = next(iter(self.tables)) if probe is None else probe
        if name not in self.tables:
            raise QueryError(
                f"Run {show(self.name)} has no probe {show(name)}. "
                f"{listing('probes', list(self.tables))}"
            )
        if not len(self.tables[name].rows):
            raise QueryError(
                f"Run {show(self.name)} has no measured step yet. Its record is written every 512 "
                "measured steps or 15 seconds: wait a little."
            )
        return self.tables[name]

    @property
    def error(self) -> str | None:
        """Why the record cannot be read, if it cannot."""
        if self.tables:
            return None
        return (
            "the description of its LCA record (lca/meta) is damaged, so that its chunks cannot be "
            "read. If another copy of the event file exists, put that in its place."
        )

    def describe(self) -> dict[str, Any]:
        """Tells of the run what the page needs to ask for more."""
        meta, table = self.meta or {}, next(iter(self.tables.values()), None)
        rows = len(table.rows) if table else 0
        return {
            "name": self.name,
            "probes": list(self.tables),
            "group_by": table.group_by if table else "layer",
            "layers": table.layers if table else [],
            "sizes": table.layer_sizes.tolist() if table else [],
            "first_step": table.first_step if table and rows else None,
            "last_step": table.last_step if table and rows else None,
            "rows": rows,
            "channels": table is not None
            and (table.neurons is not None or table.group_by == "neuron"),
            "lost": self.lost,
            "stamp": self.stamp,
            "settings": meta.get("settings") or {},
            "error": self.error,
        }


def spacing(steps: Ints) -> int:
    """Gives the usual distance between steps. [T] -> at least 1."""
    return max(1, int(np.median(np.diff(steps)))) if len(steps) > 1 else 1


def listing(what: str, names: Sequence[str], most: int = 12) -> str:
    """Tells what there is, in a sentence that stays short."""
    if not names:
        return f"There are no {what}."
    shown = ", ".join(show(name) for name in names[:most])
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"The {what} are {shown}{more}."
