"""Credit on each batch of a probe by itself: how far the choice of the data carries.

The loss of a probe is a mean over batches, and so is credit. Gradients of single batches pass by at
every evaluation; of those in the middle of a segment the products with the motion are summed here
before they are added up. What a batch's credit has by other nodes of the rule is not known of it:
`completed` shares that out evenly, so that credits of all batches add up to the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_lca.measure.allocation import Segment
from lightning_lca.measure.groups import Grouping
from lightning_lca.measure.quadrature import Quadrature
from lightning_lca.measure.stretches import GroupBlocks

MOST = 16  # Of more batches, neighbours are taken together.
Floats = npt.NDArray[np.float64]


class Sampling:
    """Sums the credit of single batches over groups, at one node of a segment or a few.

    Attributes:
        shares: Of the loss that each batch is, or some together [K].
        nodes: Where gradients of single batches are looked at, and their weights {s: weight}.
    """

    def __init__(self, grouping: Grouping, shares: Sequence[float], nodes: Mapping[float, float]):
        """Takes the share of the loss that each batch is [batches]."""
        self._block = [j * min(MOST, len(shares)) // len(shares) for j in range(len(shares))]
        self.shares: Floats = np.bincount(self._block, weights=shares).astype(np.float64)
        self.nodes = dict(nodes)
        self._blocks = GroupBlocks(grouping)
        self._table: Tensor | None = None

    @torch.no_grad()
    def add(self, j: int, gradient: Mapping[str, Tensor], segment: Segment, weight: float) -> None:
        """Adds what batch j's share of the gradient {name: [*shape]} at a node is credited."""
        credit = self._blocks.products(gradient, segment)
        if self._table is None:
            self._table = credit.new_zeros(len(self.shares), len(credit))
        self._table[self._block[j]].add_(credit, alpha=weight)

    def take(self, like: Tensor) -> Tensor:
        """Returns the sums of a segment [K, groups]; zeros where this process has no batch."""
        table, self._table = self._table, None
        return like.new_zeros(len(self.shares), len(like)) if table is None else table


def inner_nodes(rule: Quadrature) -> dict[float, float]:
    """Chooses the nodes of a rule, and weights that add up to 1: inner ones, or else the last."""
    inner = {s: w for s, w in zip(rule.nodes, rule.weights, strict=True) if 0 < s < 1}
    total = sum(inner.values())
    return {s: w / total for s, w in inner.items()} if total > 0 else {1.0: 1.0}


def completed(found: Floats, allocated: Floats, shares: Floats) -> Floats:
    """Returns the credit on each batch by itself, whose weighted mean is the credit of all.

    Args:
        found: What shares of the loss were credited at the nodes [T, K, G].
        allocated: The credit [T, G].
        shares: Of the loss [K].

    Example:
        >>> found, shares = np.array([[[1.0], [2.0]]]), np.array([0.5, 0.5])
        >>> completed(found, np.array([[3.2]]), shares)[0, 0].round(6).tolist()
        [2.2, 4.2]
    """
    rest = allocated - found.sum(1)
    by_batch: Floats = (found / shares[:, None] + rest[:, None]).transpose(0, 2, 1)
    return by_batch
