"""The processes of a training: who takes which batch of the probe, and how their parts are summed.

Every rank measures its own share of the probe; since credit is linear in the gradient, the sum of
the ranks' credits is the credit on the whole probe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, trainer: Any) -> Ranks:
        """Reads them from a Trainer."""
        return cls(trainer.global_rank, trainer.world_size)

    def mine(self, count: int) -> list[int]:
        """Chooses this rank's batches of so many: equally many on all ranks.

        If they do not divide evenly, every rank takes them all: unequal numbers would leave ranks
        waiting for each other where a loss gathers from all.

        Example:
            >>> Ranks(1, world=2).mine(4), Ranks(1, world=2).mine(3)
            ([1, 3], [0, 1, 2])
        """
        even = count % self.world == 0
        return list(range(self.rank, count, self.world)) if even else list(range(count))

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Sums tensors of one dtype over the ranks, in place, in one reduction."""
        if self.world == 1:
            return
        if len(tensors) == 1:
            dist.all_reduce(tensors[0])
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        parts = torch.split(flat, [t.numel() for t in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def all(self, flag: bool, device: torch.device) -> bool:
        """Whether a flag is set on every rank, so that all take the same way."""
        if self.world == 1:
            return flag
        agreed = torch.tensor(int(flag), device=device)
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
        return bool(agreed)
