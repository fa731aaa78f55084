"""The table of measured steps: appended to while training, read back whole from the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_lca.record import findings, notebook, summary
from lightning_lca.record.frames import FrameName, frame
from lightning_lca.record.growth import Allocate, GrowingTable
from lightning_lca.record.layers import Layers
from lightning_lca.record.statistics import error_of_mean
from lightning_lca.record.tables import (
    Breakdown,
    Columns,
    Floats,
    Ints,
    StepTable,
    WindowTable,
    layer_of,
)

if TYPE_CHECKING:
    import pandas as pd

OSCILLATION = "oscillation"
BATCH = "batch"
_NAMES = 2**25  # Bytes of names that are made for a table that has no row yet.


class History:
    """All measured steps of a run: T rows, G groups, in network order.

    Columns are attributes: ``steps``, ``loss_before``, ``loss_after``, ``residual``, ``drift``,
    ``splits``, ``converged``, ``finite``, ``unmoved``, ``trained`` and ``seconds`` [T], and
    ``allocated``, ``helping`` and ``hurting`` [T, G]. The latter two are fractions of ``sizes``, in
    [0, 1]; the rest is idle. The ledger closes: ``loss_after[-1] - loss_before[0]`` equals
    ``allocated.sum() + residual.sum() + drift.sum()``.

    Attributes:
        groups: Name of every group (G,).
        sizes: Number of weights of every group [G].
        group_by: What a group is: "layer", "parameter", "neuron", "head", "module:2" and so on, or
            "custom".
        layers: The layer that every group belongs to (G,).
        settings: What the callback was asked for, as far as the record says it.
        lost: Pieces of the record that could not be read: chunks of steps, or stretches of a file.
        cuts: How often rows were dropped; while it stays, rows only join those that are there.
        closes: Whether what the rule leaves unexplained is shared out over the weights; then
            ``raw_residual`` tells what that was.
    """

    cuts = 0
    closes = False
    _growing: GrowingTable | None = None  # Made when rows are added; a pickle has none.

    def __init__(
        self,
        groups: Sequence[str],
        sizes: Sequence[int] | Ints,
        group_by: str = "layer",
        layers: Sequence[str] | None = None,
        breakdowns: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Starts an empty table; without layers they are told from the names of the groups.

        Args:
            groups: Name of every group (G,).
            sizes: Number of weights of every group [G].
            group_by: What a group is.
            layers: The layer that every group belongs to (G,).
            breakdowns: By name, the names of the shares that credit is split into.
        """
        self.groups: tuple[str, ...] = tuple(groups)
        self.sizes: Ints = np.array(sizes, np.int64)
        self.group_by = group_by
        self.layers: tuple[str, ...] = (
            tuple(layer_of(group, group_by) for group in groups)
            if layers is None
            else tuple(layers)
        )
        self.settings: dict[str, Any] = {}
        self.lost = 0
        self._shares: dict[str, tuple[str, ...]] = {}
        self.split_into(breakdowns or {})
        self._parts: list[StepTable] = [StepTable.none(len(groups))]
        self._windows: dict[str, list[WindowTable]] = {}
        self._declared: dict[str, Columns] = {}

    def split_into(self, breakdowns: Mapping[str, Sequence[str]], batches: int = 0) -> None:
        """Says what credit is split into, before rows are appended.

        Args:
            breakdowns: By name, the names of the shares.
            batches: How many batches of the probe have credit of their own; 0: it has one batch.
        """
        self._shares = {name: tuple(names) for name, names in breakdowns.items()}
        if batches > 1:
            self._shares[BATCH] = tuple(map(str, range(batches)))

    def append(self, rows: StepTable) -> None:
        """Adds measured steps at the end."""
        self._parts.append(rows)

    def append_windows(self, table: str, windows: WindowTable) -> None:
        """Adds windows of steps to the table "parameters", "neurons" or "weights"."""
        self._windows.setdefault(table, []).append(windows)

    def grow_in(self, allocate: Allocate) -> None:
        """Says how arrays are made that rows are joined in."""
        if self._growing is None:
            self._growing = GrowingTable(allocate)

    def declare(self, table: str, columns: Columns) -> None:
        """Says what a table of windows holds, before it has rows."""
        self._declared[table] = columns

    def declared(self, table: str) -> Columns | None:
        """Tells what a table of windows read from a record holds; None: there is no such table."""
        return self._declared.get(table)

    def is_named(self, table: str) -> bool:
        """Whether the names of a declared table of windows are made already."""
        return table in self._windows

    def template(self, table: str) -> WindowTable:
        """Finds a declared table of windows, whatever rows it has, or makes its names."""
        parts = self._windows.get(table)
        return parts[0] if parts else self._declared[table].table()

    def as_it_is(self) -> History:
        """Takes a view of what is there now: later rows and windows do not join it."""
        now = History(self.groups, self.sizes, self.group_by, self.layers, self._shares)
        now.settings, now.lost, now.closes = dict(self.settings), self.lost, self.closes
        now._parts = [self.rows]
        now._windows = {name: [table] for name, table in self.windows.items()}
        now._declared = dict(self._declared)
        return now

    @property
    def last_step(self) -> int:
        """Optimizer steps done at the end of the last measured step; 0 if there is none."""
        return next((int(part.steps[-1]) for part in reversed(self._parts) if len(part)), 0)

    def cut(self, last_step: int) -> None:
        """Drops what was measured after a step, as a session does that starts there."""
        self.cuts += 1
        self._parts = [self.rows[self.steps <= last_step]]
        for name in list(self._windows):
            windows = self._table(name)
            if windows is not None:
                self._windows[name] = [windows[windows.steps <= last_step]]

    @property
    def shown(self) -> Layers:
        """What dashboards show as a row: neurons by their layer, other groups as they are."""
        return Layers.of(self.layers if self.group_by == "neuron" else self.groups)

    @property
    def rows(self) -> StepTable:
        """The whole table, with counts in place of fractions."""
        counts = {name: len(names) for name, names in self._shares.items()}
        parts = [part.split_into(counts) for part in self._parts]
        if len(parts) > 1:
            if self._growing is None:
                self._growing = GrowingTable()
            parts = [self._growing.join([p for p in parts if len(p)] or parts[:1])]
        self._parts = parts
        return parts[0]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the rows, without the room for more."""
        return {name: value for name, value in vars(self).items() if name != "_growing"}

    def go_on_like(self, other: History) -> None:
        """Takes over what another session says of the same columns: settings, layers, shares."""
        self.settings, self.layers, self._shares = other.settings, other.layers, other._shares
        self.closes = self.closes or other.closes

    @property
    def breakdowns(self) -> dict[str, Breakdown]:
        """Credit split into named shares that add up to it, by name of the breakdown.

        See ``breakdown`` of `LCACallback`; empty where it was not asked for.
        """
        return {name: self._split(name) for name in self.shares}

    @property
    def oscillation(self) -> Breakdown | None:
        """How weights turn round in every step, by group; None where it was not asked for.

        Its columns are no shares that add up: ``reversed``, of the weights that moved in this step
        and in the one before, the share that reversed direction; ``flipped``, the share whose
        gradient changed sign within the step; ``cosine_start`` and ``cosine_end``, between the
        motion and the downhill direction at either end, in [-1, 1]. NaN where nothing can be said.
        """
        return self._split(OSCILLATION) if OSCILLATION in self._shares else None

    @property
    def by_batch(self) -> Breakdown | None:
        """Credit on each batch of the probe by itself; None where it has one batch.

        ``names`` are the batches' numbers (K,); of more than 16, neighbours are taken together. The
        mean over batches (weighted by their samples) is ``allocated``. How far they lie apart tells
        how far credits hold on other data like these: the probe's sampling error.
        """
        return self._split(BATCH) if BATCH in self._shares else None

    @property
    def sampling_error(self) -> Floats | None:
        """Standard error of credit by the choice of the probe's batches [T, G], in loss units.

        From how far K batches lie apart; None where the probe has one. Errors of different steps
        are not independent: all steps see the same batches. For a run, add up credit first.
        """
        if (by_batch := self.by_batch) is None:
            return None
        with np.errstate(invalid="ignore", over="ignore"):
            return error_of_mean(by_batch.allocated, 2)

    @property
    def efficiency(self) -> Floats:
        """Net against gross credit of every group over the run [G], |Σ A| / Σ |A|; NaN at rest.

        1: every step went the same way; near 0: helping and hurting steps cancelled.
        """
        credit = self.allocated[self.finite]
        with np.errstate(invalid="ignore", divide="ignore"):
            net: Floats = np.abs(credit.sum(0)) / np.abs(credit).sum(0)
        return net

    def _split(self, name: str) -> Breakdown:
        values = self.rows.shares[name]
        return Breakdown(self._shares[name], values.astype(np.float64, copy=False))

    @property
    def shares(self) -> dict[str, tuple[str, ...]]:
        """Names of the shares of every breakdown, whatever rows there are."""
        apart = (OSCILLATION, BATCH)
        return {name: names for name, names in self._shares.items() if name not in apart}

    @property
    def split_columns(self) -> dict[str, tuple[str, ...]]:
        """Names of all columns per group beside credit: ``shares``, ``oscillation``, batches."""
        return dict(self._shares)

    @property
    def parameters(self) -> WindowTable | None:
        """Credit of every parameter over windows of steps; None in records without it."""
        return self._table("parameters")

    @property
    def neurons(self) -> WindowTable | None:
        """Credit of every neuron (output channel) over windows of steps.

        None unless training had ``neurons=True``; with ``group_by="neuron"`` every measured step is
        a window.
        """
        if self.group_by != "neuron":
            return self._table("neurons")
        return WindowTable(
            self.groups,
            self.steps,
            np.ones(len(self), np.int64),
            np.asarray(self.allocated),
            layers=self.layers,
        )

    @property
    def weights(self) -> WindowTable | None:
        """Credit of a random sample of single weights over windows of steps.

        None unless training had ``track_parameters=True``.
        """
        return self._table("weights")

    @property
    def windows(self) -> dict[str, WindowTable]:
        """All tables of windows that the record has, by name."""
        tables = {name: self._table(name) for name in self._declared | self._windows}
        return {name: table for name, table in tables.items() if table is not None}

    def measures_like(self, other: History) -> bool:
        """Whether both have the same columns."""
        mine, theirs = (history._declared | history._windows for history in (self, other))
        return (
            self.groups == other.groups
            and mine.keys() == theirs.keys()
            and all(self._has_columns_of(other, name) for name in mine)
        )

    def _has_columns_of(self, other: History, name: str) -> bool:
        mine, theirs = self._declared.get(name), other._declared.get(name)
        if mine is not None and theirs is not None:
            return (mine.names, mine.counts, mine.indices) == (
                theirs.names,
                theirs.counts,
                theirs.indices,
            )
        if mine is not None:
            return mine.is_named(other._windows[name][0].names)
        if theirs is not None:
            return theirs.is_named(self._windows[name][0].names)
        return self._windows[name][0].names == other._windows[name][0].names

    def _table(self, name: str) -> WindowTable | None:
        parts = self._windows.get(name)
        if parts is None:
            columns = self._declared.get(name)
            if columns is None:
                return None
            # Whatever is declared, nothing large is made before there are rows.
            table = columns.table() if columns.memory <= _NAMES else WindowTable.none(())
            if columns.memory <= _NAMES:
                self._windows[name] = [table]
            return table
        if len(parts) > 1:
            self._windows[name] = parts = [WindowTable.join(parts)]
        return parts[0]

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    @property
    def steps(self) -> Ints:
        """Optimizer steps done at the end of each segment [T]."""
        return self.rows.steps

    @property
    def allocated(self) -> Floats:
        """Credit per group [T, G], in loss units; negative = helped."""
        return self.rows.allocated.astype(np.float64, copy=False)

    @property
    def helping(self) -> Floats:
        """Fraction of each group's weights that helped [T, G]."""
        return self.rows.helping / np.maximum(self.sizes, 1)

    @property
    def hurting(self) -> Floats:
        """Fraction of each group's weights that hurt [T, G]."""
        return self.rows.hurting / np.maximum(self.sizes, 1)

    @property
    def loss_before(self) -> Floats:
        """Probe loss at each segment's start [T]."""
        return self.rows.loss_before

    @property
    def loss_after(self) -> Floats:
        """Probe loss at each segment's end [T]."""
        return self.rows.loss_after

    @property
    def residual(self) -> Floats:
        """Loss change that the credits leave unexplained [T]."""
        return self.rows.residual

    @property
    def raw_residual(self) -> Floats:
        """What the rule left unexplained, before a closed rule shared it out [T].

        With ``quadrature="closed_trapezoid"`` or "adaptive" the residual itself is next to nothing
        by construction, and this is what tells how far single layers can be trusted. Of other rules
        it is the residual.
        """
        return self.rows.raw_residual

    @property
    def drift(self) -> Floats:
        """Loss change between segments, by other code or weights left out [T]."""
        return self.rows.drift

    @property
    def splits(self) -> Ints:
        """Panels that the rule was applied on [T]."""
        return self.rows.splits

    @property
    def converged(self) -> npt.NDArray[np.bool_]:
        """Whether each step kept to the tolerance, where one was asked for, and was finite [T]."""
        return self.rows.converged

    @property
    def finite(self) -> npt.NDArray[np.bool_]:
        """Whether losses and credits of each step are finite, so that sums count it [T]."""
        return self.rows.finite

    @property
    def unmoved(self) -> npt.NDArray[np.bool_]:
        """Steps in which no weight got credit [T]: a gradient scaler skips such steps."""
        return self.rows.unmoved

    @property
    def trained(self) -> Ints:
        """Number of weights that were being trained [T]."""
        return self.rows.trained

    @property
    def seconds(self) -> Floats:
        """What each measurement took, as the host saw it [T]."""
        return self.rows.seconds

    @classmethod
    def load(cls, path: str | Path, probe: str | None = None) -> History:
        """Reads the record of a run back from its log directory (credits to float32).

        Where sessions overlap, as after a resume, the later one wins. What is cut off or damaged is
        left out and counted in ``lost``.

        Args:
            path: The directory with the event files.
            probe: Which probe, where several were given by name; by default the first.

        Raises:
            FileNotFoundError: The directory does not exist or holds no LCA record of its own; of a
                directory of several runs the message lists them, the latest first.
            ValueError: No such probe.
        """
        from lightning_lca.record.reader import Reader  # It makes histories.

        directory = Path(path)
        reader = Reader.of(directory)
        if probe is None:
            return next(iter(reader.histories.values()))
        if probe not in reader.histories:
            there = [p for p in reader.histories if p] or "a single one, without a name"
            raise ValueError(f"No probe {probe!r} in {directory}; it has {there}.")
        return reader.histories[probe]

    def summary(self, all: bool = False) -> str:
        """Tells per group its share of the loss change, and how the ledger closes, as text.

        Args:
            all: A row for every group. Else, of more than forty, the ten that moved the loss most
                have one, and the others are folded by block: module by module, with exact sums.
        """
        return summary.text(self, self.findings(), everything=all)

    def findings(self) -> list[findings.Finding]:
        """Lists what the run shows beyond chance, most important first, and what to do about it.

        Fewer than 50 finite steps are too few to tell: an empty list, and `summary` says so.
        """
        return findings.find({"": self})

    def to_pandas(self, table: FrameName = "steps") -> pd.DataFrame:
        """Returns a table of the run as a pandas data frame; needs pandas.

        Credits and losses are in loss units (negative credit helped), fractions in [0, 1].

        ============== ================== ==========================================================
        table          index              columns
        ============== ================== ==========================================================
        "steps"        step               loss_before, loss_after, residual, drift, splits,
                                          converged, trained (weights), seconds, lca (that of all
                                          groups), finite
        "groups"       step, group        layer, weights, lca, helping, hurting (fractions of the
                                          weights), and where recorded sampling_error, reversed,
                                          flipped, cosine_start, cosine_end
        "breakdowns"   step, group        (breakdown, share): credit; over the shares of a
                                          breakdown it adds up to lca
        "batches"      step, group        credit on each batch of the probe, by number
        "parameters"   step, parameter    layer, kind, measured, lca
        "neurons"      step, neuron       layer, measured, lca
        "weights"      step, weight       measured, lca, helped: a sample of single weights
        ============== ================== ==========================================================

        A step is the number of optimizer steps done at its end. The last three have a row for each
        window of steps: its last step, the number of ``measured`` steps in it, the credit in all of
        them, and in how many of them a weight ``helped``.

        Args:
            table: Which one.

        Raises:
            ModuleNotFoundError: pandas is not installed.
            ValueError: There is no such table, or the run did not record it.

        Example:
            >>> history = History(["conv", "fc"], [100, 7])
            >>> history.to_pandas("groups").columns.tolist()
            ['layer', 'weights', 'lca', 'helping', 'hurting']
        """
        return frame(self, table)

    def __repr__(self) -> str:
        what = f"{len(self)} steps x {len(self.groups)} groups"
        if not len(self):
            return f"<History of {what}>"
        return f"<History of {what}, loss {self.loss_before[0]:.4g} to {self.loss_after[-1]:.4g}>"

    def _repr_html_(self) -> str:
        """Shows the summary as a table with bars, where a notebook shows it."""
        return notebook.html(self, self.findings())
