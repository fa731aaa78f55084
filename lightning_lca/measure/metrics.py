"""torchmetrics accumulators over group rows: credit, and the fractions that helped and hurt.

Their states are persistent and averaged over processes: every process holds the same rows, or its
own share of the probe, and the mean is right in both cases, since allocation is linear in the
gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class GroupCredit(Metric):
    """Adds up the credit of every group over measured steps.

    Example:
        >>> metric = GroupCredit(groups=2)
        >>> metric.update(torch.tensor([-0.5, 0.25]))
        >>> metric.update(torch.tensor([[-0.5, 0.25], [-1.0, 0.0]]))
        >>> metric.compute().tolist()
        [-2.0, 0.5]
    """

    full_state_update = False
    higher_is_better = False
    credit: Tensor

    def __init__(self, groups: int, **kwargs: Any) -> None:
        """Starts at zero.

        Args:
            groups: Number of groups.
            **kwargs: As for any torchmetrics.Metric.
        """
        super().__init__(**kwargs)
        zero = torch.zeros(groups, dtype=torch.float64)
        self.add_state("credit", zero, dist_reduce_fx="mean", persistent=True)

    def update(self, credit: Tensor) -> None:
        """Adds rows of credit [groups] or [steps, groups], in loss units."""
        self.credit = self.credit + credit.reshape(-1, len(self.credit)).sum(0)

    def compute(self) -> Tensor:
        """Returns the summed credit [groups]; negative = helped."""
        return self.credit


class GroupFraction(Metric):
    """Averages over steps which fraction of every group's weights was counted.

    Example:
        >>> metric = GroupFraction(sizes=[10, 4])
        >>> metric.update(torch.tensor([[5, 1], [6, 1]]))
        >>> [round(f, 3) for f in metric.compute().tolist()]
        [0.55, 0.25]
    """

    full_state_update = False
    counted: Tensor
    steps: Tensor
    sizes: Tensor

    def __init__(self, sizes: Sequence[int], **kwargs: Any) -> None:
        """Starts at zero.

        Args:
            sizes: Number of weights of every group.
            **kwargs: As for any torchmetrics.Metric.
        """
        super().__init__(**kwargs)
        self.register_buffer("sizes", torch.tensor(sizes, dtype=torch.float64), persistent=False)
        zero = torch.zeros(len(sizes), dtype=torch.float64)
        self.add_state("counted", zero, dist_reduce_fx="mean", persistent=True)
        self.add_state("steps", torch.zeros((), dtype=torch.float64), "mean", persistent=True)

    def update(self, counts: Tensor) -> None:
        """Adds counts of weights [groups] or [steps, groups]."""
        rows = counts.reshape(-1, len(self.counted))
        self.counted = self.counted + rows.sum(0)
        self.steps = self.steps + len(rows)

    def compute(self) -> Tensor:
        """Returns the mean fraction [groups] in [0, 1]; zero where a group is empty."""
        return self.counted / (self.steps * self.sizes).clamp_min(1)


class HelpingFraction(GroupFraction):
    """Averages which fraction of every group's weights helped (A < 0)."""

    higher_is_better = True


class HurtingFraction(GroupFraction):
    """Averages which fraction of every group's weights hurt (A > 0)."""

    higher_is_better = False
