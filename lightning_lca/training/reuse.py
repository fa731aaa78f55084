"""The end gradient of one segment as the start of the next: kept, and used only where it is true.

It is reused only if the next segment begins at the same weights and nothing else that the loss
reads has changed. What no look at the module can show (a loss that depends on the step number), an
audit does: the first reuse and every fiftieth is compared with a fresh start, and a mismatch ends
reuse with one warning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lca.measure.allocation import Sample, Segment, Weights
from lightning_lca.measure.tensors import DeferredBool, bundles
from lightning_lca.probe.probe import Probe
from lightning_lca.runtime.lightnings import warn
from lightning_lca.runtime.processes import Ranks

AUDIT_EVERY = 50


class Reuse:
    """Keeps the sample at the end of a segment, and decides whether the next may start with it.

    Attributes:
        on: False once an audit found that the loss depends on something that cannot be seen.
        audits: Starts evaluated only to check a kept one.
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
        self.apart = probe.gradients
        self._probe = probe
        self._ranks = ranks
        self._reused = 0
        self._kept: Sample | None = None
        self._surroundings: tuple[tuple[bool, ...], Tensor] | None = None
        self._audit: tuple[DeferredBool, Sample, Sample] | None = None

    def keep(self, last: Sample, into: Weights) -> None:
        """Keeps the sample at the end of a segment, its gradient in existing tensors."""
        if last.gradient is not None:
            names = list(into)
            torch._foreach_copy_([into[n] for n in names], [last.gradient[n] for n in names])
        self._kept = Sample(last.loss, None if last.gradient is None else into)

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
        looked_at = [audit, known, segment.continues, unchanged]
        agreed, *trusted = self._ranks.all(looked_at, self._probe.device)
        if not agreed:
            self._give_up()
        self._audit, self.is_audited = None, False
        if not (agreed and all(trusted)) or self._kept is None:
            return None
        if self._reused % AUDIT_EVERY == 0:
            self._check(segment, self._kept)
        self._reused += 1
        return self._kept

    def _check(self, segment: Segment, kept: Sample) -> None:
        """Evaluates the start afresh, uses that, and compares; the next start reads the verdict."""
        before = self._probe.gradients
        fresh = self._probe(segment.at(0.0, needs_gradient=kept.gradient is not None))
        self.audits, self.is_audited = self.audits + 1, True
        self.apart += self._probe.gradients - before
        losses = Sample(kept.loss, None), Sample(fresh.loss, None)
        self._audit = (DeferredBool(_agree(kept, fresh)), *losses)
        self.keep(fresh, kept.gradient or {})

    def _give_up(self) -> None:
        self.on = False
        if self._audit is None:  # Another rank's finding.
            return
        _, kept, fresh = self._audit
        warn(
            f"LCA: the probe loss changed from {kept.loss.item():.9g} to "
            f"{fresh.loss.item():.9g} (or its gradient did) although neither weights nor "
            "buffers changed: it depends on something else, such as the step number, or is "
            "not deterministic. From now on every step's start is evaluated afresh, one "
            "gradient more, and the difference is booked as drift."
        )


def _match(
    a: tuple[tuple[bool, ...], Tensor], b: tuple[tuple[bool, ...], Tensor]
) -> DeferredBool | bool:
    """Compares fingerprints; nothing travels from the device where there is nothing to compare."""
    if a[0] != b[0] or a[1].shape != b[1].shape:
        return False
    return DeferredBool((a[1] == b[1]).all()) if len(a[1]) else True


@torch.no_grad()
def _agree(kept: Sample, fresh: Sample) -> Tensor:
    """Compares two samples up to the noise of kernels that add in no fixed order: [] bool."""
    noise = 1e-9 if _precise(fresh) else 1e-5
    size = fresh.loss.abs().clamp(min=1e-3)
    same: Tensor = (kept.loss - fresh.loss).abs() <= noise * size
    same = same | (kept.loss == fresh.loss) | (kept.loss.isnan() & fresh.loss.isnan())
    if kept.gradient and fresh.gradient:
        names = list(fresh.gradient)
        old, new = [kept.gradient[n] for n in names], [fresh.gradient[n] for n in names]
        differences: list[Tensor] = []
        sizes: list[Tensor] = []
        for part in bundles(new):
            a, b = [_finite(n) for n in new[part]], [_finite(o) for o in old[part]]
            differences += torch._foreach_norm(torch._foreach_sub(a, b))
            sizes += torch._foreach_norm(a)
        difference, length = _length(differences), _length(sizes)
        same = same & (difference <= 1e3 * noise * length).to(same.device)
    return same


def _finite(gradient: Tensor) -> Tensor:
    """Puts 0 where a number is not finite: what does not compare."""
    return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _length(norms: list[Tensor]) -> Tensor:
    return torch.stack([n.to(norms[0].device) for n in norms]).square().sum().sqrt()


def _precise(sample: Sample) -> bool:
    return sample.gradient is not None and all(
        g.dtype == torch.float64 for g in sample.gradient.values()
    )
