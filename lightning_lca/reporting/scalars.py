"""Rows to named scalars: a fixed set of keys, in network order, few enough to read."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_lca.measure.metrics import GroupCredit, HelpingFraction, HurtingFraction
from lightning_lca.record.tables import StepTable

MOST_PANELS = 30  # More curves than this in one TensorBoard section are not read by anyone.


def panels_of(groups: list[str], at_most: int = MOST_PANELS) -> list[str]:
    """Names the panel of every group: itself, or if there are too many the module around it.

    Example:
        >>> panels_of(["stem", "body.0.conv", "body.0.norm", "body.1.conv"], at_most=3)
        ['stem', 'body.0', 'body.0', 'body.1']
        >>> panels_of(["conv/0", "conv/1", "head/0"], at_most=2)
        ['conv', 'conv', 'head']
    """
    if len(set(groups)) <= at_most:
        return list(groups)
    paths = [group.partition("/")[0].split(".") for group in groups]  # conv/3 is a neuron of conv.
    named = [".".join(path) for path in paths]
    for depth in range(max(map(len, paths)), 0, -1):
        named = [".".join(path[:depth]) for path in paths]
        if len(set(named)) <= at_most:
            break
    return named


class Scalars:
    """Turns measured steps into the scalars of one probe.

    Keys, for prefix "lca" (a second probe "val" has "lca_val"):
        - ``lca/total``, ``lca/residual``: credit and residual summed since the last log, in loss
        units.
        - ``lca/raw_residual``: what a rule that closes has shared out over the weights, likewise;
        only with ``quadrature="closed_trapezoid"`` or "adaptive".
        - ``lca/total_cum``: credit summed since the start of training.
        - ``lca/loss``: probe loss after the last measured step.
        - ``lca/help``, ``lca/hurt``: fraction of the trained weights that helped and hurt, mean per
          step since the last log.
        - ``lca_layer_cum/00 name``: the layer's credit since the start of training.
        - ``lca_layer_help/00 name``, ``lca_layer_hurt/00 name``: fraction of the layer's weights,
          mean per step since the last log.
        - ``lca/not_finite``: steps since the start whose loss or credit was not finite; no sum and
        no mean counts these.

    Attributes:
        prefix: First part of every key.
        labels: Last part of a layer's keys, with its number.
        closes: Whether the raw residual is another than the residual.
    """

    def __init__(self, groups: list[str], sizes: list[int], prefix: str = "lca") -> None:
        """Chooses the panels.

        Args:
            groups: Names of the groups.
            sizes: Weights of each.
            prefix: First part of every key.
        """
        names = panels_of(groups)
        panels = list(dict.fromkeys(names))
        self._panel_of = np.zeros((len(groups), len(panels)))
        self._panel_of[np.arange(len(groups)), [panels.index(name) for name in names]] = 1
        self.prefix = prefix
        self.closes = False
        self.labels = [f"{i:02d} {name or 'root'}" for i, name in enumerate(panels)]
        panel_sizes = [int(size) for size in np.array(sizes) @ self._panel_of]
        self._credit = GroupCredit(len(panels))
        self._helping = HelpingFraction(panel_sizes)
        self._hurting = HurtingFraction(panel_sizes)
        self._window: list[StepTable] = []
        self._not_finite = 0

    def update(self, rows: StepTable) -> None:
        """Adds measured steps."""
        if not len(rows):
            return
        self._window.append(rows)
        finite = rows[rows.finite]
        self._not_finite += len(rows) - len(finite)
        self._credit.update(torch.from_numpy(finite.allocated @ self._panel_of))
        self._helping.update(torch.from_numpy(finite.helping @ self._panel_of))
        self._hurting.update(torch.from_numpy(finite.hurting @ self._panel_of))

    @property
    def credit(self) -> Tensor:
        """Every panel's credit since the start of training [panels] float64."""
        return self._credit.credit.clone()

    @property
    def waiting(self) -> int:
        """Number of measured steps since the last log."""
        return sum(map(len, self._window))

    def resume(self, credit: Tensor, rows: StepTable, logged: int) -> None:
        """Takes up the sums of a checkpoint.

        Args:
            credit: As it was then.
            rows: What was measured up to then, as far as it is known.
            logged: How many of the rows had been logged.
        """
        self._not_finite = int((~rows[:logged].finite).sum())
        if len(rows) > logged:
            self.update(rows[logged:])
        self._credit.credit = credit.clone()

    def take(self) -> dict[str, float]:
        """Returns the values and starts a new window; nothing if no step was measured in it."""
        if not self._window:
            return {}
        window, self._window = StepTable.join(self._window), []
        rows = window[window.finite]
        credit = self._credit.compute()
        trained = np.maximum(rows.trained, 1)
        counted = max(1, len(rows))
        p = self.prefix
        values = {
            f"{p}/total": float(rows.allocated.sum()),
            f"{p}/residual": float(rows.residual.sum()),
            **({f"{p}/raw_residual": float(rows.raw_residual.sum())} if self.closes else {}),
            f"{p}/total_cum": float(credit.sum()),
            f"{p}/loss": float(window.loss_after[-1]),
            f"{p}/help": float((rows.helping.sum(1) / trained).sum() / counted),
            f"{p}/hurt": float((rows.hurting.sum(1) / trained).sum() / counted),
            f"{p}/not_finite": float(self._not_finite),
        }
        for key, column in (
            ("cum", credit),
            ("help", self._helping.compute()),
            ("hurt", self._hurting.compute()),
        ):
            values |= {
                f"{p}_layer_{key}/{label}": value
                for label, value in zip(self.labels, column.reshape(-1).tolist(), strict=True)
            }
        self._helping.reset()
        self._hurting.reset()
        return values
