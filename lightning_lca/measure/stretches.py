"""Pieces of memory that tensors share: what goes over them needs no copy of all weights.

A piece is a stretch of a `Flat` layout, short enough for a dozen tensors of its length to stay in a
processor's cache. Other tensors, wherever they lie, are shown piece by piece in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lightning_lca.measure.allocation import Segment, Weights
from lightning_lca.measure.groups import Grouping
from lightning_lca.measure.tensors import ALIGNED, CHUNK, LARGE, Flat, on_accelerator, wide


@dataclass(frozen=True)
class Stretch:
    """Neighbours in memory, or a piece of one tensor.

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

    def of(self, flat: Flat) -> Tensor:
        """Shows this stretch of a layout [elements]."""
        return flat.wholes[self.memory][self.begin : self.end]

    def show(self, weights: Weights, layout: Flat, like: Tensor) -> Tensor:
        """Shows this stretch of weights {name: [*shape]} [elements], in the type of others."""
        if isinstance(weights, Flat) and weights.form is layout.form:
            return self.of(weights).to(like.dtype)
        return self.gather([weights[n] for n in self.names], layout, like, 0.0)

    def gather(
        self, tensors: Sequence[Tensor], layout: Flat, like: Tensor, gap: float = 1.0
    ) -> Tensor:
        """Shows tensors [*shape] side by side [elements], with a number in the gaps.

        They are copied where they have to be; a piece of one tensor may be shown where it lies, and
        is not to be written to.

        Args:
            tensors: Of this stretch's parameters, one each.
            layout: What says where they go.
            like: Of the length and the type of the result.
            gap: The number.
        """
        lies = self._where_it_lies(tensors, layout, like)
        if lies is not None:
            return lies
        room = torch.full_like(like, gap)
        for name, tensor in zip(self.names, tensors, strict=True):
            if tensor.layout != torch.strided:
                tensor = tensor.to_dense()
            _, begin, length = layout.spans[name]
            strides = layout[name].stride()
            first = max(begin, self.begin)
            last = min(begin + length, self.end)
            if (first, last) == (begin, begin + length):
                place = room[begin - self.begin :][:length].as_strided(
                    tensor.shape, strides, begin - self.begin
                )
                place.copy_(tensor)
            else:
                if tensor.stride() != strides or not _is_dense(tensor):
                    tensor = torch.empty_like(layout[name], dtype=tensor.dtype).copy_(tensor)
                flat = tensor.as_strided((length,), (1,), tensor.storage_offset())
                room[first - self.begin : last - self.begin].copy_(
                    flat[first - begin : last - begin]
                )
        return room

    def _where_it_lies(
        self, tensors: Sequence[Tensor], layout: Flat, like: Tensor
    ) -> Tensor | None:
        """Shows this stretch of its only parameter without a copy; None where that cannot be."""
        (name, *others), tensor = self.names, tensors[0]
        _, begin, length = layout.spans[name]
        if others or tensor.dtype != like.dtype or tensor.layout != torch.strided:
            return None
        if self.end > begin + length:
            return None
        if tensor.stride() != layout[name].stride() or not _is_dense(tensor):
            return None
        first = tensor.storage_offset() + self.begin - begin
        return tensor.as_strided((self.end - self.begin,), (1,), first)


def stretches(layout: Flat, kind: Callable[[str], Hashable] = lambda name: None) -> list[Stretch]:
    """Cuts a layout into pieces, and where the kind of its parameters changes."""
    if not layout.wholes:
        return []
    most = LARGE if on_accelerator(layout.wholes[0]) else CHUNK
    found: list[Stretch] = []
    last: object = None
    for name, (memory, begin, length) in layout.spans.items():
        key = kind(name)
        end = begin + -(-length // ALIGNED) * ALIGNED
        before = found[-1] if found else None
        if length > most:
            cuts = [*range(begin, end, most), end]
            found += [Stretch(memory, a, b, [name], a - begin) for a, b in pairwise(cuts)]
            last = object()
        elif (
            before is not None
            and (key, memory) == last
            and end - before.begin <= most
            and before.end == begin
        ):
            found[-1] = Stretch(memory, before.begin, end, [*before.names, name])
        else:
            found.append(Stretch(memory, begin, end, [name]))
            last = key, memory
    return found


class GroupBlocks:
    """Sums numbers of stretches over groups: blocks of them, which belong to one group each."""

    def __init__(self, grouping: Grouping) -> None:
        """Looks at the groups when the first layout comes."""
        self._grouping = grouping
        self._form: object = None
        self._block = 1
        self._index: list[Tensor] = []

    def zeros(self, rows: int, layout: Flat) -> Tensor:
        """Makes room for sums [rows, groups + 1]; the last column is for what is in no group."""
        if self._form is not layout.form:
            self._form = layout.form
            self._block, self._index = self._grouping.blocks(layout)
        first = layout.wholes[0]
        groups = len(self._grouping.names) + 1
        return torch.zeros(rows, groups, dtype=wide(first), device=first.device)

    def add(self, into: Tensor, at: Stretch, values: Tensor, scale: Tensor | float = 1.0) -> None:
        """Adds scale times the sums of a stretch [elements] to those of groups [groups + 1]."""
        index = self._index[at.memory][at.begin // self._block : at.end // self._block]
        # Few elements each: their own type is exact enough, and several times faster.
        sums = values.view(-1, self._block).sum(1).to(into.dtype)
        if isinstance(scale, Tensor):
            sums, scale = sums * scale, 1.0
        into.index_add_(0, index, sums, alpha=scale)

    @torch.no_grad()
    def products(self, gradient: Weights, segment: Segment) -> Tensor:
        """Sums gradient · motion of every group [groups], in loss units; nothing is written to."""
        layout = segment.start
        if not isinstance(layout, Flat) or not self._grouping.is_whole:
            # Exact in the wider type: half-precision weights would round their own motion.
            moved = {n: segment.stop[n].to(g.dtype) - layout[n] for n, g in gradient.items()}
            return self._grouping.sums({n: m.mul_(gradient[n]) for n, m in moved.items()}).credit
        total = self.zeros(1, layout)
        for at in stretches(layout):
            like = at.of(layout)
            like = like.float() if like.dtype in (torch.float16, torch.bfloat16) else like
            start, stop, slope = (
                at.show(w, layout, like) for w in (layout, segment.stop, gradient)
            )
            self.add(total[0], at, (stop - start).mul_(slope))
        return total[0, :-1]


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill a stretch of memory, in whatever order."""
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return bool(span == tensor.numel())
