"""One probe's measurements: from segments to the rows of its history."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_lca.measure.allocation import (
    Allocation,
    Buffer,
    Ends,
    Position,
    Sample,
    Segment,
    Weights,
    closed_gradient,
    credit,
    first_order,
    halve,
    mean_gradient,
    refined_gradient,
)
from lightning_lca.measure.captured import Repeated
from lightning_lca.measure.groups import Grouping, GroupSums
from lightning_lca.measure.parameters import alike
from lightning_lca.measure.quadrature import SIMPSON
from lightning_lca.measure.sampling import Sampling, completed, inner_nodes
from lightning_lca.measure.shares import Shares
from lightning_lca.measure.tensors import DeferredBool, Flat
from lightning_lca.probe.probe import Probe
from lightning_lca.record.eventfile import counts_dtype
from lightning_lca.record.history import BATCH, OSCILLATION, History
from lightning_lca.record.tables import StepTable, WindowTable
from lightning_lca.reporting.distributions import Distribution, Distributions
from lightning_lca.runtime.lightnings import LightningModule
from lightning_lca.runtime.processes import Ranks
from lightning_lca.training.reuse import Reuse
from lightning_lca.training.settings import Settings
from lightning_lca.training.windows import FineSums

_WATCHED = 10  # Steps at first, and after each that was halved, that are looked at.
_FUTILE = 3  # So often in a row, and finer panels are not tried any more, or seldom.
_SELDOM = 20
_NOISE = 1e-6  # Of the loss; what lies below is rounding.
_MUCH = 0.05  # Of what layers are credited in a step: more than that is not shared out.
_MEMORY = 0.9  # Of the running mean of that.


@dataclass(frozen=True)
class Measurement:
    """What a meter finds of one segment: all that goes into its history and the finer sums.

    Attributes:
        step: Optimizer steps done at its end.
        splits: Panels that the rule was applied on.
        converged: Whether a tolerance was reached; None where none was asked for.
        trained: Number of weights that were trained.
        seconds: What it took.
        row: [`Meter._head`, 3 x groups, parameters, shares], on the device.
        panels: What the next segment goes by: steps that are still looked at for halving, steps in
            a row where finer panels gained nothing, and steps so far.
        trusts: Whether the next segment may start with the sample at the end of this one.
        fine: What it adds to sums of what is finer than parameters {name: [sum]}.
        look: Residuals with the middle, and without [2], where the start was audited.
        spread: How credit is spread {layer: distribution}, where that was asked for.
    """

    step: int
    splits: int
    converged: bool | None
    trained: int
    seconds: float
    row: Tensor
    panels: tuple[int, int, int]
    trusts: bool = True
    fine: Mapping[str, Tensor] = field(default_factory=dict)
    look: Tensor | None = None
    spread: Mapping[str, Distribution] = field(default_factory=dict)


@dataclass(frozen=True)
class _Sums(GroupSums):
    """Sums over groups and, where they are asked for, over neurons [neurons]."""

    neurons: Tensor | None


@dataclass(frozen=True)
class _Found:
    """What was found of one segment.

    Attributes:
        values: Credits {name: [*shape]}.
        ends: Both ends.
        losses: There [2].
        sums: Of the credits.
        split: What shares are credited.
        by_batch: What shares of the loss are credited, where that is kept apart [K, groups].
        gradients: How many were taken.
    """

    values: Weights
    ends: Ends
    losses: Tensor
    sums: _Sums
    split: dict[str, Tensor]
    by_batch: Tensor | None
    gradients: int

    def tensors(self) -> tuple[Tensor, ...]:
        """Lists what is new in it."""
        last = self.ends.last
        some = [self.losses, self.sums.numbers, self.sums.neurons, self.ends.shared, self.by_batch]
        gradients = [g for of in (last.gradient or {}, *last.terms) for g in of.values()]
        return tuple(t for t in (*some, *self.split.values(), *gradients) if t is not None)

    def of(self, tensors: Sequence[Tensor]) -> _Found:
        """Makes one like it, of other tensors in the same order."""
        losses, numbers, *others = tensors
        rest = iter(others)
        neurons = None if self.sums.neurons is None else next(rest)
        shared = None if self.ends.shared is None else next(rest)
        by_batch = None if self.by_batch is None else next(rest)
        split = {name: next(rest) for name in self.split}
        last = self.ends.last
        gradient = None if last.gradient is None else {n: next(rest) for n in last.gradient}
        terms = [{n: next(rest) for n in term} for term in last.terms]
        return replace(
            self,
            ends=replace(
                self.ends,
                loss_before=losses[0],
                last=Sample(losses[1], gradient, terms),
                shared=shared,
            ),
            losses=losses,
            sums=replace(self.sums, numbers=numbers, neurons=neurons),
            split=split,
            by_batch=by_batch,
        )


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
        halved: First steps so far that were measured in two halves, since the rule left more
            unexplained than all groups explained.
        sink: Where measurements go: `take`, or to another process, whose meter takes them.
    """

    def __init__(
        self,
        probe: Probe,
        module: LightningModule,
        settings: Settings,
        grouping: Grouping,
        ranks: Ranks,
        shares: Shares | None = None,
    ) -> None:
        """Starts with an empty history.

        Args:
            probe: The loss surface.
            module: The LightningModule.
            settings: The rule, the tolerance, and what finer sums are kept.
            grouping: How weights are summed.
            ranks: The processes that share the probe.
            shares: Splits credit, where that is asked for.
        """
        self.probe = probe
        self.history = History(
            grouping.names,
            grouping.sizes,
            grouping.by,
            grouping.layers,
            {} if shares is None else shares.names,
        )
        self._shares = shares
        self._fine = FineSums(
            module,
            grouping,
            neurons=settings.neurons,
            weights=settings.track_parameters,
            seed=settings.seed,
            process=ranks.process,
        )
        self.history.settings, self.history.closes = settings.describe(), settings.rule.closes
        for name, table in self._fine.tables.items():
            self.history.append_windows(name, table)
        self.windows = self._fine.metadata
        self.totals: dict[str, Tensor] | None = {} if settings.track_parameters else None
        self.last: Allocation | None = None
        self._sampling: Sampling | None = None
        self._known_shares: list[float] = []  # Of the probe's batches.
        self._opened: Sample | None = None  # At the start of a chord whose steps are split.
        self._terms = 0  # Of the loss, but the last, whose gradients are taken, too.
        self._grouping = grouping
        self._distributions = Distributions(module, grouping.parameters)
        self._spread: dict[str, Distribution] = {}
        self._settings = settings
        self._rule = settings.rule
        self._tolerance = settings.tolerance
        self._sees_whole = settings.sees_whole
        self._typical: Tensor | None = None  # Running mean of what all layers are credited [].
        self._max_splits = settings.max_splits
        self._ranks = ranks
        self._reuse = Reuse(probe, ranks)
        self._buffer = Buffer({})
        self._repeated = Repeated()
        self._like: _Found | None = None  # What is found again and again, without its numbers.
        self._loss_at_start: Tensor | None = None  # Where what is launched finds it.
        self._at_once: bool | None = None  # Whether one launch fits the device.
        self._loss: float | None = None  # At the end of the last segment, up to `collect`.
        self._pending: list[Measurement] = []
        self._counts = counts_dtype(self.history.sizes)  # A long run holds many of them.
        self._looks: list[Tensor] = []
        self.sink = self.take
        self._missed = np.zeros(2)
        self._watched = self._to_watch
        self._futile = 0
        self._measured = 0
        self._first = (self._watched, self._futile, self._measured)  # Before the first segment.
        self._resumed: Mapping[str, Any] = {}
        self.halved = 0

    @torch.no_grad()
    def measure(self, segment: Segment, step: int, *, spread: bool = False) -> None:
        """Allocates a segment whose stop is live now, and notes the row.

        Args:
            segment: Where the weights were and are.
            step: Optimizer steps done at its end.
            spread: Also takes the distributions of credit over single weights.
        """
        began = time.perf_counter()
        self.probe.whole = self._sees_whole
        with self.probe.alone():
            opened, self._opened = self._opened, None
            first = (
                self._reuse.start(segment) if opened is None else self._reuse.still(opened, segment)
            )
            self._make_room(segment)
            at_start = self._foretold(first, segment) if self._reuse.is_audited else None
            is_begun = first is not None and first is opened
            if self._shares is not None and self._shares.needs_start and not is_begun:
                first = self._begin_shares(self._shares, first, segment)
            self._buffer.first, first = first, None
            found = self._repeat(segment) or self._integrate(segment)
            values, ends, losses = found.values, found.ends, found.losses
            sums, split = found.sums, found.split
            at_stop = None if at_start is None else self._foretold(ends.last, segment)
            if self._watched and not self._grouping.leaves_out:
                self._watched -= 1
                if self._misses_all(sums, losses):
                    # The gradient at the stop is let go of, so that no further memory is needed.
                    ends = Ends(ends.loss_before, Sample(ends.last.loss, None), 2)
                    sums = self._halved(values, segment, sums, losses, split)
        self._measured += 1
        self._note_typical(sums.credit)
        row = torch.cat([*self._head(losses, ends), sums.numbers])
        fine: dict[str, Tensor] = {}
        if self._fine.is_asked or self.totals is not None:
            finite = row.isfinite().all()
            fine = self._fine.of(values, sums.neurons, finite)
            self._track(values, ends, finite)
        spreads = self._distributions.of(values) if spread and self._grouping.is_whole else {}
        look = None
        if at_start is not None and at_stop is not None and not self._grouping.leaves_out:
            by_ends = (at_start + at_stop) / 2
            self._ranks.sum([by_ends])
            change = losses[1] - losses[0]
            look = torch.stack([change - sums.credit.sum(), change - by_ends])
        self._reuse.keep(ends.last, self._buffer)
        row = self._with_shares(row, split, segment, ends.last)
        if found.by_batch is not None:
            self._ranks.sum([found.by_batch])
            row = torch.cat([row, found.by_batch.reshape(-1)])
        self.forget_chord()
        self.sink(
            Measurement(
                step,
                ends.splits,
                ends.converged,
                self._grouping.count(segment.start),
                time.perf_counter() - began,
                row,
                (self._watched, self._futile, self._measured),
                self._reuse.on,
                fine,
                look,
                spreads,
            )
        )

    def _repeat(self, segment: Segment) -> _Found | None:
        """Does what `_integrate` does, where a segment may go the same way as others before.

        From the third of these on, no Python takes part in it.
        """
        program = self.probe.program() if self._goes_straight else None
        if program is None:
            self._repeated.forget()
        first = self._buffer.first
        is_kept = first is not None and first.gradient is (
            self._buffer.sums if self._rule.first_is_start else None
        )
        if program is None or first is None or not is_kept:
            return None
        if self._at_once is None:
            weights = sum(w.nbytes for w in segment.start.values())
            self._at_once = Repeated.pays(self.probe.device, weights, self.probe.room)
        if self._loss_at_start is None:
            self._loss_at_start = first.loss.clone()
        at_start = Sample(self._loss_at_start.copy_(first.loss), first.gradient, first.terms)

        def integrate() -> tuple[Tensor, ...]:
            self._buffer.first = at_start
            found = self._integrate(segment)
            self._like = found.of([torch.empty(2)] * len(found.tensors()))
            return found.tensors()

        self._buffer.first = None
        before, live = self.probe.gradients, list(self.probe.live.values())
        places = (segment.start, segment.stop, self._buffer, program, self._rule)
        addresses = [w.data_ptr() for w in live]
        try:
            tensors = self._repeated(
                integrate, places, addresses, self.probe.device, at_once=self._at_once
            )
        except BaseException:  # The middle of the segment may lie where its stop was kept.
            torch._foreach_copy_(list(segment.stop.values()), live)
            raise
        if self._repeated.overwrites:  # What outlives this step must lie elsewhere.
            tensors = (tensors[0].clone(), *tensors[1:])
        assert self._like is not None
        found = self._like.of(tensors)
        self.probe.gradients = before + found.gradients
        return found

    @property
    def _goes_straight(self) -> bool:
        """Whether a segment may be integrated by the very operations of the one before."""
        if self._tolerance is not None or self._rule.adapts or self._repeated.why_not:
            return False
        # What steps were made of, the host reads from the optimizer's state.
        splits = {} if self._shares is None else self._shares.names
        return self.probe.is_recorded and "part" not in splits

    def _integrate(self, segment: Segment) -> _Found:
        """Integrates the gradient along a segment, and sums what weights are credited."""
        before = self.probe.gradients
        field = self.probe if self._sampling is None else self._field
        if self._rule.closes:
            is_much = self._is_much if self._rule.adapts else None
            gradient, ends = closed_gradient(field, segment, self._buffer, is_much)
        elif self._tolerance is None:
            gradient, ends = mean_gradient(field, segment, self._rule, self._buffer)
        else:
            tries = not self.is_futile or self._measured % _SELDOM == 0
            most = self._max_splits if tries else 1
            gradient, ends = refined_gradient(field, segment, self._tolerance, most, self._buffer)
            if tries:
                self._note_futile(ends.settled)
        split = self._linear_shares(gradient, self._buffer.terms, segment)
        values = credit(gradient, segment)
        losses = torch.stack([ends.loss_before, ends.last.loss])
        sums = self._sum(values, losses)
        by_batch = None if self._sampling is None else self._sampling.take(sums.credit)
        return _Found(values, ends, losses, sums, split, by_batch, self.probe.gradients - before)

    @torch.no_grad()
    def take(self, found: Measurement) -> None:
        """Notes what this meter measured, or one like it in another process."""
        self._fine.add(found.fine)
        if found.look is not None:
            self._looks.append(found.look)
        if found.spread:
            self._spread = dict(found.spread)
        self._watched, self._futile, self._measured = found.panels
        self._reuse.on = found.trusts
        if found.fine or found.look is not None or found.spread:
            found = replace(found, fine={}, look=None, spread={})
        self._pending.append(found)

    @torch.no_grad()
    def begin_at(self, index: int, before: Segment | None) -> None:
        """Takes its stand in a path as if it had measured all segments up to there.

        What a segment hands on to the next is made anew: the sample at its end, at one gradient,
        and which way the weights moved.

        Args:
            index: How many segments lie before, since the first one or since a resume.
            before: The last of them; its stop is live now. None where it is not known.
        """
        self.forget_chord()
        watched, futile, measured = self._first
        self._reuse.begin_at(index, before)
        if index:
            assert before is not None
            watched, futile, measured = max(0, watched - index), 0, measured + index
            self._make_room(before)
            end = before.at(1.0, needs_gradient=self._rule.first_is_start)
            self._reuse.keep(self.probe(end), self._buffer)
        self._watched, self._futile, self._measured = watched, futile, measured
        if self._shares is not None:
            self._shares.resume(self._resumed, self.probe.device)
            if before is not None:
                self._shares.recall(before)

    def watch(self) -> None:
        """Notes what the loss reads beside the weights, where the probe was only prepared."""
        self._reuse.watch()

    @property
    def holds(self) -> bool:
        """Whether the loss was one and the same function at all audits so far."""
        return self._reuse.holds

    @property
    def carries(self) -> str:
        """Why `begin_at` would not make another meter go on as this one does; "" if it would."""
        if not self._reuse.holds:
            return "the loss depends on more than the weights"
        if self.probe.is_scaled:
            return "gradients in float16 are scaled by what overflowed before"
        if self._tolerance is not None:
            return "finer panels gained nothing, and the next steps go by that" * bool(self._futile)
        watched, _, measured = self._first
        plain = max(0, watched - (self._measured - measured))
        is_plain = self._watched == plain or self._grouping.leaves_out
        return "" if is_plain else "an early step was measured in halves"

    @property
    def end(self) -> tuple[float, float]:
        """Loss, and length of its gradient, at the end of the latest segment; NaN if not known."""
        return self._reuse.end

    @torch.no_grad()
    def add_step(self, step: Segment, chord: Callable[[], Segment]) -> None:
        """Notes what one step of a chord was made of; the gradient at its start is taken first.

        Args:
            step: The latest step.
            chord: Shows it, from where it began to where the weights are now.
        """
        if self._shares is None:
            return
        if not self._shares.in_chord:
            opened = chord()
            first = self._reuse.start(opened)
            self._opened = self._begin_shares(self._shares, first, opened)
        self._shares.add_step(step, self.probe.live)

    def forget_chord(self) -> None:
        """Forgets what the steps of a chord were made of: it ends."""
        self._opened = None
        if self._shares is not None:
            self._shares.in_chord = False

    @property
    def is_futile(self) -> bool:
        """Whether finer panels gained nothing, several times in a row."""
        return self._futile >= _FUTILE

    def let_go(self) -> None:
        """Lets go of the gradient that is kept, and of its memory."""
        self._buffer = Buffer({})
        self._repeated.forget()
        self._reuse.forget()

    def forget_places(self) -> None:
        """Lets go of the live weights, and of what an accelerator keeps for a launch."""
        self._repeated.forget()

    def rest(self) -> None:
        """Audits nothing any more: training is over, and what its steps read may be gone."""
        self._reuse.rests = True

    @property
    def breakdowns(self) -> dict[str, tuple[str, ...]]:
        """Names of the shares that credit is split into, by breakdown."""
        return {} if self._shares is None else dict(self._shares.names)

    @property
    def batches(self) -> int:
        """How many batches of the probe have credit of their own; 0 where there is one."""
        return 0 if self._sampling is None else len(self._sampling.shares)

    def take_rule(self, settings: Settings) -> None:
        """Goes on with another rule, before anything is measured."""
        self._settings, self._rule = settings, settings.rule
        self._sees_whole, self._watched = settings.sees_whole, self._to_watch
        self.history.closes = settings.rule.closes
        self.history.settings["quadrature"] = settings.rule.name
        if self._sampling is not None:
            self._sampling.nodes = inner_nodes(self._rule)

    def learn(self, terms: Sequence[str], shares: Sequence[float]) -> None:
        """Takes what the first evaluation of the loss tells.

        Args:
            terms: Names of its terms.
            shares: Of the loss that each batch of the probe is [batches].
        """
        if self._shares is not None:
            self._shares.learn(terms)
            self._terms = max(0, len(self._shares.names.get("term", ())) - 1)
        self._known_shares = list(shares) or self._known_shares
        if len(shares) > 1:
            # Where panels are doubled, the first of all nodes is the middle.
            nodes = inner_nodes(SIMPSON if self._tolerance is not None else self._rule)
            self._sampling = Sampling(self._grouping, shares, nodes)
        self.history.split_into(self.breakdowns, self.batches)

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

    def collect(self) -> StepTable:
        """Copies the pending rows to the host, at once, into the history; returns the new ones."""
        groups = len(self.history.groups)
        if not self._pending:
            return StepTable.none(groups)
        pending, self._pending = self._pending, []
        table = torch.stack([p.row for p in pending]).cpu().double().numpy()
        head = 3 if self._rule.closes else 2
        ends = np.cumsum([head + 3 * groups, len(self._grouping.parameters)])
        columns, parameters, rest = np.split(table, ends, axis=1)
        allocated, helping, hurting = np.split(columns[:, head:], 3, axis=1)
        before, after = table[:, 0], table[:, 1]
        shared = table[:, 2] if self._rule.closes else 0.0
        known = before[0] if self._loss is None else self._loss
        with np.errstate(invalid="ignore", over="ignore"):
            residual = after - before - allocated.sum(1)
            drift = before - np.concatenate([[known], after[:-1]])
        self._loss = float(after[-1])
        finite = np.isfinite(columns).all(1)
        self._fine.add_parameters(parameters, finite)
        finite &= np.isfinite(drift)
        with np.errstate(invalid="ignore", over="ignore"):
            shares = self._completed(rest, allocated)
        rows = StepTable(
            steps=np.array([p.step for p in pending], np.int64),
            allocated=allocated.copy(),
            helping=helping.astype(self._counts),
            hurting=hurting.astype(self._counts),
            loss_before=before.copy(),
            loss_after=after.copy(),
            residual=residual,
            raw_residual=residual + shared,
            drift=drift,
            splits=np.array([p.splits for p in pending], np.int64),
            converged=finite & np.array([p.converged is not False for p in pending]),
            trained=np.array([p.trained for p in pending], np.int64),
            seconds=np.array([p.seconds for p in pending]),
            shares=shares,
        )
        self.history.append(rows)
        if self._looks:
            looks = torch.stack(self._looks).abs().cpu().double().numpy()
            self._looks = []
            for look in np.where(np.isfinite(looks), looks, 0):  # However many come at once.
                self._missed += look
            if self._missed[1] > 0:
                self.history.settings["halving"] = float(self._missed[0] / self._missed[1])
        return rows

    def take_windows(self) -> dict[str, WindowTable]:
        """Ends the window of finer sums here, into the history; gives it, or {} if it is empty."""
        if self._pending:
            raise RuntimeError("A window ends on collected steps: call collect first.")
        windows = self._fine.take(self.history.last_step)
        for name, window in windows.items():
            self.history.append_windows(name, window)
        return windows

    def take_distributions(self) -> dict[str, Distribution]:
        """Returns the distributions taken since the last time, {layer: distribution}."""
        taken, self._spread = self._spread, {}
        return taken

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint needs, history apart."""
        loss = self._pending[-1].row[1].cpu() if self._pending else self._loss
        return {
            "loss": None if loss is None else torch.as_tensor(loss, dtype=torch.float64),
            "reuse": self._reuse.on,
            "last_step": self.history.last_step,
            "terms": list(self.breakdowns.get("term", ())),
            "shares": self._known_shares,
            **({} if self._shares is None else self._shares.state()),
            "panels": [self._watched, self._futile, self._measured],
            "typical": None if self._typical is None else self._typical.cpu(),
            "totals": self.totals and {n: t.cpu() for n, t in self.totals.items()},
        }

    def resume(self, state: dict[str, Any], history: History | None) -> History | None:
        """Goes on from a checkpoint; gives the history if it goes on, too.

        Args:
            state: What `state` gave.
            history: What was measured up to then; None if that is not known.
        """
        self._reuse.on = state["reuse"]
        if "panels" in state:  # A checkpoint of an older version lacks it.
            self._watched, self._futile, self._measured = self._first = tuple(state["panels"])
        if (typical := state.get("typical")) is not None:
            self._typical = typical.to(self.probe.device)
        self._resumed = state
        if self._shares is not None:
            self._shares.resume(state, self.probe.device)
        if state["loss"] is not None:
            self._loss = float(state["loss"])
        if self.totals is not None and state["totals"]:
            self.totals = {n: t.to(self.probe.device) for n, t in state["totals"].items()}
        if history is None:
            return None
        if history.measures_like(self.history):
            history.go_on_like(self.history)
            self.history = history
            return history
        warnings.warn(
            "LCA: the history goes on without what was measured before: that was of other layers, "
            "or with other settings.",
            stacklevel=2,
        )
        return None

    def _make_room(self, segment: Segment) -> None:
        """Makes tensors for a segment's gradients, unless those of the one before fit."""
        if not alike(self._buffer.sums, segment.start):
            self._buffer, self._at_once = Buffer.of(segment, self._terms), None
            self._buffer.add_up = functools.partial(self._add_up, list(segment.start))
            self._buffer.is_cut = not self._grouping.is_whole

    def _field(self, at: Position) -> Sample:
        """Evaluates the probe; at some nodes what each batch is credited is summed, too."""
        sampling = self._sampling
        if sampling is None or at.s not in sampling.nodes or not at.needs_gradient:
            return self.probe(at)
        weight = sampling.nodes[at.s]
        start = at.segment.start
        self.probe.watch = lambda j, gradient, stop: sampling.add(
            j, gradient, Segment(start, stop), weight
        )
        try:
            return self.probe(at)
        finally:
            self.probe.watch = None

    @property
    def _to_watch(self) -> int:
        """How many first steps are looked at: where Simpson's rule is taken, on one panel."""
        is_simpson = self._rule == SIMPSON or self._rule.adapts
        return _WATCHED if is_simpson and self._tolerance is None else 0

    def _head(self, losses: Tensor, ends: Ends) -> list[Tensor]:
        """Lists what a row begins with: losses [2], and what a rule that closes has shared out."""
        if not self._rule.closes:
            return [losses]
        return [
            losses,
            losses.new_zeros(1) if ends.shared is None else ends.shared.to(losses)[None],
        ]

    def _is_much(self, left: Tensor) -> bool:
        """Whether what the trapezoid leaves unexplained [] is too much to be shared out."""
        if self._typical is None:
            return True
        much = DeferredBool(left.abs() > _MUCH * self._typical)
        return self._ranks.all([much], self.probe.device)[0]

    def _note_typical(self, credit: Tensor) -> None:
        """Takes the credit of a step [groups] into the running mean, if it is finite."""
        if not self._rule.adapts:
            return
        size = credit.abs().sum()
        mean = size if self._typical is None else torch.lerp(size, self._typical, _MEMORY)
        last = size.new_full((), math.inf) if self._typical is None else self._typical
        self._typical = torch.where(size.isfinite(), mean, last)

    def _completed(
        self, found: npt.NDArray[np.float64], allocated: npt.NDArray[np.float64]
    ) -> dict[str, npt.NDArray[np.float64]]:
        """Adds what the numbers of rows leave to be found of breakdowns.

        That is the last share of every one, what the others leave of credit.

        Args:
            found: Of one breakdown after the other, what all its shares but the last were credited
                [T, (shares - 1) x groups, ...].
            allocated: Credit [T, groups].
        """
        steps, groups = allocated.shape
        shares, at = {}, 0
        for name, names in self.history.split_columns.items():
            count = len(names) - (name not in (OSCILLATION, BATCH))
            known = found[:, at : at + count * groups].reshape(steps, count, groups)
            at += count * groups
            if name == BATCH:
                assert self._sampling is not None
                shares[name] = completed(known, allocated, self._sampling.shares)
                continue
            if name != OSCILLATION:
                known = np.concatenate([known, (allocated - known.sum(1))[:, None]], 1)
            shares[name] = known.transpose(0, 2, 1)
        return shares

    def _sum(self, values: Weights, losses: Tensor, *, is_summed: bool = False) -> _Sums:
        """Sums credits over groups and ranks; completes the losses at both ends [2], in place.

        Args:
            values: Credits {name: [*shape]}.
            losses: Before and after [2].
            is_summed: Whether credits of whole weights are sums over ranks already.
        """
        whole = self._grouping.is_whole
        if whole and not self._sees_whole and not is_summed:
            # Credit is linear in the gradient, and adds up over ranks; counts do not.
            self._ranks.sum(list(values.values()))
            self._ranks.sum([losses])
        sums = self._grouping.sums(values)
        neurons = self._fine.neurons(values)
        if not whole:
            losses /= self._ranks.processes if self._sees_whole else self._ranks.copies
            self._ranks.sum([losses, sums.numbers, *([] if neurons is None else [neurons])])
        return _Sums(sums.numbers, sums.groups, neurons)

    def _misses_all(self, sums: _Sums, losses: Tensor) -> bool:
        """Whether a step leaves more unexplained than all groups explain: its path bends."""
        left = (losses[1] - losses[0] - sums.credit.sum()).abs()
        noise = _NOISE * losses.abs().max()
        misses = DeferredBool(left > torch.maximum(sums.credit.abs().sum(), noise))
        return self._ranks.all([misses], self.probe.device)[0]

    def _halved(
        self,
        values: Weights,
        segment: Segment,
        sums: _Sums,
        losses: Tensor,
        split: dict[str, Tensor],
    ) -> _Sums:
        """Measures a segment in two halves, its credits in place, and goes on watching."""
        for shares in split.values():
            shares.mul_(0.5)

        def also(sample: Sample, weight: float) -> None:
            if split and sample.gradient is not None:
                copies = [{n: g.clone() for n, g in term.items()} for term in sample.terms]
                for name, more in self._linear_shares(sample.gradient, copies, segment).items():
                    split[name].add_(more, alpha=weight)

        change = losses[1] - losses[0]
        before = (change - sums.credit.sum()).abs()
        halve(self.probe, segment, values, self._add_shares, also)
        sums = self._sum(values, losses.clone(), is_summed=True)
        helps = DeferredBool((change - sums.credit.sum()).abs() < before / 2)
        self._note_futile(not self._ranks.all([helps], self.probe.device)[0])
        self._watched = 0 if self.is_futile else _WATCHED
        self.halved += 1
        return sums

    def _add_shares(self, product: Tensor) -> None:
        """Adds up what ranks find for whole weights; of cut ones each has its own part."""
        if self._grouping.is_whole and not self._sees_whole:
            self._ranks.sum([product])

    def _begin_shares(self, shares: Shares, first: Sample | None, segment: Segment) -> Sample:
        """Keeps the gradient at the start, of all ranks together where it is not split alike."""
        if first is None or first.gradient is None:
            first = self.probe(segment.at(0.0))
        assert first.gradient is not None
        shares.begin(first.gradient, segment.start)
        if not self._sees_whole and shares.needs_whole:
            self._ranks.sum(shares.start.wholes)
        return first

    def _linear_shares(
        self, gradient: Weights, terms: Sequence[Weights], segment: Segment
    ) -> dict[str, Tensor]:
        """Sums what shares that are linear in a gradient are credited: [shares - 1, groups] each.

        Args:
            gradient: Of the loss {name: [*shape]}.
            terms: Of its terms but the last; they are used up.
            segment: The segment.
        """
        found: dict[str, Tensor] = {}
        if self._shares is None:
            return found
        if "part" in self._shares.names:
            found["part"] = self._shares.parts(gradient, segment, self.probe.live)
        if terms:
            found["term"] = self._shares.terms(terms, segment)
        return found

    def _with_shares(
        self, row: Tensor, split: dict[str, Tensor], segment: Segment, last: Sample
    ) -> Tensor:
        """Adds to a row what shares are credited, but for the last of each breakdown."""
        if self._shares is None:
            return row
        found: list[Tensor] = []
        turns: list[Tensor] = []
        if OSCILLATION in self._shares.names:  # While both gradients are there.
            turns = [self._turns(self._shares, segment, last)]
        for name in self._shares.names:
            if name == OSCILLATION:
                found += turns
            elif name in split:
                if not self._sees_whole:
                    self._ranks.sum([split[name]])
                found.append(split[name].reshape(-1))
            elif name == "term":  # There is but one.
                continue
            else:
                order = self._shares.first_order(segment)
                if not self._sees_whole and not self._shares.needs_whole:
                    self._ranks.sum([order])
                found.append(order)
        return torch.cat([row, *found])

    def _turns(self, shares: Shares, segment: Segment, last: Sample) -> Tensor:
        """Tells how weights turn round [4 x groups]; the end gradient lies in the buffer by now."""
        end = self._buffer.sums if last.gradient is not None else None
        if end is not None and self._ranks.processes > 1 and not self._sees_whole:
            whole = Flat(end, sums=True)
            torch._foreach_copy_(list(whole.values()), list(end.values()))
            self._ranks.sum(whole.wholes)
            end = whole
        return shares.oscillation(end if isinstance(end, Flat) else None, segment).reshape(-1)

    def _note_futile(self, futile: bool) -> None:
        """Counts steps in a row where finer panels gained nothing."""
        self._futile = self._futile + 1 if futile else 0

    def _foretold(self, sample: Sample | None, segment: Segment) -> Tensor | None:
        """Returns the loss change [] that a gradient at one end foretells.

        Against that of both ends alone, Simpson's residual tells whether finer panels help. Nothing
        where another rule, a tolerance or the cut of the weights leaves no such comparison.
        """
        compares = self._rule == SIMPSON and self._tolerance is None and self._grouping.is_whole
        if not compares or sample is None or sample.gradient is None:
            return None
        return first_order(sample.gradient, segment)

    def _add_up(self, names: list[str], sums: Tensor) -> Tensor:
        """Sums numbers of single parameters [names] -> [] over all processes that hold parts."""
        if self._grouping.is_whole:
            return sums.sum()
        counted = [self._grouping.is_counted(n) for n in names]
        total = (sums * sums.new_tensor(counted)).sum()
        self._ranks.sum([total])
        return total

    def _track(self, values: Weights, ends: Ends, finite: Tensor) -> None:
        if self.totals is None:  # Nobody asked.
            return
        copies = {n: v.clone() for n, v in values.items()}
        for name, value in copies.items():
            counted = torch.where(finite.to(value.device), value, 0.0)
            before = self.totals.get(name)
            if before is not None and before.shape == counted.shape:  # A head may have grown.
                before += counted
            else:
                self.totals[name] = counted
        last = Sample(ends.last.loss, None)
        self.last = Allocation(
            copies, ends.loss_before, last.loss, ends.splits, ends.converged, last
        )


@dataclass(frozen=True)
class Results:
    """One probe's results so far.

    Attributes:
        history: Measured steps.
        totals: Cumulative credit of every weight {name: [*shape]}, where parameters are tracked.
        last: None: the latest allocation is not kept.
    """

    history: History
    totals: dict[str, Tensor] | None
    last: Allocation | None = None

    @classmethod
    def of(cls, meter: Meter) -> Results:
        """Takes what a meter has measured, up to its last `collect`."""
        totals = meter.totals
        return cls(meter.history, totals and {n: t.cpu() for n, t in totals.items()})
