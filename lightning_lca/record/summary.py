"""The run in one table: every group's share of the loss change, how the ledger closes, and trust.

One rule for a step that is not finite: it is left out of every sum, of every group, and counted.

Residuals of both signs cancel in a sum, and so do credits. So the residual is judged by Σ|residual|
against Σ over steps and layers of |A|.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_lca.record.findings import LEVEL, Finding, find, short
from lightning_lca.record.layers import MOST, Layers
from lightning_lca.record.sampling import OfRun, of_run
from lightning_lca.record.statistics import LEAST
from lightning_lca.record.tables import Floats, StepTable
from lightning_lca.record.tree import Folded, Row, Tree

if TYPE_CHECKING:
    from lightning_lca.record.history import History

LARGE = 0.01  # A residual beyond this share of all credit is pointed out;
_LARGE_SHARED = 0.03  # of one that is shared out, a third or less stays as error of layers.
_MATTER = 10  # Groups that have a row each where there are more than `MOST`.
_BLOCKS = 10  # About as many as the others are put together in.
_WIDEST = 200  # Longer names get a line that is longer.
_BAR = "\\|"  # As a table of Markdown needs it.
_HELPS = 0.5  # Simpson's residual against that of the ends alone, where halving does not help.
SIGN = "LCA < 0: the layer lowered the loss (helped); LCA > 0: it raised the loss (hurt)."


@dataclass(frozen=True)
class PerStep:
    """What every step shows of how far to trust it.

    Attributes:
        finite: Whether its loss and credit are, so that sums count it [T].
        credited: Σ over layers of |A|, in loss units; 0 where that is not finite [T].
        unmoved: Whether it moved no weight [T].
    """

    finite: npt.NDArray[np.bool_]
    credited: Floats
    unmoved: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, table: StepTable, layers: Layers) -> PerStep:
        """Looks at the steps of a table."""
        finite = table.finite
        credit = np.where(finite[:, None], table.allocated, 0).astype(np.float64)
        return cls(finite, np.abs(layers.sums(credit)).sum(1), table.unmoved)


@dataclass(frozen=True)
class Trust:
    """What the steps of a record leave unexplained.

    Attributes:
        measured: Number of steps.
        not_finite: Number of steps whose loss or credit is not finite; no sum counts these.
        unconverged: Number of steps beyond the tolerance, or not finite.
        unmoved: Number of steps that moved no weight.
        halved: Number of steps measured in two halves without a tolerance: the rule alone missed.
        unexplained: Σ|raw residual| / Σ_t Σ_layers |A|; None where there is neither.
        settings: What the callback was asked for, as far as the record says it.
        closes: Whether the raw residual is shared out, so that the residual itself is rounding.
        middles: Of these, the number of steps that took the middle and share nothing out.
    """

    measured: int
    not_finite: int
    unconverged: int
    unmoved: int
    halved: int
    unexplained: float | None
    settings: Mapping[str, Any]
    closes: bool = False
    middles: int = 0

    @classmethod
    def of(
        cls, history: History, rows: slice = slice(None), per_step: PerStep | None = None
    ) -> Trust:
        """Looks at some steps of a history.

        Args:
            history: What was measured.
            rows: Which steps.
            per_step: What is known of these steps already.
        """
        table = history.rows[rows]
        if per_step is None:
            per_step = PerStep.of(table, Layers.of(history.layers))
        moved = float(per_step.credited.sum())
        missed = float(np.abs(table.raw_residual[per_step.finite]).sum())
        refines = history.settings.get("tolerance") is not None
        return cls(
            measured=len(table),
            not_finite=int((~per_step.finite).sum()),
            unconverged=int((~table.converged).sum()),
            unmoved=int(per_step.unmoved.sum()),
            halved=0 if refines else int((table.splits > 1).sum()),
            unexplained=missed / moved if moved else math.inf if missed else None,
            settings=history.settings,
            closes=history.closes,
            middles=int((table.raw_residual == table.residual).sum()) if history.closes else 0,
        )

    @property
    def is_large(self) -> bool:
        """Whether the residual is worth a remark."""
        return self.unexplained is not None and self.unexplained > (
            _LARGE_SHARED if self.closes else LARGE
        )

    @property
    def _leaves_out(self) -> bool:
        """Whether some weights were not measured."""
        return bool(self.settings.get("include") or self.settings.get("exclude"))

    @property
    def cause_of_drift(self) -> str:
        """What drift may come from."""
        others = "weights left out, or by " if self._leaves_out else ""
        return f"changes by {others}other code than the optimizer"

    @property
    def remarks(self) -> list[str]:
        """What a reader must be told, a sentence each."""
        remarks = []
        if self.is_large:
            what = "The residual that is shared out" if self.closes else "The residual"
            remarks.append(f"{what} is large. {self._remedy}")
        if self.not_finite:
            remarks.append(
                f"In {self.not_finite} of {self.measured} steps loss or credit was not finite; no "
                "sum counts these."
            )
        if self.unmoved:
            remarks.append(
                f"{self.unmoved} of {self.measured} steps moved no weight, as where a gradient "
                "scaler skips a step or the learning rate is 0."
            )
        if self.halved:
            remarks.append(
                f"{self.halved} of {self.measured} steps were measured in two halves, since the "
                "rule left more unexplained than all layers explained."
            )
        if self.closes and self.settings.get("quadrature") == "adaptive":
            remarks.append(
                f"{self.middles} of {self.measured} steps took the gradient in the middle, too."
            )
        return remarks

    @property
    def _remedy(self) -> str:
        """Names what helps here."""
        every = self.settings.get("every_n_steps") or 1
        if self.settings.get("tolerance") is not None:
            if self.unconverged > self.not_finite:
                return (
                    "Halving the steps did not bring it below the tolerance everywhere: where it "
                    "does not help, the gradient is not the derivative of the loss (detach(), "
                    "custom backward passes), or the loss has jumps."
                )
            return "It is within the tolerance that was set; a smaller one makes it smaller."
        if every > 1:
            return (
                f"A chord of {every} steps cuts across the bends of the path: lower every_n_steps."
            )
        if self.settings.get("quadrature", "simpson") != "simpson":
            return 'Choose quadrature="simpson", at a second gradient per step.'
        helps = self.settings.get("halving")
        if isinstance(helps, float) and helps > _HELPS:
            return (
                "Finer panels would not make it smaller: the gradient is not the derivative of the "
                "loss here (detach(), custom backward passes), or the loss has jumps."
            )
        doubt = "" if helps is not None else ", if the gradient is the derivative of the loss"
        return f"Set a tolerance, e.g. tolerance=1e-3{doubt}."


@dataclass(frozen=True)
class Line:
    """One group: LCA in loss units (negative = helped), fractions of its weights, mean per step.

    ``share`` is that of the true loss change, None where that is zero; ``rank`` 1 helped most. A
    block of several ``groups`` has no rank.
    """

    name: str
    weights: int
    credit: float
    share: float | None
    helping: float
    hurting: float
    rank: int | None
    groups: int = 1

    @property
    def label(self) -> str:
        """The name, fit for a terminal; of a block with the number of groups in it."""
        return printable(self.name) + (f" ({self.groups})" if self.groups > 1 else "")


@dataclass(frozen=True)
class Ledger:
    """All groups, and true change = allocated + residual + drift, in loss units.

    Sums leave out steps that are not finite; then they do not add up to the change.

    Attributes:
        shown: Which groups make up each line: one each, or of many some in blocks.
    """

    shown: Folded
    lines: tuple[Line, ...]
    first_loss: float
    last_loss: float
    allocated: float
    residual: float
    drift: float
    largest: float
    trust: Trust

    @classmethod
    def of(cls, history: History, rows: slice = slice(None), *, everything: bool = True) -> Ledger:
        """Sums at least one measured step of a history.

        Args:
            history: What was measured.
            rows: Which steps.
            everything: A line for every group; else of more than forty the ten that moved the loss
                most, and the others by block.
        """
        sizes, table = history.sizes, history.rows[rows]
        finite, drift = table[table.finite], table.drift[np.isfinite(table.drift)]
        credit = finite.allocated.sum(0, dtype=float)
        first, last = float(table.loss_before[0]), float(table.loss_after[-1])
        shown = _whole(history) if everything or len(credit) <= MOST else _folded(history, credit)
        sums, weights = shown.sums(credit), shown.sums(sizes)
        counted = np.maximum(weights, 1) * max(1, len(finite))
        helping = shown.sums(finite.helping.sum(0, dtype=np.int64)) / counted
        hurting = shown.sums(finite.hurting.sum(0, dtype=np.int64)) / counted
        rank = np.empty(len(credit), int)
        rank[np.argsort(credit, kind="stable")] = np.arange(1, len(credit) + 1)
        return cls(
            shown=shown,
            lines=tuple(
                Line(
                    row.name,
                    int(weights[i]),
                    float(sums[i]),
                    _share(sums[i], last - first),
                    float(helping[i]),
                    float(hurting[i]),
                    int(rank[row.layers[0]]) if len(row.layers) == 1 else None,
                    len(row.layers),
                )
                for i, row in enumerate(shown.rows)
            ),
            first_loss=first,
            last_loss=last,
            allocated=float(credit.sum()),
            residual=float(finite.residual.sum()),
            drift=float(drift.sum()),
            largest=float(np.abs(finite.raw_residual).max(initial=0)),
            trust=Trust.of(history, rows),
        )

    @cached_property
    def _kind(self) -> str:
        """How numbers are written: by powers of ten where losses are very large or small."""
        credits = (abs(line.credit) for line in self.lines)
        largest = max(abs(self.first_loss), abs(self.last_loss), *credits)
        return "e" if 0 < largest < 1e-4 or 1e9 < largest < math.inf else "f"

    def show(self, value: float, digits: int = 6, sign: str = "+") -> str:
        """Writes a number in loss units."""
        return f"{value:{sign}.{digits}{self._kind}}"

    @property
    def ends(self) -> tuple[str, str]:
        """The losses before and after all, as text."""
        return self.show(self.first_loss, sign=""), self.show(self.last_loss, sign="")

    @property
    def change(self) -> float:
        """True change of the probe loss."""
        return self.last_loss - self.first_loss

    def over(self, bar: str) -> str:
        """Says how much the rule left over.

        Args:
            bar: The sign of an absolute value.
        """
        head = "shared out over the weights: raw, " if self.trust.closes else ""
        return (
            f"{head}Σ{bar}residual{bar} is {self.unexplained} of Σ{bar}LCA{bar}; largest in one "
            f"step {self.largest:.2g}"
        )

    @property
    def folds(self) -> bool:
        """Whether some lines are blocks of several groups."""
        return any(line.groups > 1 for line in self.lines)

    @property
    def unexplained(self) -> str:
        """The residuals as a share of all credit, as text."""
        share = self.trust.unexplained
        if share is None:
            return "-"
        return f"{share:.2%}" if math.isfinite(share) else "all"


def text(history: History, findings: Sequence[Finding] = (), *, everything: bool = False) -> str:
    """Draws the table for a terminal, and the most important findings below it.

    Args:
        history: What was measured.
        findings: Most important first.
        everything: A row for every layer, however many there are.
    """
    if not len(history):
        return "LCA: no step was measured yet."
    with np.errstate(over="ignore", invalid="ignore"):  # Sums of large numbers may be infinite.
        ledger = Ledger.of(history, everything=everything)
    trust = ledger.trust
    width = max([5, *(len(x.label) for x in ledger.lines if len(x.label) <= _WIDEST)])
    data = of_run(history, ledger.shown)
    reach = [] if data is None else [ledger.show(r, 4, sign="") for r in data.reach.tolist()]
    head = (
        f"{'layer':<{width}}  {'weights':>10}  {'LCA':>10}  {'± data  ' * bool(reach)}"
        f"{'share':>7}  {'helping':>7}  {'hurting':>7}  rank"
    )
    lines = [
        f"{line.label:<{width}}  {line.weights:>10,}  {ledger.show(line.credit, 4):>10}  "
        + (f"{reach[i]:>6}  " if reach else "")
        + f"{percent(line.share):>7}  {line.helping:7.1%}  {line.hurting:7.1%}  "
        + f"{line.rank or '-':>4}"
        for i, line in enumerate(ledger.lines)
    ]
    if ledger.folds:
        lines += ["", folding(history, "summary(all=True)")]
    over_data = [] if data is None else [about_data(data)]
    sums = [
        f"true loss change   {ledger.show(ledger.change)}   ({' -> '.join(ledger.ends)}, "
        f"{trust.measured} measured steps)",
        f"  allocated        {ledger.show(ledger.allocated)}",
        f"  residual         {ledger.show(ledger.residual)}   ({ledger.over('|')})",
        f"  drift            {ledger.show(ledger.drift)}   ({trust.cause_of_drift})",
        f"  unconverged      {trust.unconverged} of {trust.measured} steps (beyond the "
        "tolerance, if one was set, or not finite)",
    ]
    split = [line for name in history.breakdowns for line in _split(history, name, width, ledger)]
    sure = ["", *how_sure(findings, trust.measured - trust.not_finite)]
    return "\n".join([head, *lines, "", *sums, *split, SIGN, *over_data, *trust.remarks, *sure])


def about_data(data: OfRun) -> str:
    """Says what the column of the data's error is."""
    return (
        f"± data: 95% interval over other data like the probe's, from {data.batches} batches."
        + (" Two tell next to nothing: take four or more." if data.batches == 2 else "")
    )


def _whole(history: History) -> Folded:
    """A line for every group."""
    rows = tuple(Row(name, 0, (i,), None) for i, name in enumerate(history.groups))
    return Folded(rows, Layers.of(history.groups))


def _folded(history: History, credit: Floats) -> Folded:
    """The groups that moved the loss most, in network order, and then the others by block."""
    most = np.argsort(-np.abs(np.nan_to_num(credit)), kind="stable")[:_MATTER]
    matter = sorted(most.tolist())
    others = [g for g in range(len(credit)) if g not in matter]
    rows = [Row(history.groups[g], 0, (g,), None) for g in matter]
    names = [history.groups[g] for g in others]
    if history.group_by == "neuron":  # Its layer is its block.
        names = [name.replace("/", ".") for name in names]
    for row in Tree(names).rows(_BLOCKS):
        if not row.is_open:
            places = tuple(others[place] for place in row.layers)
            name = row.name if len(places) > 1 else history.groups[places[0]]
            rows.append(Row(name, 0, places, row.is_open))
    if len(rows) == len(credit):  # Names without dots have no blocks.
        return _whole(history)
    return Folded(tuple(rows), Layers.of(history.groups))


def folding(history: History, where: str) -> str:
    """Says what the rows are where there are many layers."""
    what = history.group_by if history.group_by in ("layer", "parameter", "neuron") else "group"
    return (
        f"The {_MATTER} of {len(history.groups)} {what}s that moved the loss most; below them the "
        f"others by block, with how many are in it. {where} lists each."
    )


_SPLIT = {
    "part": "LCA by what the optimizer's steps were made of",
    "order": "LCA by what the gradient at each start foretold, and what curvature changed",
    "term": "LCA by term of the loss",
}


def title_of(name: str) -> str:
    """Says what a breakdown splits credit into."""
    return _SPLIT.get(name, f"LCA by {name}")


def shares_of(history: History, name: str) -> Floats | None:
    """Adds up the shares of a breakdown over finite steps that have it: [groups, shares]."""
    values = history.breakdowns[name].allocated
    known = history.finite & np.isfinite(values).all((1, 2))
    return values[known].sum(0) if known.any() else None


def _split(history: History, name: str, width: int, ledger: Ledger) -> list[str]:
    """Draws the shares of a breakdown as lines of text."""
    sums = shares_of(history, name)
    if sums is None:
        return []
    shares = [printable(share) for share in history.breakdowns[name].names]
    wide = max(10, *map(len, shares))
    shown = ledger.shown.sums(sums.T).T
    rows = [*zip(ledger.lines, shown, strict=True), (None, sums.sum(0))]
    return [
        "",
        f"{title_of(name)}:",
        f"{'layer':<{width}}" + "".join(f"  {share:>{wide}}" for share in shares),
        *(
            f"{'all' if line is None else line.label:<{width}}"
            + "".join(f"  {ledger.show(value, 4):>{wide}}" for value in values)
            for line, values in rows
        ),
    ]


def _split_markdown(history: History, name: str, ledger: Ledger) -> list[str]:
    """Draws the same for TensorBoard's Text tab."""
    sums = shares_of(history, name)
    if sums is None:
        return []
    shares = history.breakdowns[name].names
    labels = [*(_escape(line.label) for line in ledger.lines), "**all**"]
    rows = zip(labels, [*ledger.shown.sums(sums.T).T, sums.sum(0)], strict=True)
    return [
        "",
        f"{title_of(name)}:",
        "",
        f"| layer | {' | '.join(_escape(share.replace('_', ' ')) for share in shares)} |",
        "|---" + "|---:" * len(shares) + "|",
        *(
            f"| {group} | {' | '.join(ledger.show(value, 4) for value in values)} |"
            for group, values in rows
        ),
    ]


def markdown(history: History, findings: Sequence[Finding] = ()) -> str:
    """Draws the same for TensorBoard's Text tab."""
    if not len(history):
        return "LCA: no step was measured yet."
    with np.errstate(over="ignore", invalid="ignore"):  # Sums of large numbers may be infinite.
        ledger = Ledger.of(history, everything=False)
    data = of_run(history, ledger.shown)
    reach = [""] * len(ledger.lines)
    if data is not None:
        reach = [f" ± {ledger.show(r, 4, sign='')}" for r in data.reach.tolist()]
    trust = ledger.trust
    lines = [
        "| layer | weights | LCA | share of the change | helping | hurting | rank |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {_escape(line.label)} | {line.weights:,} | {ledger.show(line.credit, 4)}{reach[i]} "
        f"| {percent(line.share)} | {line.helping:.1%} | {line.hurting:.1%} | {line.rank or '-'} |"
        for i, line in enumerate(ledger.lines)
    ]
    if ledger.folds:
        lines += ["", _escape(folding(history, "The LCA tab"))]
    lines += [
        "",
        "| ledger | loss | |",
        "|---|---:|---|",
        f"| **true loss change** | **{ledger.show(ledger.change)}** | {' → '.join(ledger.ends)} in "
        f"{trust.measured} measured steps |",
        f"| allocated | {ledger.show(ledger.allocated)} | sum of the LCA above |",
        f"| residual | {ledger.show(ledger.residual)} | {ledger.over(_BAR)} |",
        f"| drift | {ledger.show(ledger.drift)} | {trust.cause_of_drift} |",
        f"| unconverged | {trust.unconverged} | of {trust.measured} steps |",
        *[line for name in history.breakdowns for line in _split_markdown(history, name, ledger)],
        "",
        SIGN,
        *([] if data is None else [about_data(data)]),
        *trust.remarks,
        "",
        *map(_escape_line, how_sure(findings, trust.measured - trust.not_finite)),
    ]
    return "\n".join(lines)


def together(histories: Mapping[str, History] | Mapping[str | None, History]) -> str:
    """Tells what only several probes show together; empty where they show nothing."""
    found = find(histories, about=())
    return "\n".join(["probes 'train' and 'val' together", *how_sure(found)]) if found else ""


def how_sure(findings: Sequence[Finding], steps: int = LEAST) -> list[str]:
    """Tells at most five findings, an item each, and what to try.

    Args:
        findings: Most important first.
        steps: Finite measured steps that they were looked for in.
    """
    if steps < LEAST:
        return [
            f"How sure: findings need at least {LEAST} finite measured steps, here are {steps}."
        ]
    if not findings:
        return [f"How sure: nothing here is beyond chance (level {LEVEL:.0%} over all tests)."]
    told = short(findings)
    more = f", {len(told)} of {len(findings)}" if len(told) < len(findings) else ""
    return [
        f"How sure (findings{more}; level {LEVEL:.0%} over all tests):",
        *(f"- {finding.statement}\n  Try: {finding.try_this}" for finding in told),
    ]


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole and math.isfinite(whole) else None


def printable(name: str) -> str:
    """Shows characters that would move a terminal's cursor as what they are."""
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def percent(share: float | None) -> str:
    """Writes a share, if there is one."""
    return "-" if share is None else f"{share:.1%}"


def _escape_line(line: str) -> str:
    """Keeps what a line says from being read as Markdown, but not that it is an item of a list."""
    item = line.startswith("- ")
    return "- " * item + _escape(line[2 * item :])


def _escape(name: str) -> str:
    """Keeps a layer's name from being read as Markdown or HTML."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]()#+-.!|<>~" else c for c in name)
