"""The processes of a training: who takes which batch of the probe, and how their parts are summed.

Every rank measures its own share of the probe; since credit is linear in the gradient, the sum of
the ranks' credits is the credit on the whole probe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lca.measure.tensors import DeferredBool
from lightning_lca.runtime.lightnings import Trainer


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        rank: Which share of the data it takes.
        world: Number of shares.
        process: Its number among all processes.
        processes: Number of processes; tensor parallelism puts several on one share.
    """

    rank: int = 0
    world: int = 1
    process: int = 0
    processes: int = 1

    @classmethod
    def of(cls, trainer: Trainer) -> Ranks:
        """Reads them from a Trainer."""
        # What Lightning's own sampler goes by; strategies of one process lack it.
        shares = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
        rank, world = trainer.global_rank, trainer.world_size
        return cls(shares.get("rank", rank), shares.get("num_replicas", world), rank, world)

    @property
    def copies(self) -> int:
        """Number of processes that work on one share together."""
        return self.processes // self.world

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
        """Sums tensors of one dtype over all processes, in place, in one reduction."""
        if self.processes == 1:
            return
        if len(tensors) == 1 and tensors[0].is_contiguous():  # Of others gloo sums the wrong part.
            dist.all_reduce(tensors[0])
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        parts = torch.split(flat, [t.numel() for t in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def largest(self, number: int, device: torch.device) -> int:
        """Returns the largest of all processes' numbers."""
        if self.processes == 1:
            return number
        agreed = torch.tensor(number, device=device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return int(agreed)

    def all(self, flags: Sequence[DeferredBool | bool], device: torch.device) -> list[bool]:
        """Tells of each flag whether it is set on every process, so that all take the same way."""
        if self.processes == 1:
            return [bool(flag) for flag in flags]
        tensors = [
            f.tensor if isinstance(f, DeferredBool) else DeferredBool.of(f, device).tensor
            for f in flags
        ]
        agreed = torch.stack([t.to(device) for t in tensors]).int()
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
        return [bool(flag) for flag in map(DeferredBool, agreed.bool())]
