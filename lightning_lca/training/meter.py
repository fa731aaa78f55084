"""One probe's measurements: from segments to the rows of its history."""

from __future__ import annotations

import functools
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_lca.measure.allocation import (
    Allocation,
    Position,
    Sample,
    Segment,
    Weights,
    allocate,
    refine,
)
from lightning_lca.measure.flag import Flag
from lightning_lca.measure.groups import Grouping, GroupSums
from lightning_lca.measure.quadrature import Quadrature
from lightning_lca.measure.tensors import accumulator
from lightning_lca.probe.probe import Probe
from lightning_lca.record.history import History
from lightning_lca.record.tables import Rows, Windows
from lightning_lca.reporting.distributions import Distribution, Distributions
from lightning_lca.runtime.processes import Ranks
from lightning_lca.training.reuse import Reuse
from lightning_lca.training.windows import Detail


@dataclass(frozen=True)
class _Pending:
    """A measured step, its row on the device: [loss before, loss after, drift, 3 x groups]."""

    step: int
    splits: int
    converged: bool | None
    trained: int
    seconds: float
    row: Tensor


class Meter:
    """Measures segments with one probe.

    Where the loss at a segment's start differs from the one at the end of the segment before (see
    `Reuse`), the difference is booked as drift.

    Attributes:
        probe: The loss surface.
        history: Measured steps, up to the last `collect`.
        totals: Cumulative credit of every weight {name: [*shape]}, where parameters are tracked;
            steps that are not finite are left out.
        last: The latest allocation, where parameters are tracked.
        windows: What a reader of the record must know of the finer sums, as JSON.
    """

    def __init__(
        self,
        probe: Probe,
        grouping: Grouping,
        detail: Detail,
        distributions: Distributions,
        rule: Quadrature,
        ranks: Ranks,
        *,
        tolerance: float | None = None,
        max_splits: int = 32,
        track_parameters: bool = False,
    ) -> None:
        """Starts with an empty history.

        Args:
            probe: The loss surface.
            grouping: How weights are summed.
            detail: What finer sums are kept.
            distributions: Counts the single weights of a layer, when it is asked for.
            rule: Quadrature rule of a segment.
            ranks: The processes that share the probe.
            tolerance: Refines until |residual| is below it, by Simpson's rule.
            max_splits: Most panels of a refinement.
            track_parameters: Keeps ``totals`` and ``last``.
        """
        self.probe = probe
        self.history = History(grouping.names, grouping.sizes, grouping.by)
        for name, table in detail.tables.items():
            self.history.append_windows(name, table)
        self.totals: dict[str, Tensor] | None = {} if track_parameters else None
        self.last: Allocation | None = None
        self._grouping = grouping
        self._detail = detail
        self._distributions = distributions
        self._spread: dict[str, Distribution] = {}
        self.windows = detail.said
        self._rule = rule
        self._ranks = ranks
        self._tolerance = tolerance
        self._max_splits = max_splits
        self._reuse = Reuse(probe, probe if tolerance is None else self._whole, ranks)
        self._out: dict[str, Tensor] = {}
        self._loss: Tensor | None = None  # At the end of the last segment.
        self._pending: list[_Pending] = []

    def measure(
        self, segment: Segment, continues: Flag | bool, step: int, *, spread: bool = False
    ) -> None:
        """Allocates a segment whose stop is live now, and notes the row.

        Args:
            segment: Where the weights were and are.
            continues: Whether it starts exactly where the segment before stopped.
            step: Optimizer steps done at its end.
            spread: Also takes the distributions of credit over single weights.
        """
        began = time.perf_counter()
        first = self._reuse.start(segment, continues)
        if self._out.keys() != segment.start.keys():
            self._out = {n: accumulator(w) for n, w in segment.start.items()}
        if self._tolerance is None:
            allocation = allocate(self.probe, segment, self._rule, first, self._out)
        else:
            allocation = refine(
                self._whole,
                segment,
                self._tolerance,
                self._max_splits,
                first,
                self._out,
                functools.partial(self._add_up, list(segment.start)),
            )
        ends = torch.stack([allocation.loss_before, allocation.loss_after])
        sums = self._sum(allocation, ends)
        if spread and self._grouping.is_whole:
            self._spread = self._distributions.of(allocation.values)
        drift = ends[:1] - (ends[:1] if self._loss is None else self._loss)
        self._loss = ends[1]
        row = torch.cat([ends, drift, sums.credit, sums.helping.to(ends), sums.hurting.to(ends)])
        self._track(allocation, torch.isfinite(torch.cat([ends, sums.credit])).all())
        self._reuse.keep(allocation.last, self._out)
        self._pending.append(
            _Pending(
                step,
                allocation.splits,
                allocation.converged,
                self._grouping.count(segment.start),
                time.perf_counter() - began,
                row,
            )
        )

    @property
    def audits(self) -> int:
        """Starts evaluated only to check a kept one."""
        return self._reuse.audits

    @property
    def gradients(self) -> int:
        """Probe gradients spent on measuring, audits and the check before training apart."""
        return self.probe.gradients - self._reuse.apart

    @property
    def pending(self) -> int:
        """Number of measured steps that are not in the history yet."""
        return len(self._pending)

    def collect(self) -> Rows:
        """Copies the pending rows to the host, at once, into the history; gives the new ones."""
        groups = len(self.history.groups)
        if not self._pending:
            return Rows.none(groups)
        pending, self._pending = self._pending, []
        table = torch.stack([p.row for p in pending]).cpu().double().numpy()
        credit, helping, hurting = np.split(table[:, 3:], 3, axis=1)
        before, after, drift = table[:, 0], table[:, 1], table[:, 2]
        with np.errstate(invalid="ignore", over="ignore"):
            residual = after - before - credit.sum(1)
        finite = np.isfinite(table).all(1)
        rows = Rows(
            steps=np.array([p.step for p in pending], np.int64),
            allocated=credit.copy(),
            helping=helping.astype(np.int64),
            hurting=hurting.astype(np.int64),
            loss_before=before.copy(),
            loss_after=after.copy(),
            residual=residual,
            drift=drift.copy(),
            splits=np.array([p.splits for p in pending], np.int64),
            converged=finite & np.array([p.converged is not False for p in pending]),
            trained=np.array([p.trained for p in pending], np.int64),
            seconds=np.array([p.seconds for p in pending]),
        )
        self.history.append(rows)
        return rows

    def take_windows(self) -> dict[str, Windows]:
        """Ends the window of finer sums here, into the history; gives it, or {} if it is empty."""
        if self._pending:
            raise RuntimeError("A window ends on collected steps: call collect first.")
        windows = self._detail.take(self.history.last_step)
        for name, window in windows.items():
            self.history.append_windows(name, window)
        return windows

    def take_distributions(self) -> dict[str, Distribution]:
        """Gives the distributions taken since the last time, {layer: distribution}."""
        taken, self._spread = self._spread, {}
        return taken

    def state(self) -> dict[str, Any]:
        """Gives what a checkpoint needs, history apart."""
        return {
            "loss": None if self._loss is None else self._loss.cpu(),
            "reuse": self._reuse.on,
            "last_step": self.history.last_step,
            "totals": self.totals and {n: t.cpu() for n, t in self.totals.items()},
        }

    def resume(self, state: dict[str, Any], history: History | None) -> History | None:
        """Goes on from a checkpoint; gives the history if it goes on, too.

        Args:
            state: What `state` gave.
            history: What was measured up to then; None if that is not known.
        """
        self._reuse.on = state["reuse"]
        if state["loss"] is not None:
            self._loss = state["loss"].to(self.probe.device)
        if self.totals is not None and state["totals"]:
            self.totals = {n: t.to(self.probe.device) for n, t in state["totals"].items()}
        if history is None:
            return None
        if history.measures_like(self.history):
            self.history = history
            return history
        warnings.warn(
            "LCA: the history goes on without what was measured before the checkpoint: layers "
            "or settings of the record have changed.",
            stacklevel=2,
        )
        return None

    def _sum(self, allocation: Allocation, ends: Tensor) -> GroupSums:
        """Sums credits over groups and ranks; completes the losses at both ends [2], in place."""
        values, whole = allocation.values, self._grouping.is_whole
        if whole and self._tolerance is None:
            # Credit is linear in the gradient, and adds up over ranks; counts do not.
            self._ranks.sum(list(values.values()))
            self._ranks.sum([ends])
        sums = self._grouping.sums(values)
        neurons = self._detail.neurons(values)
        if not whole:
            ends /= self._ranks.copies if self._tolerance is None else self._ranks.processes
            helping, hurting = sums.helping.to(ends), sums.hurting.to(ends)
            self._ranks.sum([ends, sums.credit, helping, hurting, sums.parameters, neurons])
            sums = GroupSums(sums.credit, helping, hurting, sums.parameters)
        self._detail.update(values, sums.parameters, neurons)
        return sums

    def _add_up(self, names: list[str], sums: Tensor) -> Tensor:
        """Sums numbers of single parameters [names] -> [] over all processes that hold parts."""
        if self._grouping.is_whole:
            return sums.sum()
        counted = [self._grouping.is_counted(n) for n in names]
        total = (sums * sums.new_tensor(counted)).sum()
        self._ranks.sum([total])
        return total

    def _whole(self, at: Position, /) -> Sample:
        """Evaluates the whole probe: refinement must come to the same end on every rank."""
        part = self.probe(at)
        loss = part.loss / self._ranks.copies
        self._ranks.sum([loss])
        if part.gradient is not None and self._grouping.is_whole:
            self._ranks.sum(list(part.gradient.values()))
        return Sample(loss, part.gradient)

    @torch.no_grad()
    def _track(self, allocation: Allocation, finite: Tensor) -> None:
        if self.totals is None:
            return
        values: Weights = {n: v.clone() for n, v in allocation.values.items()}
        for name, value in values.items():
            counted = torch.where(finite.to(value.device), value, 0.0)
            if name in self.totals:
                self.totals[name] += counted
            else:
                self.totals[name] = counted
        self.last = Allocation(
            values,
            allocation.loss_before,
            allocation.loss_after,
            allocation.splits,
            allocation.converged,
            Sample(allocation.last.loss, None),
        )
