"""The run in one table: every group's share of the loss change, and how the ledger closes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_lca.record.tables import Ints, StepTable

LARGE = 0.01  # A residual beyond this share of the loss change is pointed out.
SIGN = "LCA < 0: the layer lowered the loss (helped); LCA > 0: it raised the loss (hurt)."
NOT_FINITE = "In {count} of {all} steps loss or credit was not finite; no sum counts these."
REMEDY = "The residual is large. Set a tolerance, e.g. 1e-3, or lower every_n_steps."


@dataclass(frozen=True)
class Line:
    """One group: LCA in loss units (negative = helped), fractions of its weights, mean per step.

    ``share`` is that of the true loss change, None where that is zero; ``rank`` 1 helped most.
    """

    name: str
    weights: int
    credit: float
    share: float | None
    helping: float
    hurting: float
    rank: int


@dataclass(frozen=True)
class Ledger:
    """All groups, and true change = allocated + residual + drift, in loss units.

    Sums leave out steps that are not finite; then they do not add up to the change.
    """

    lines: tuple[Line, ...]
    first_loss: float
    last_loss: float
    allocated: float
    residual: float
    drift: float
    largest: float
    measured: int
    unconverged: int
    unmoved: int
    not_finite: int

    @classmethod
    def of(cls, groups: Sequence[str], sizes: Ints, rows: StepTable) -> Ledger:
        """Sums at least one measured step."""
        finite, drift = rows[rows.finite], rows.drift[np.isfinite(rows.drift)]
        credit = finite.allocated.sum(0, dtype=float)
        first, last = float(rows.loss_before[0]), float(rows.loss_after[-1])
        weights = np.maximum(sizes, 1)
        helping = (rows.helping / weights).mean(0)
        hurting = (rows.hurting / weights).mean(0)
        rank = np.empty(len(credit), int)
        rank[np.argsort(credit, kind="stable")] = np.arange(1, len(credit) + 1)
        return cls(
            lines=tuple(
                Line(
                    name,
                    int(sizes[g]),
                    float(credit[g]),
                    _share(credit[g], last - first),
                    float(helping[g]),
                    float(hurting[g]),
                    int(rank[g]),
                )
                for g, name in enumerate(groups)
            ),
            first_loss=first,
            last_loss=last,
            allocated=float(credit.sum()),
            residual=float(finite.residual.sum()),
            drift=float(drift.sum()),
            largest=float(np.abs(finite.residual).max(initial=0)),
            measured=len(rows),
            unconverged=int((~rows.converged).sum()),
            unmoved=int(rows.unmoved.sum()),
            not_finite=len(rows) - len(finite),
        )

    @property
    def change(self) -> float:
        """True change of the probe loss."""
        return self.last_loss - self.first_loss

    @property
    def unexplained(self) -> str:
        """The residual as a share of the change, as text."""
        share = _share(self.residual, self.change)
        return "-" if share is None else f"{abs(share):.2%}"

    @property
    def remarks(self) -> list[str]:
        """What a reader must be told."""
        said = [SIGN]
        if abs(self.residual) > LARGE * abs(self.change):
            said.append(REMEDY)
        if self.not_finite:
            said.append(NOT_FINITE.format(count=self.not_finite, all=self.measured))
        if self.unmoved:
            said.append(
                f"{self.unmoved} of {self.measured} steps moved no weight (a gradient scaler skips "
                "steps whose gradient overflows)."
            )
        return said


def text(groups: Sequence[str], sizes: Ints, rows: StepTable) -> str:
    """Draws the table for a terminal."""
    if not len(rows):
        return "LCA: no step was measured yet."
    ledger = Ledger.of(groups, sizes, rows)
    width = max(5, *(len(line.name) for line in ledger.lines))
    head = (
        f"{'layer':<{width}}  {'weights':>10}  {'LCA':>10}  {'share':>7}  {'helping':>7}  "
        f"{'hurting':>7}  rank"
    )
    lines = [
        f"{line.name:<{width}}  {line.weights:>10,}  {line.credit:>+10.4f}  "
        f"{_percent(line.share):>7}  {line.helping:7.1%}  {line.hurting:7.1%}  {line.rank:>4}"
        for line in ledger.lines
    ]
    ends = f"{ledger.first_loss:.6f} -> {ledger.last_loss:.6f}"
    sums = [
        f"true loss change   {ledger.change:+.6f}   ({ends}, {ledger.measured} measured steps)",
        f"  allocated        {ledger.allocated:+.6f}",
        f"  residual         {ledger.residual:+.6f}   ({ledger.unexplained} of the change; "
        f"largest in one step {ledger.largest:.2g})",
        f"  drift            {ledger.drift:+.6f}   (changes by other code than the optimizer)",
        f"  unconverged      {ledger.unconverged} of {ledger.measured} steps (beyond the "
        "tolerance, if one was set, or not finite)",
    ]
    return "\n".join([head, *lines, "", *sums, *ledger.remarks])


def markdown(groups: Sequence[str], sizes: Ints, rows: StepTable) -> str:
    """Draws the same table for TensorBoard's Text tab."""
    if not len(rows):
        return "LCA: no step was measured yet."
    ledger = Ledger.of(groups, sizes, rows)
    lines = [
        "| layer | weights | LCA | share of the change | helping | hurting | rank |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {_escape(line.name)} | {line.weights:,} | {line.credit:+.4f} "
        f"| {_percent(line.share)} | {line.helping:.1%} | {line.hurting:.1%} | {line.rank} |"
        for line in ledger.lines
    ]
    lines += [
        "",
        "| ledger | loss | |",
        "|---|---:|---|",
        f"| **true loss change** | **{ledger.change:+.6f}** | {ledger.first_loss:.6f} → "
        f"{ledger.last_loss:.6f} in {ledger.measured} measured steps |",
        f"| allocated | {ledger.allocated:+.6f} | sum of the LCA above |",
        f"| residual | {ledger.residual:+.6f} | {ledger.unexplained} of the change; largest in one "
        f"step {ledger.largest:.2g} |",
        f"| drift | {ledger.drift:+.6f} | changes by other code than the optimizer |",
        f"| unconverged | {ledger.unconverged} | of {ledger.measured} steps |",
        "",
        *ledger.remarks,
    ]
    return "\n".join(lines)


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole and math.isfinite(whole) else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _escape(name: str) -> str:
    """Keeps a layer's name from being read as Markdown or HTML."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]()#+-.!|<>~" else c for c in name)
