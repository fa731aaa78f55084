"""The table of measured steps: appended to while training, read back whole from the record."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_lca import record

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_SCALARS = (
    "loss_before",
    "loss_after",
    "residual",
    "drift",
    "splits",
    "converged",
    "trained",
    "seconds",
)


@dataclass(frozen=True)
class Rows:
    """Some measured steps, one row each, for G groups.

    Attributes:
        steps: Optimizer steps done at the end of each segment [T].
        allocated: Credit per group [T, G], in loss units; negative = helped.
        helping: Number of weights that helped [T, G].
        hurting: Number of weights that hurt [T, G].
        loss_before: Probe loss at the segment's start [T].
        loss_after: Probe loss at its end [T].
        residual: Loss change within the segment that the credits leave unexplained [T].
        drift: Loss change between the end of the segment before and this start [T].
        splits: Panels that the rule was applied on [T].
        converged: Whether |residual| ≤ tolerance, where one was asked for, and all numbers are
            finite [T].
        trained: Number of weights that were being trained [T].
        seconds: What the measurement took, as the host saw it [T].
    """

    steps: Ints
    allocated: Floats
    helping: Ints
    hurting: Ints
    loss_before: Floats
    loss_after: Floats
    residual: Floats
    drift: Floats
    splits: Ints
    converged: npt.NDArray[np.bool_]
    trained: Ints
    seconds: Floats

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, rows: slice | npt.NDArray[np.bool_]) -> Rows:
        return Rows(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @classmethod
    def join(cls, parts: list[Rows]) -> Rows:
        """Stacks tables on top of each other."""
        return cls(
            **{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)}
        )

    @classmethod
    def none(cls, groups: int) -> Rows:
        """Makes a table without rows."""
        wide = {"allocated": float, "helping": np.int64, "hurting": np.int64}
        kinds = {"steps": np.int64, "splits": np.int64, "trained": np.int64, "converged": np.bool_}
        return cls(
            **{
                f.name: np.empty((0, groups), wide[f.name])
                if f.name in wide
                else np.empty(0, kinds.get(f.name, float))
                for f in fields(cls)
            }
        )

    def parts(self, sizes: Ints) -> dict[str, record.Array]:
        """Gives the arrays that the record keeps: credits to float32, everything else exactly."""
        narrow = record.counts_dtype(sizes)
        return {
            "steps": self.steps,
            "allocated": self.allocated.astype(np.float32),
            "helping": self.helping.astype(narrow),
            # Idle weights are few and steady: unlike hurting ones they compress to almost nothing.
            "idle": (sizes - self.helping - self.hurting).astype(narrow),
            "scalars": np.stack([getattr(self, name).astype(float) for name in _SCALARS], 1),
        }

    @classmethod
    def from_parts(cls, parts: dict[str, Any], sizes: Ints) -> Rows:
        """Reads back what `parts` gave. KeyError if one is missing."""
        scalars = dict(zip(_SCALARS, parts["scalars"].T, strict=True))
        helping = parts["helping"].astype(np.int64)
        return cls(
            steps=parts["steps"],
            allocated=parts["allocated"].astype(float),
            helping=helping,
            hurting=sizes - helping - parts["idle"].astype(np.int64),
            **{
                name: scalars[name].astype({"converged": np.bool_}.get(name, np.int64))
                if name in ("splits", "converged", "trained")
                else scalars[name].copy()
                for name in _SCALARS
            },
        )


class History:
    """All measured steps of a run: T rows, G groups, in network order.

    Every column of `Rows` is an attribute; ``helping`` and ``hurting`` are fractions of ``sizes``
    here, in [0, 1]; the rest is idle. The ledger closes: ``loss_after[-1] - loss_before[0]`` equals
    ``allocated.sum() + residual.sum() + drift.sum()``.

    Attributes:
        groups: Name of every group (G,).
        sizes: Number of weights of every group [G].
    """

    def __init__(self, groups: list[str], sizes: list[int]) -> None:
        """Starts an empty table."""
        self.groups: tuple[str, ...] = tuple(groups)
        self.sizes: Ints = np.array(sizes, np.int64)
        self._parts: list[Rows] = [Rows.none(len(groups))]

    def append(self, rows: Rows) -> None:
        """Adds measured steps at the end."""
        self._parts.append(rows)

    @property
    def rows(self) -> Rows:
        """The whole table, with counts in place of fractions."""
        if len(self._parts) > 1:
            self._parts = [Rows.join(self._parts)]
        return self._parts[0]

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    @property
    def steps(self) -> Ints:
        """Optimizer steps done at the end of each segment [T]."""
        return self.rows.steps

    @property
    def allocated(self) -> Floats:
        """Credit per group [T, G], in loss units; negative = helped."""
        return self.rows.allocated

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
    def drift(self) -> Floats:
        """Loss change between segments, by other code than the optimizer [T]."""
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

        Where sessions overlap, as after a resume, the later one wins.

        Args:
            path: The directory with the event files.
            probe: Which probe, where several were given by name; by default the first.

        Raises:
            FileNotFoundError: The directory does not exist or holds no LCA record.
            ValueError: No such probe.
        """
        directory = Path(path)
        history: History | None = None
        wanted = probe or ""
        for kind, value in record.read_chunks(directory):
            if kind == "meta":
                names = [n or "" for n in value["probes"]]
                wanted = names[0] if probe is None else probe
                if wanted not in names:
                    raise ValueError(f"No probe {probe!r} in {directory}; it has {names}.")
                fresh = cls(value["groups"], value["sizes"])
                if history is not None and history.groups == fresh.groups:
                    fresh.append(history.rows[history.steps <= value["first_step"]])
                history = fresh
            elif history is not None and value["probe"] == wanted:
                try:
                    rows = Rows.from_parts(value, history.sizes)
                except KeyError:
                    continue  # The process was killed between two parts of its last chunk.
                history.append(rows)
        if history is None:
            there = "holds no LCA record" if directory.is_dir() else "does not exist"
            raise FileNotFoundError(
                f"{directory} {there}. Give the run's log directory, the one with its event files, "
                "e.g. lightning_logs/version_0."
            )
        return history

    def summary(self) -> str:
        """Tells per group its share of the loss change, and how the ledger closes, as text."""
        rows = self.rows
        if not len(rows):
            return "LCA: no step was measured yet."
        credit = rows.allocated.sum(0)
        change = float(rows.loss_after[-1] - rows.loss_before[0])
        rank = np.empty(len(credit), int)
        rank[np.argsort(credit, kind="stable")] = np.arange(1, len(credit) + 1)
        helping, hurting = self.helping.mean(0), self.hurting.mean(0)
        width = max(5, *(len(g) for g in self.groups))
        lines = [
            f"{'layer':<{width}}  {'weights':>10}  {'LCA':>10}  {'share':>7}  {'helping':>7}  "
            f"{'hurting':>7}  rank"
        ]
        for g, name in enumerate(self.groups):
            share = f"{credit[g] / change:7.1%}" if change else "      -"
            lines.append(
                f"{name:<{width}}  {self.sizes[g]:>10,}  {credit[g]:>+10.4f}  {share}  "
                f"{helping[g]:7.1%}  {hurting[g]:7.1%}  {rank[g]:>4}"
            )
        allocated, residual, drift = credit.sum(), rows.residual.sum(), rows.drift.sum()
        missed = int((~rows.converged).sum())
        lines += [
            "",
            f"true loss change   {change:+.6f}   ({rows.loss_before[0]:.6f} -> "
            f"{rows.loss_after[-1]:.6f}, {len(rows)} measured steps)",
            f"  allocated        {allocated:+.6f}",
            f"  residual         {residual:+.6f}   ({_percent(residual, change)} of the change; "
            f"largest in one step {np.abs(rows.residual).max():.2g})",
            f"  drift            {drift:+.6f}   (changes by other code than the optimizer)",
            f"  unconverged      {missed} of {len(rows)} steps (beyond the tolerance, if one was "
            "set, or not finite)",
            "LCA < 0: the layer lowered the loss (helped); LCA > 0: it raised the loss (hurt).",
        ]
        if abs(residual) > 0.01 * abs(change):
            lines.append(
                "The residual is large. Set a tolerance, e.g. 1e-3, or lower every_n_steps."
            )
        return "\n".join(lines)


def _percent(part: float, whole: float) -> str:
    return f"{abs(part / whole):.2%}" if whole else "-"
