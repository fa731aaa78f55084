"""What is shown: a run at one moment, and the table of each of its probes, by layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_lca.analysis.bins import Bins, spacing
from lightning_lca.analysis.sums import Column
from lightning_lca.record.history import History
from lightning_lca.record.layers import Layers
from lightning_lca.record.tables import Ints, StepTable, WindowTable
from lightning_lca.record.tree import Folded, Row, tree
from lightning_lca.tensorboard.digest import Digest, Digester
from lightning_lca.tensorboard.query import MOST_BINS, QueryError, show
from lightning_lca.tensorboard.spill import memory


@dataclass(frozen=True)
class Table:
    """One probe's history as it was at one moment; safe to read while the run goes on.

    Attributes:
        key: Tells tables apart: run, stamp and probe.
        history: As it was: rows that come later go to new arrays.
        rows: One row for each measured step.
        neurons: Credit of channels over windows of steps; None if they were not recorded.
        shown: Which groups make up each layer, or block of layers, that is shown as a row.
        digest: Sums of blocks of rows, and what judges each.
    """

    key: tuple[str, ...]
    history: History
    rows: StepTable
    neurons: WindowTable | None
    shown: Layers | Folded
    digest: Digest

    @classmethod
    def of(cls, history: History, *key: str, digester: Digester | None = None) -> Table:
        """Takes what a history holds now.

        Args:
            history: A probe's.
            key: As the attribute.
            digester: Has seen the earlier rows of this history, if any.
        """
        now = history.as_it_is()
        # The rows of neurons are windows already; as such they would be copied to float64.
        neurons = None if history.group_by == "neuron" else now.neurons
        digest = (digester or Digester(history)).digest(now.rows)
        return cls(key, now, now.rows, neurons, now.shown, digest)

    def folded(self, most: int | None, toggled: Sequence[str] = (), found: str = "") -> Table:
        """Shows blocks in place of their layers, where there are many.

        Args:
            most: As of `Tree.rows`; None: each layer has its row.
            toggled: As of `Tree.rows`.
            found: Shows only layers whose names have these words, and their sum.

        Raises:
            QueryError: No layer has such a name.
        """
        layers = self.history.shown
        if found.split():
            rows = tree(layers.names).find(found)
            if not rows:
                raise QueryError(f"No layer's name has {show(found)}. Look for something else.")
        elif most is None:
            return self
        else:
            rows = tree(layers.names).rows(most, toggled)
        return replace(self, shown=Folded(tuple(rows), layers))

    @property
    def lines(self) -> list[Row]:
        """What is shown as a row each: layers, and blocks of them."""
        if isinstance(self.shown, Folded):
            return list(self.shown.rows)
        return [Row(name, 0, (i,), None) for i, name in enumerate(self.shown.names)]

    def columns_of(self, layer: str) -> Ints:
        """Finds the groups of a layer, or of a block of layers, whether it is shown or not.

        Raises:
            QueryError: No such layer.
        """
        layers = self.history.shown
        block = None if layer in layers.names else tree(layers.names).block(layer)
        if block is None:
            return layers.columns(replace(self, shown=layers).find(layer))
        return np.flatnonzero(np.isin(layers.owner, block))

    def column(self, name: str) -> Column:
        """Finds credit, counts, or the shares of a breakdown, to be added up."""
        return self.digest.columns[name]

    def credit(self, rows: slice) -> Any:
        """Adds up the credit of every layer over a range of rows [L], in loss units."""
        return self.by_layer(self.column("allocated").total(rows))

    @property
    def group_by(self) -> str:
        """What a group is: "layer", "parameter", "neuron" and so on."""
        return self.history.group_by

    @property
    def layers(self) -> list[str]:
        """Names of the layers shown, in network order."""
        return list(self.shown.names)

    @cached_property
    def layer_sizes(self) -> Ints:
        """Number of weights of every layer shown [L]."""
        return self.shown.sums(self.history.sizes)

    def by_layer(self, values: Any) -> Any:
        """Adds what belongs to one layer: [..., G] -> [..., L]."""
        return self.shown.sums(values)

    def has(self, layer: str) -> bool:
        """Whether a layer is among those shown."""
        return layer in self._places

    def find(self, layer: str) -> int:
        """Finds a layer's place among those shown.

        Raises:
            QueryError: No such layer.
        """
        place = self._places.get(layer)
        if place is None:
            raise QueryError(f"No layer {show(layer)}. {listing('layers', self.layers)}")
        return place

    @cached_property
    def _places(self) -> dict[str, int]:
        return {layer: place for place, layer in enumerate(self.layers)}

    @property
    def finite(self) -> npt.NDArray[np.bool_]:
        """Which rows sums count [T]."""
        return self.digest.per_step.finite

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
        """Memory that the arrays take, without what lies in files."""
        columns = [*self.rows.arrays.values()]
        columns += [] if self.neurons is None else [self.neurons.allocated]
        return sum(map(memory, columns)) + self.digest.bytes


@dataclass(frozen=True)
class Range:
    """Which steps to show, and how finely; None for an open end."""

    start: int | None = None
    stop: int | None = None
    bins: int = MOST_BINS // 4

    def of(self, *tables: Table) -> tuple[int, int]:
        """Finds the first and last step for these tables.

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

    def tile(self, table: Table) -> Bins:
        """Tiles the range for the rows of a table."""
        first, last = self.of(table)
        steps = table.rows.steps
        return Bins.by_steps(steps, first, last, self.bins, table.spacing, table.finite)

    def tile_for(self, table: Table, steps: Ints, finite: npt.NDArray[np.bool_] | None) -> Bins:
        """Tiles the range for other rows than those of the table, as windows of steps."""
        first, last = self.of(table)
        least = max(table.spacing, spacing(steps))
        return Bins.by_steps(steps, first, last, self.bins, least, finite)


@dataclass(frozen=True)
class Run:
    """A run as it was at one moment.

    Attributes:
        name: TensorBoard's name for it.
        stamp: Changes when data were added.
        tables: By name of the probe, "" for a single unnamed one.
        settings: Of the callback, as the latest session says them.
        lost: Pieces of the record that could not be read.
        problem: What is wrong with the first of these, in words.
        read: Share of the record that was read so far.
    """

    name: str
    stamp: str
    tables: Mapping[str, Table]
    settings: Mapping[str, Any]
    lost: int
    problem: str = ""
    read: float = 1.0

    def table(self, probe: str | None) -> Table:
        """Returns a probe's table; the first where none was named.

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
            if self.read < 1:
                raise QueryError(f"Run {show(self.name)} is being read. Ask again in a moment.")
            raise QueryError(
                f"Run {show(self.name)} has no measured step yet. Its record is written every 512 "
                "measured steps or 15 seconds: wait a little."
            )
        return self.tables[name]

    @property
    def has_rows(self) -> bool:
        """Whether each probe has a measured step already."""
        return bool(self.tables) and all(len(table.rows) for table in self.tables.values())

    @property
    def error(self) -> str | None:
        """Why the record cannot be read, if it cannot."""
        if self.tables:
            return None
        why = f" ({self.problem})" if self.problem else ""
        return (
            f"the description of its LCA record (lca/meta) is damaged or of another version{why}, "
            "so that its chunks cannot be read. If another copy of the event file exists, put that "
            "in its place."
        )

    def describe(self) -> dict[str, Any]:
        """Tells of the run what the page needs to ask for more."""
        table = next(iter(self.tables.values()), None)
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
            "read": self.read,
            "lost": self.lost,
            "stamp": self.stamp,
            "settings": dict(self.settings),
            "error": self.error,
        }


def listing(what: str, names: Sequence[str], most: int = 12) -> str:
    """Tells what there is, in a sentence that stays short."""
    if not names:
        return f"There are no {what}."
    shown = ", ".join(show(name) for name in names[:most])
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"The {what} are {shown}{more}."
