"""One probe's measurements: reuse of end gradients, drift, and the rows of its history."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_lca.allocation import (
    Allocation,
    Position,
    Sample,
    Segment,
    Weights,
    accumulator,
    allocate,
    refine,
)
from lightning_lca.detail import Detail
from lightning_lca.distribution import Distribution, Distributions
from lightning_lca.grouping import Grouping
from lightning_lca.history import History
from lightning_lca.probe import Probe
from lightning_lca.quadrature import Quadrature
from lightning_lca.ranks import Ranks
from lightning_lca.rows import Rows, Windows

AUDIT_EVERY = 50


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

    The gradient at the end of a segment is kept as the start of the next. It is reused only if the
    next segment begins at the same weights and nothing else that the loss reads has changed;
    otherwise the start is evaluated again and the difference in loss is booked as drift. What no
    look at the module can show (a loss that depends on the step number), an audit does: the first
    reuse and every fiftieth is compared with a fresh start, and a mismatch ends reuse with one
    warning.

    Attributes:
        probe: The loss surface.
        history: Measured steps, up to the last `collect`.
        audits: Starts evaluated only to check a kept one.
        totals: Cumulative credit of every weight {name: [*shape]}, where parameters are tracked.
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
        self.audits = 0
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
        self._apart = probe.gradients  # Spent on checks, not on measuring.
        self._reuse = True
        self._reused = 0
        self._out: dict[str, Tensor] = {}
        self._kept: Sample | None = None
        self._loss: Tensor | None = None  # At the end of the last segment.
        self._surroundings: tuple[tuple[bool, ...], Tensor] | None = None
        self._pending: list[_Pending] = []

    def measure(
        self, segment: Segment, continues: bool, step: int, *, spread: bool = False
    ) -> None:
        """Allocates a segment whose stop is live now, and notes the row.

        Args:
            segment: Where the weights were and are.
            continues: Whether it starts exactly where the segment before stopped.
            step: Optimizer steps done at its end.
            spread: Also takes the distributions of credit over single weights.
        """
        began = time.perf_counter()
        first = self._start_of(segment, continues)
        if self._out.keys() != segment.start.keys():
            self._out = {n: accumulator(w) for n, w in segment.start.items()}
        if self._tolerance is None:
            allocation = allocate(self.probe, segment, self._rule, first, self._out)
            self._ranks.sum(list(allocation.values.values()))
        else:
            allocation = refine(
                self._whole, segment, self._tolerance, self._max_splits, first, self._out
            )
        sums = self._grouping.sums(allocation.values)
        self._detail.update(allocation.values, sums)
        if spread:
            self._spread = self._distributions.of(allocation.values)
        ends = torch.stack([allocation.loss_before, allocation.loss_after])
        if self._tolerance is None:
            self._ranks.sum([ends])
        drift = ends[:1] - (ends[:1] if self._loss is None else self._loss)
        self._loss = ends[1]
        row = torch.cat([ends, drift, sums.credit, sums.helping.to(ends), sums.hurting.to(ends)])
        trained = sum(w.numel() for w in segment.start.values())
        self._track(allocation)
        self._keep(allocation.last)
        self._pending.append(
            _Pending(
                step,
                allocation.splits,
                allocation.converged,
                trained,
                time.perf_counter() - began,
                row,
            )
        )

    @property
    def gradients(self) -> int:
        """Probe gradients spent on measuring, audits and the check before training apart."""
        return self.probe.gradients - self._apart

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
        finite = np.isfinite(table).all(1)
        rows = Rows(
            steps=np.array([p.step for p in pending], np.int64),
            allocated=credit.copy(),
            helping=helping.astype(np.int64),
            hurting=hurting.astype(np.int64),
            loss_before=before.copy(),
            loss_after=after.copy(),
            residual=after - before - credit.sum(1),
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
            "reuse": self._reuse,
            "totals": self.totals and {n: t.cpu() for n, t in self.totals.items()},
        }

    def resume(self, state: dict[str, Any], history: History | None) -> History | None:
        """Goes on from a checkpoint; gives the history if it goes on, too.

        Args:
            state: What `state` gave.
            history: What was measured up to then; None if that is not known.
        """
        self._reuse = state["reuse"]
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

    def _start_of(self, segment: Segment, continues: bool) -> Sample | None:
        """Gives the sample at the start if one is known that can be trusted."""
        surroundings = self.probe.surroundings()
        unchanged = self._surroundings is not None and _match(self._surroundings, surroundings)
        self._surroundings = surroundings
        known = self._reuse and continues and unchanged and self._kept is not None
        if not self._ranks.all(known, self.probe.device) or self._kept is None:
            return None
        if self._reused % AUDIT_EVERY == 0:
            before = self.probe.gradients
            field = self.probe if self._tolerance is None else self._whole
            fresh = field(segment.at(0.0, needs_gradient=self._kept.gradient is not None))
            self.audits += 1
            self._apart += self.probe.gradients - before
            if not self._ranks.all(_agree(self._kept, fresh), self.probe.device):
                self._reuse = False
                warnings.warn(
                    f"LCA: the probe loss changed from {self._kept.loss.item():.9g} to "
                    f"{fresh.loss.item():.9g} (or its gradient did) although neither weights nor "
                    "buffers changed: it depends on something else, such as the step number, or is "
                    "not deterministic. From now on every step's start is evaluated afresh, one "
                    "gradient more, and the difference is booked as drift.",
                    stacklevel=2,
                )
                return fresh
        self._reused += 1
        return self._kept

    def _whole(self, at: Position, /) -> Sample:
        """Evaluates the whole probe: refinement must come to the same end on every rank."""
        part = self.probe(at)
        loss = part.loss.clone()
        self._ranks.sum([loss])
        if part.gradient is not None:
            self._ranks.sum(list(part.gradient.values()))
        return Sample(loss, part.gradient)

    def _keep(self, last: Sample) -> None:
        """Keeps the end sample, its gradient in the buffers that held the credits."""
        if last.gradient is not None:
            torch._foreach_copy_(list(self._out.values()), [last.gradient[n] for n in self._out])
        self._kept = Sample(last.loss, None if last.gradient is None else self._out)

    @torch.no_grad()
    def _track(self, allocation: Allocation) -> None:
        if self.totals is None:
            return
        values: Weights = {n: v.clone() for n, v in allocation.values.items()}
        for name, value in values.items():
            if name in self.totals:
                self.totals[name] += value
            else:
                self.totals[name] = value.clone()
        self.last = Allocation(
            values,
            allocation.loss_before,
            allocation.loss_after,
            allocation.splits,
            allocation.converged,
            Sample(allocation.last.loss, None),
        )


def _match(a: tuple[tuple[bool, ...], Tensor], b: tuple[tuple[bool, ...], Tensor]) -> bool:
    return a[0] == b[0] and a[1].shape == b[1].shape and bool(torch.equal(a[1], b[1]))


def _agree(kept: Sample, fresh: Sample) -> bool:
    """Compares two samples up to the noise of kernels that add in no fixed order."""
    noise = 1e-9 if _precise(fresh) else 1e-5
    if not abs(float(kept.loss - fresh.loss)) <= noise * max(1e-3, abs(float(fresh.loss))):
        return bool(torch.isnan(kept.loss) and torch.isnan(fresh.loss))
    if kept.gradient is None or fresh.gradient is None:
        return True
    names = list(fresh.gradient)
    old = [kept.gradient[n] for n in names]
    new = [fresh.gradient[n].to(o.dtype) for n, o in zip(names, old, strict=True)]
    difference = torch.stack(list(torch._foreach_norm(torch._foreach_sub(new, old)))).norm()
    size = torch.stack(list(torch._foreach_norm(new))).norm()
    return bool(difference <= 1e3 * noise * size)


def _precise(sample: Sample) -> bool:
    return sample.gradient is not None and all(
        g.dtype == torch.float64 for g in sample.gradient.values()
    )
