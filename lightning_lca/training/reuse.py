"""The end gradient of one segment as the start of the next: kept, and used only where it is true.

It is reused only if the next segment begins at the same weights and nothing else that the loss
reads has changed. What no look at the module can show (a loss that depends on the epoch, or on the
step number), an audit does: now and then the user's code runs at the start of a segment, and what
it gives is compared with what was kept or recorded. Where the loss is another function by then, it
is recorded anew, and the difference is booked as drift.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_lca.measure.allocation import Buffer, Sample, Segment
from lightning_lca.measure.tensors import DeferredBool, wide
from lightning_lca.probe.probe import Probe, agree
from lightning_lca.runtime.lightnings import warn
from lightning_lca.runtime.processes import Ranks

AUDIT_EVERY = 50
_OFTEN = 10  # For recordings that hold numbers which may steer the loss.
_MISSES = 3  # So often in a row, and the loss changes faster than it can be recorded.


class Reuse:
    """Keeps the sample at the end of a segment, and decides whether the next may start with it.

    Attributes:
        on: False once an audit found that the loss depends on something that cannot be seen.
        audits: Starts evaluated only to check a kept one.
        rests: Whether nothing is audited any more.
        is_audited: Whether the latest start was one of these.
        apart: Gradients of the probe that were not spent on measuring: its first check, audits.
    """

    def __init__(self, probe: Probe, ranks: Ranks) -> None:
        """Starts with nothing kept.

        Args:
            probe: The loss surface.
            ranks: The processes that share the probe; all take the same way.
        """
        self.on = True
        self.audits = 0
        self.is_audited = False
        self.rests = False
        self.apart = probe.gradients
        self._probe = probe
        self._ranks = ranks
        self._reused = 0
        self._kept: Sample | None = None
        self._surroundings: tuple[tuple[Any, ...], Tensor] | None = None
        self._audit: tuple[DeferredBool, Sample, Sample] | None = None
        self._starts = 0
        self._epoch = probe.epoch
        self._misses = 0
        self._missed: tuple[Sample, Sample] | None = None
        self._has_told = False
        self._has_differed = False

    def begin_at(self, starts: int, before: Segment | None) -> None:
        """Takes its stand in a path as if so many starts had been asked for; nothing is kept yet.

        Args:
            starts: Their number.
            before: The segment before; its stop is live now.
        """
        was, self._surroundings = self._surroundings, None
        if starts and before is not None:
            now = self._probe.surroundings()
            # Between segments that lie apart others may have taken the place of what it reads.
            if self._probe.is_recorded and was is not None and was[0] != now[0]:
                self._probe.record(before)
                now = self._probe.surroundings()
            self._surroundings = now
        self._kept = None
        self._starts, self._reused = starts, max(0, starts - 1)
        self._epoch = self._probe.epoch
        self._audit, self.is_audited = None, False

    def watch(self) -> None:
        """Notes what the loss reads beside the weights, where a probe was only prepared."""
        self._surroundings = self._probe.surroundings()

    @property
    def holds(self) -> bool:
        """Whether the loss was one and the same function at all audits so far."""
        audit = True if self._audit is None else bool(self._audit[0])
        return self.on and audit and not self._has_differed

    @property
    def end(self) -> tuple[float, float]:
        """Loss, and length of its gradient, in the sample that is kept; NaN if not known."""
        kept = self._kept
        if kept is None:
            return math.nan, math.nan
        if kept.gradient is None:
            return float(kept.loss), math.nan
        parts = kept.gradient.values()
        squares = [torch.linalg.vector_norm(g, dtype=wide(g)).square() for g in parts]
        return float(kept.loss), math.sqrt(sum(map(float, squares)))

    def keep(self, last: Sample, into: Buffer) -> None:
        """Keeps the sample at the end of a segment, its gradients in existing tensors."""
        self._kept = into.keep(last)

    def forget(self) -> None:
        """Keeps nothing: the next start is evaluated."""
        self._kept = None

    def start(self, segment: Segment) -> Sample | None:
        """Returns the sample at the start of a segment if one is known that can be trusted.

        Args:
            segment: Its stop is live now.
        """
        before, now = self._surroundings, self._probe.surroundings()
        self._surroundings = now
        known = self.on and self._kept is not None
        unchanged = before is not None and _match(before, now)
        audit = True if self._audit is None else self._audit[0]
        is_recorded = self._probe.is_recorded
        is_due = is_recorded and self._is_due()
        is_seen = is_recorded and before is not None and before[0] != now[0]
        # An audit is made together: if one rank has reason to, all make it.
        looked_at = [audit, known, segment.continues, unchanged, not is_due, not is_seen]
        agreed, *trusted, rests, is_same = self._ranks.all(looked_at, self._probe.device)
        if not agreed:
            self._give_up()
        self._audit, self.is_audited = None, False
        kept = self._kept if agreed and all(trusted) else None
        if is_recorded:
            if self.rests or (rests and is_same):
                return kept
            return self._audit_recording(segment, kept, is_seen=not is_same)
        if kept is None or self._kept is None:
            return None
        if self._reused % AUDIT_EVERY == 0:
            self._check(segment, self._kept)
        self._reused += 1
        return self._kept

    def still(self, sample: Sample, segment: Segment) -> Sample | None:
        """Returns a sample that `start` gave, or was made, when a segment was open; if it holds.

        Args:
            sample: The sample at the start.
            segment: Its stop is live now.
        """
        before = self._surroundings
        same = before is not None and _match(before, self._probe.surroundings())
        return sample if self._ranks.all([same], self._probe.device)[0] else self.start(segment)

    def _is_due(self) -> bool:
        """Whether it is time to run the user's code: in a new epoch, or after so many starts."""
        self._starts += 1
        every = _OFTEN if self._probe.reads_numbers else AUDIT_EVERY
        epoch, self._epoch = self._epoch, self._probe.epoch
        # The recording was compared at the first start; at the second the weights have moved.
        return self._starts == 2 or self._starts % every == 0 or epoch != self._epoch

    def _audit_recording(self, segment: Segment, kept: Sample | None, *, is_seen: bool) -> Sample:
        """Compares the recorded loss at the start with the user's code; gives what holds.

        Args:
            segment: The segment.
            kept: What the recording gave there, if that is known.
            is_seen: Whether flags or buffers show a change: then nobody need be told.
        """
        before = self._probe.gradients
        fresh = self._probe(segment.at(0.0), afresh=True)
        lost = self._probe.is_lost
        recorded = self._probe(segment.at(0.0)) if kept is None else kept
        self.audits, self.is_audited = self.audits + 1, True
        self.apart += self._probe.gradients - before - (kept is None)
        looked_at: list[DeferredBool | bool] = [DeferredBool(agree(recorded, fresh)), not lost]
        agreed, is_found = self._ranks.all(looked_at, self._probe.device)
        if not is_found:  # The user's code gave no loss: there is nothing to compare with.
            return recorded
        if agreed:
            if self._missed is not None:
                self._tell(*self._missed)
            self._misses, self._missed = 0, None
            if is_seen:  # It holds tensors that others have taken the place of.
                self._probe.record(segment)
                self._has_differed |= not self._probe.is_recorded
            return recorded
        self._has_differed = True
        self._starts, self._misses = 1, self._misses + 1
        if self._misses < _MISSES:
            self._missed = self._missed or (
                None if is_seen else (_loss_of(recorded), _loss_of(fresh))
            )
            self._probe.record(segment)
        else:
            self._probe.give_up("it is another function every time")
            self.on = False
            _warn_of_change(recorded, fresh, False)
        return fresh

    def _tell(self, recorded: Sample, fresh: Sample) -> None:
        if not self._has_told:
            self._has_told = True
            _warn_of_change(recorded, fresh, True)

    def _check(self, segment: Segment, kept: Sample) -> None:
        """Evaluates the start afresh, uses that, and compares; the next start reads the verdict."""
        before = self._probe.gradients
        fresh = self._probe(segment.at(0.0, needs_gradient=kept.gradient is not None))
        self.audits, self.is_audited = self.audits + 1, True
        self.apart += self._probe.gradients - before
        losses = _loss_of(kept), _loss_of(fresh)
        self._audit = (DeferredBool(agree(kept, fresh)), *losses)
        self.keep(fresh, Buffer(kept.gradient or {}, terms=kept.terms))

    def _give_up(self) -> None:
        self.on, self._has_differed = False, True
        if self._audit is None:  # Another rank's finding.
            return
        _, kept, fresh = self._audit
        _warn_of_change(kept, fresh, False)


def _loss_of(sample: Sample) -> Sample:
    return Sample(sample.loss, None)


def _warn_of_change(kept: Sample, fresh: Sample, is_recorded: bool) -> None:
    text = (
        f"LCA: the probe loss changed from {kept.loss.item():.9g} to {fresh.loss.item():.9g} (or "
        "its gradient did) although neither weights nor buffers changed: it depends on something "
        "else, such as the {}. {} the difference is booked as drift."
    )
    if is_recorded:
        warn(text.format("epoch", "It is recorded anew, whenever a look at it shows that, and"))
    else:
        warn(
            text.format(
                "step number, or is not deterministic",
                "From now on every step's start is evaluated afresh, one gradient more, and",
            )
        )


def _match(
    a: tuple[tuple[Any, ...], Tensor], b: tuple[tuple[Any, ...], Tensor]
) -> DeferredBool | bool:
    """Compares fingerprints; nothing travels from the device where there is nothing to compare."""
    if a[0] != b[0] or a[1].shape != b[1].shape:
        return False
    return DeferredBool((a[1] == b[1]).all()) if len(a[1]) else True
