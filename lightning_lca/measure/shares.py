"""Credit split into shares: what a step was made of, and first order against curvature.

Credit is linear in the motion and in the gradient, so that whatever adds up to one of them gives
shares that add up to the credit of every weight, and of every group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lightning_lca.measure.allocation import Segment, Weights
from lightning_lca.measure.groups import Grouping
from lightning_lca.measure.motion import PARTS, Number, Steps, terms
from lightning_lca.measure.tensors import (
    ALIGNED,
    LARGE,
    Flat,
    on_accelerator,
    times_motion,
    wide,
)

ORDERS = ("first_order", "curvature")
OSCILLATION = ("reversed", "flipped", "cosine_start", "cosine_end")
_PIECE = 2**16  # Elements of which a dozen tensors stay in a processor's cache.
STEP = "step"  # The whole motion by an optimizer whose steps have no known form.


@dataclass(frozen=True)
class _Stretch:
    """Neighbours in memory that share a form, or a piece of one of them.

    Attributes:
        memory: Which memory.
        begin: The first element there.
        end: The element after the last.
        names: The parameters; of a piece, one.
        offset: Where a piece begins in its parameter.
    """

    memory: int
    begin: int
    end: int
    names: list[str]
    offset: int = 0


class Shares:
    """Splits the credit of one segment after the other over named shares, per group.

    Holds one copy of the weights, for the gradient at the start, and pieces of a few hundred
    thousand elements.

    Attributes:
        names: By breakdown, the names of its shares.
    """

    def __init__(self, breakdowns: Sequence[str], grouping: Grouping, steps: Steps) -> None:
        """Splits nothing yet.

        Args:
            breakdowns: "part", "order", "oscillation".
            grouping: The groups.
            steps: What optimizers did.
        """
        unknown = (STEP,) if steps.unknown else ()
        names = {
            "part": (*PARTS[:-1], *unknown, PARTS[-1]),
            "order": ORDERS,
            "oscillation": OSCILLATION,
        }
        self.names = {name: names[name] for name in breakdowns}
        self.start = Flat({})
        self._steps = steps
        self._grouping = grouping
        self._index: list[Tensor] = []
        self._block = 1
        self._spans: object = None
        self._before = Flat({})  # The sign of the motion before [elements], as int8.

    def begin(self, gradient: Weights) -> None:
        """Copies the gradient at the start of a segment {name: [*shape]}."""
        if not isinstance(gradient, Flat) or gradient.spans != self.start.spans:
            alike = {n: tuple(g.shape) for n, g in gradient.items()}
            if alike != {n: tuple(g.shape) for n, g in self.start.items()}:
                self.start = Flat(gradient, sums=True)
        torch._foreach_copy_([self.start[n] for n in gradient], list(gradient.values()))

    def parts(self, gradient: Weights, segment: Segment, live: Weights) -> Tensor:
        """Sums what the parts of a step were credited, all but the last: [parts - 1, groups].

        Args:
            gradient: The mean gradient along the segment {name: [*shape]}.
            segment: The segment; `begin` took the gradient at its start.
            live: The parameters that moved {name: [*shape]}.
        """
        self._look_at_groups()
        device = self.start.wholes[0].device
        count = len(self.names["part"]) - 1
        total = torch.zeros(
            count, len(self._grouping.names) + 1, dtype=wide(self.start.wholes[0]), device=device
        )
        for stretch in self._stretches(live):
            self._add(total, stretch, gradient, segment, live)
        # In the place of noise the whole steps were summed.
        total[3] -= total[0] + total[1] + total[2]
        return total[:, :-1].contiguous()

    def first_order(self, segment: Segment) -> Tensor:
        """Sums the gradient at the start times the motion: [groups]; the gradient is used up."""
        times_motion(self.start, segment.start, segment.stop)
        return self._grouping.sums(self.start).credit

    def oscillation(self, end: Flat | None, segment: Segment) -> Tensor:
        """Tells how weights turn round, by group: [4, groups]; NaN where nothing can be said.

        The share of weights that reversed direction, of those that moved in this segment and in the
        one before; the share whose gradient changed sign within it; the cosine of the motion and
        the downhill direction (minus the gradient), at the start and at the end.

        Args:
            end: The gradient at the end; None where it is not known.
            segment: The segment; `begin` took the gradient at its start.
        """
        self._look_at_groups()
        first = self.start.wholes[0]
        if self._before.spans != self.start.spans:
            signs = {n: torch.zeros_like(g, dtype=torch.int8) for n, g in self.start.items()}
            self._before = Flat(signs)
        groups = len(self._grouping.names)
        total = torch.zeros(9, groups + 1, dtype=wide(first), device=first.device)
        for memory, whole in enumerate(self.start.wholes):
            most = LARGE if on_accelerator(whole) else _PIECE
            for begin in range(0, len(whole), most):
                at = _Stretch(memory, begin, min(begin + most, len(whole)), [])
                self._add_turns(total, at, end, segment)
        total = total[:, :-1]
        turned, moved, flipped, steep = total[:4]
        found = [(moved - turned) / 2 / moved, (steep - flipped) / 2 / steep]
        for slope, length in ((total[4], total[7]), (total[5], total[8])):
            found.append(-slope / (total[6] * length).sqrt())
        return torch.stack(found)

    # -- inside -----------------------------------------------------------------------------------

    def _look_at_groups(self) -> None:
        if self._spans is not self.start.spans:
            self._spans = self.start.spans
            self._block, self._index = self._grouping.blocks(self.start)

    def _stretches(self, live: Weights) -> list[_Stretch]:
        """Cuts memory where the form of a step changes, and into pieces that stay in a cache."""
        most = LARGE if on_accelerator(self.start.wholes[0]) else _PIECE
        found: list[_Stretch] = []
        last: object = None
        for name, (memory, begin, length) in self.start.spans.items():
            step = self._steps.of(live[name])
            key = None if step is None else (step.is_known, step.key)
            end = begin + -(-length // ALIGNED) * ALIGNED
            before = found[-1] if found else None
            if length > most:
                cuts = [*range(begin, end, most), end]
                found += [_Stretch(memory, a, b, [name], a - begin) for a, b in pairwise(cuts)]
                last = object()
            elif (
                before is not None
                and (key, memory) == last
                and end - before.begin <= most
                and before.end == begin
            ):
                found[-1] = _Stretch(memory, before.begin, end, [*before.names, name])
            else:
                found.append(_Stretch(memory, begin, end, [name]))
                last = key, memory
        return found

    def _add(
        self,
        total: Tensor,
        at: _Stretch,
        gradient: Weights,
        segment: Segment,
        live: Weights,
    ) -> None:
        """Adds what the parts of a stretch were credited to [parts - 1, groups + 1]."""
        probe = self.start.wholes[at.memory][at.begin : at.end]
        mean, start, stop = (
            self._slice(w, at, probe) for w in (gradient, segment.start, segment.stop)
        )
        motion = stop - start
        step = self._steps.of(live[at.names[0]])
        index = self._index[at.memory][at.begin // self._block : at.end // self._block]
        names = self.names["part"][:-1]
        found: list[tuple[str, Tensor, Number]] = []
        if step is not None and step.is_known:
            steps = [s for n in at.names if (s := self._steps.of(live[n])) is not None]
            moments = {
                m: self._gather([s.state[m] for s in steps], at, probe) for m in step.moments
            }
            own = self._gather([s.gradient for s in steps], at, probe)
            split = terms(step, moments, own, probe, start, motion, mean)
            found = [(n, *t) for n, t in zip(names, split, strict=False) if t is not None]
        elif step is not None and STEP in names and not step.has_form:
            found = [(STEP, motion * mean, 1.0)]
        for name, values, scale in found:
            sums = values.view(-1, self._block).sum(1, dtype=total.dtype)
            if isinstance(scale, Tensor):
                sums, scale = sums * scale, 1.0
            total[names.index(name)].index_add_(0, index, sums, alpha=scale)

    def _add_turns(self, total: Tensor, at: _Stretch, end: Flat | None, segment: Segment) -> None:
        """Adds the sums over a stretch that turns and cosines follow from to [9, groups + 1]."""
        place = slice(at.begin, at.end)
        slope = self.start.wholes[at.memory][place]
        start, stop = (self._slice(w, at, slope) for w in (segment.start, segment.stop))
        motion = stop - start
        before = self._before.wholes[at.memory][place]
        turns = torch.sign(motion)
        products = [turns * before, None, None, None, motion * slope, None, motion.square()]
        pass
        products += [slope.square(), None]
        if end is not None:
            last = end.wholes[at.memory][place]
            products[2], products[5] = torch.sign(slope) * torch.sign(last), motion * last
            products[8] = last.square()
        for i in (0, 2):
            signs = products[i]
            products[i + 1] = None if signs is None else signs.abs()
        index = self._index[at.memory][at.begin // self._block : at.end // self._block]
        for row, product in enumerate(products):
            if product is not None:
                sums = product.view(-1, self._block).sum(1, dtype=total.dtype)
                total[row].index_add_(0, index, sums)

    def _slice(self, weights: Weights, at: _Stretch, like: Tensor) -> Tensor:
        """Shows a stretch of weights that lie side by side [elements], in the type of sums."""
        if isinstance(weights, Flat) and weights.spans == self.start.spans:
            return weights.wholes[at.memory][at.begin : at.end].to(like.dtype)
        return self._gather([weights[n] for n in at.names], at, like, 0.0)

    def _gather(
        self, tensors: Sequence[Tensor], at: _Stretch, like: Tensor, gap: float = 1.0
    ) -> Tensor:
        """Copies tensors [*shape] side by side [elements], with a number in the gaps."""
        room = torch.full_like(like, gap)
        for name, tensor in zip(at.names, tensors, strict=True):
            if tensor.layout != torch.strided:
                tensor = tensor.to_dense()
            _, begin, length = self.start.spans[name]
            strides = self.start[name].stride()
            first = max(begin, at.begin)
            last = min(begin + length, at.end)
            if (first, last) == (begin, begin + length):
                place = room[begin - at.begin :][:length].as_strided(
                    tensor.shape, strides, begin - at.begin
                )
                place.copy_(tensor)
            else:
                if tensor.stride() != strides or not _is_dense(tensor):
                    tensor = torch.empty_like(self.start[name], dtype=tensor.dtype).copy_(tensor)
                flat = tensor.as_strided((length,), (1,), tensor.storage_offset())
                room[first - at.begin : last - at.begin].copy_(flat[first - begin : last - begin])
        return room


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill a stretch of memory, in whatever order."""
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return bool(span == tensor.numel())
