"""The path of the weights: two snapshots that change places; every stop is the next start."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_lca.measure.allocation import Segment, Weights
from lightning_lca.measure.parameters import parts
from lightning_lca.measure.tensors import (
    DeferredBool,
    Flat,
    on_accelerator,
    together,
    without_graph,
)


class Snapshots:
    """Cuts the motion of live weights into segments, and notices what moved them in between.

    Holds two copies of the trainable weights, allocated once and again only when the set of them
    changes; of weights that are cut over processes, two copies of this process's parts. Every mark
    within a segment takes one more, and so do single steps where they are looked at.
    """

    def __init__(self) -> None:
        """Starts without a segment."""
        self._start: dict[str, Tensor] = {}
        self._stop: dict[str, Tensor] = {}
        self._forms: list[tuple[object, ...]] = []
        self._closed_before = False
        self._same: DeferredBool | bool = False
        self._marks: list[dict[str, Tensor]] = []
        self._marked_at: list[int] = []
        self._before_step: dict[str, Tensor] = {}
        self._step_from: dict[str, Tensor] | None = None
        self.is_open = False

    @torch.no_grad()
    def open(self, weights: Weights) -> None:
        """Starts a segment at the live weights {name: [*shape]}; does nothing while one is open."""
        if self.is_open:
            return
        weights = parts(weights)
        forms = _forms(weights)
        if forms != self._forms:
            self._stop, self._start, self._forms = Flat(weights), Flat(weights), forms
            self._closed_before = False
        _copy(weights, self._start)
        self._same = self._closed_before and _equal(self._start, self._stop)
        self._marked_at = []
        self._step_from = self._start
        self.is_open = True

    def mark(self, weights: Weights, step: int) -> None:
        """Notes where the open segment passes, after so many steps; only once for each number."""
        if self._marked_at and step <= self._marked_at[-1]:
            return
        count = len(self._marked_at)
        if count == len(self._marks) or _forms(self._marks[count]) != self._forms:
            self._marks[count:] = [Flat(self._start)]
        # Weights frozen since the start rest.
        _copy({n: parts(weights).get(n, w) for n, w in self._start.items()}, self._marks[count])
        self._marked_at.append(step)

    def begin_step(self, weights: Weights) -> None:
        """Notes where a step within the open segment begins; only once before `step`."""
        if self._step_from is not None:
            return
        if _forms(self._before_step) != self._forms:
            self._before_step = Flat(self._start)
        weights = parts(weights)
        _copy({n: weights.get(n, w) for n, w in self._start.items()}, self._before_step)
        self._step_from = self._before_step

    def step(self, weights: Weights) -> Segment:
        """Ends the step that led to the live weights; the first began with the segment."""
        start, self._step_from = self._step_from or self._start, None
        weights = parts(weights)
        return Segment(start, {n: weights.get(n, w) for n, w in start.items()})

    def pieces(self, segment: Segment, step: int) -> list[tuple[Segment, int]]:
        """Cuts a closed segment where it was marked: (piece, steps done at its end) each.

        Args:
            segment: As `close` gave it.
            step: Steps done at its end.
        """
        if not self._marked_at:
            return [(segment, step)]
        marks = self._marks[: len(self._marked_at)]
        points = [segment.start, *(_some(m, list(segment.start)) for m in marks), segment.stop]
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
        self._step_from = self._start
        self.is_open = True

    def drop(self) -> None:
        """Forgets an open segment whose weights are not trained any more."""
        self.is_open = self._closed_before = False

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
        self._step_from = None

    def look(self, weights: Weights) -> Segment:
        """Shows the segment as it would be if it ended here; it stays open."""
        weights = parts(weights)
        names = [n for n in self._start if n in weights]
        _copy({n: weights[n] for n in names}, self._stop)
        return Segment(_some(self._start, names), _some(self._stop, names), self._same)

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
        return Segment(_some(self._start, names), _some(self._stop, names), self._same)


def _forms(weights: Weights) -> list[tuple[object, ...]]:
    return [(n, w.shape, w.dtype, w.device) for n, w in weights.items()]


def _some(weights: dict[str, Tensor], names: list[str]) -> Weights:
    """Returns those of these names; all of them as they are, side by side."""
    return weights if len(names) == len(weights) else {n: weights[n] for n in names}


@without_graph
def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> DeferredBool | bool:
    """Compares values; off the CPU the answer is on its way, so that nothing waits for it."""
    x, y = together(a, b)
    if not on_accelerator(x[0]):  # Bit by bit, by what is several times as fast as torch.equal.
        return all(map(np.array_equal, map(_bits, x), map(_bits, y)))
    return DeferredBool(
        torch.stack([(p == q).all().to(x[0].device) for p, q in zip(x, y, strict=True)]).all()
    )


def _bits(memory: Tensor) -> npt.NDArray[np.int64]:
    """Shows a memory of a `Flat` on the CPU as integers of eight bytes."""
    return memory.view(torch.int64).numpy()


@without_graph
def _copy(source: Weights, into: Weights) -> None:
    torch._foreach_copy_([into[n] for n in source], list(source.values()))
