"""The path of the weights: two snapshots that change places; every stop is the next start."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lightning_lca.measure.allocation import Segment, Weights
from lightning_lca.measure.parameters import parts
from lightning_lca.measure.tensors import DeferredBool, bundles, on_accelerator


class Snapshots:
    """Cuts the motion of live weights into segments, and notices what moved them in between.

    Holds two copies of the trainable weights, allocated once and again only when the set of them
    changes; of weights that are cut over processes, two copies of this process's parts. Every mark
    within a segment takes one more.
    """

    def __init__(self) -> None:
        """Starts without a segment."""
        self._start: dict[str, Tensor] = {}
        self._stop: dict[str, Tensor] = {}
        self._closed_before = False
        self._same: DeferredBool | bool = False
        self._marks: list[dict[str, Tensor]] = []
        self._marked_at: list[int] = []
        self.is_open = False

    def open(self, weights: Weights) -> None:
        """Starts a segment at the live weights {name: [*shape]}; does nothing while one is open."""
        if self.is_open:
            return
        weights = parts(weights)
        if not _alike(weights, self._stop):
            self._stop = {n: torch.empty_like(w).detach() for n, w in weights.items()}
            self._start = {n: torch.empty_like(w).detach() for n, w in weights.items()}
            self._closed_before = False
        self._same = self._closed_before and _equal(weights, self._stop)
        if self._same is not True:
            _copy(weights, self._stop)
        self._start, self._stop = self._stop, self._start
        self._marked_at = []
        self.is_open = True

    def mark(self, weights: Weights, step: int) -> None:
        """Notes where the open segment passes, after so many steps; only once for each number."""
        if self._marked_at and step <= self._marked_at[-1]:
            return
        count = len(self._marked_at)
        if count == len(self._marks) or not _alike(self._marks[count], self._start):
            self._marks[count:] = [{n: torch.empty_like(w) for n, w in self._start.items()}]
        # Weights frozen since the start rest.
        _copy({n: parts(weights).get(n, w) for n, w in self._start.items()}, self._marks[count])
        self._marked_at.append(step)

    def pieces(self, segment: Segment, step: int) -> list[tuple[Segment, int]]:
        """Cuts a closed segment where it was marked: (piece, steps done at its end) each.

        Args:
            segment: As `close` gave it.
            step: Steps done at its end.
        """
        marks = self._marks[: len(self._marked_at)]
        points = [segment.start, *({n: m[n] for n in segment.start} for m in marks), segment.stop]
        steps = [*self._marked_at, step]
        joined = [segment.continues] + [True] * len(marks)
        return [
            (Segment(*ends, continues), at)
            for ends, continues, at in zip(pairwise(points), joined, steps, strict=True)
        ]

    def reopen(self, segment: Segment) -> None:
        """Takes up a closed segment, or a piece of one, again from its start."""
        _copy(segment.start, {n: self._start[n] for n in segment.start})
        self._marked_at = []
        self.is_open = True

    @property
    def start(self) -> Weights:
        """Where the open segment began {name: [*shape]}."""
        return self._start

    def resume(self, start: Weights, weights: Weights) -> None:
        """Takes up a segment that was open when a checkpoint was saved.

        Args:
            start: Where it began.
            weights: The live weights; what is not among them is not trained any more.
        """
        self.open(weights)
        names = [n for n in start if n in self._start]
        _copy({n: start[n] for n in names}, self._start)
        self._same = False

    def close(self, weights: Weights) -> Segment:
        """Ends the segment at the live weights."""
        if not self.is_open:
            raise RuntimeError("No segment is open.")
        weights = parts(weights)
        # Weights frozen since the start rest: only what is trained now can be probed.
        names = [n for n in self._start if n in weights]
        _copy({n: weights[n] for n in names}, self._stop)
        self.is_open = False
        self._closed_before = len(names) == len(self._start)
        return Segment(
            {n: self._start[n] for n in names}, {n: self._stop[n] for n in names}, self._same
        )


def _alike(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(
        (a[n].shape, a[n].dtype, a[n].device) == (b[n].shape, b[n].dtype, b[n].device) for n in a
    )


@torch.no_grad()
def _equal(a: Weights, b: Weights) -> DeferredBool | bool:
    """Compares values; off the CPU the answer is on its way, so that nothing waits for it."""
    if not on_accelerator(next(iter(a.values()))):
        return all(torch.equal(a[n], b[n]) for n in a)
    names = [n for n in a if a[n].numel()]
    x, y = [a[n] for n in names], [b[n] for n in names]
    distances = [
        distance.to(x[0].device)
        for part in bundles(x)
        for distance in torch._foreach_norm(torch._foreach_sub(x[part], y[part]), float("inf"))
    ]
    return DeferredBool((torch.stack(distances) == 0).all())


@torch.no_grad()
def _copy(source: Weights, into: Weights) -> None:
    names = list(source)
    torch._foreach_copy_([into[n] for n in names], [source[n] for n in names])
