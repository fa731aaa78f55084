"""Sums and counts along the rows of many matrices: the fastest way on a CPU, and on a GPU.

Three numbers per row: the sum, how many elements are negative, and how many are positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lca.measure.tensors import CHUNK, wide

_PIECE = 2**12  # Elements that one of an accelerator's many reductions covers.


def in_the_cache(rows: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Sums and counts chunk by chunk, in the cache: [rows, width] each -> three [all rows]."""
    parts = []
    # One for all: a fresh one for each would cost more in page faults than the sums themselves.
    scratch = rows[0].new_empty(CHUNK)
    for r in rows:
        for part in torch.split(r, max(1, CHUNK // max(1, r.shape[1]))):
            parts.append(_stats(part, scratch))
    credit, balance, moved = (torch.cat(column) for column in zip(*parts, strict=True))
    return credit, ((moved - balance) / 2).long(), ((moved + balance) / 2).long()


def _stats(part: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns sum, hurting − helping, hurting + helping: [rows, width] -> three [rows]."""
    double = wide(part)
    total = torch.zeros(3, len(part), dtype=double, device=part.device)
    for chunk in torch.split(part, CHUNK, 1):
        total[0] += chunk.sum(1, dtype=double)
        # One pass instead of two comparisons; the sign of NaN is 0.
        signs = torch.sign(chunk, out=scratch[: chunk.numel()].view(chunk.shape))
        total[1] += signs.sum(1)
        total[2] += signs.abs_().sum(1)
    return total[0], total[1], total[2]


def in_few_kernels(
    rows: list[Tensor], pieces: list[tuple[slice, Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Does the same where launches cost more than memory: small tensors together, in pieces.

    Args:
        rows: [rows, width] each.
        pieces: Bundles of them, and what `pieces_of` says of each.
    """
    parts = []
    for bundle, lengths, into in pieces:
        matrices = rows[bundle]
        if len(matrices) == 1:
            (r,) = matrices
            parts.append((r.sum(1, dtype=wide(r)), (r < 0).sum(1), (r > 0).sum(1)))
            continue
        count = sum(map(len, matrices))
        flat = torch.cat([r.reshape(-1) for r in matrices])
        exact = torch.float32  # A piece has far fewer than 2**24 elements.
        parts.append(
            (
                _reduce(flat.to(wide(flat)), lengths, into, count),
                _reduce((flat < 0).to(exact), lengths, into, count).long(),
                _reduce((flat > 0).to(exact), lengths, into, count).long(),
            )
        )
    credit, helping, hurting = (torch.cat(column) for column in zip(*parts, strict=True))
    return credit, helping, hurting


@dataclass(frozen=True)
class Run:
    """A stretch of memory that small tensors share, and which row every piece of it belongs to.

    Attributes:
        memory: Which memory.
        begin: Its first element there.
        end: The element after its last.
        lengths: Of the pieces that it falls into [pieces]: rows, parts of rows, and gaps.
        into: The row of every piece [pieces]; ``rows`` for gaps.
        rows: How many rows it holds.
    """

    memory: int
    begin: int
    end: int
    lengths: Tensor
    into: Tensor
    rows: int

    def sums(self, memories: list[Tensor]) -> Tensor:
        """Returns sum, count below 0 and count above 0 of every row: [3, rows]."""
        data = memories[self.memory][self.begin : self.end]
        columns = torch.stack([data.to(wide(data)), (data < 0), (data > 0)])
        pieces = torch.segment_reduce(
            columns, "sum", lengths=self.lengths.expand(3, -1), axis=1, unsafe=True
        )
        total = torch.zeros(3, self.rows + 1, dtype=pieces.dtype, device=data.device)
        return total.index_add_(1, self.into, pieces)[:, : self.rows]


def runs_of(
    spans: Sequence[tuple[int, int, int]], rows: Sequence[int], longest: int, device: torch.device
) -> list[Run]:
    """Cuts memories into runs.

    Args:
        spans: Of every tensor: its memory, first element and elements, in the order of memory.
        rows: How many rows each has, one after the other.
        longest: Elements that a run may have; a longer tensor is a run by itself.
        device: Where the numbers are used.

    Example:
        >>> (run,) = runs_of([(0, 0, 4), (0, 6, 3)], [2, 1], 100, torch.device("cpu"))
        >>> run.lengths.tolist(), run.into.tolist(), run.rows
        ([2, 2, 2, 3], [0, 1, 3, 2], 3)
        >>> run.sums([torch.tensor([1.0, 2, -3, 4, 0, 0, -1, -1, 0])]).tolist()
        [[3.0, 1.0, -2.0], [0.0, 1.0, 2.0], [2.0, 1.0, 0.0]]
    """
    parts: list[list[tuple[int, int, int, int]]] = []
    for (memory, begin, length), count in zip(spans, rows, strict=True):
        last = parts[-1] if parts else None
        if last and last[0][0] == memory and begin + length - last[0][1] <= longest:
            last.append((memory, begin, length, count))
        else:
            parts.append([(memory, begin, length, count)])
    runs = []
    for part in parts:
        lengths: list[int] = []
        into: list[int] = []
        total = sum(count for *_, count in part)
        row, at = 0, part[0][1]
        for _, begin, length, count in part:
            if begin > at:
                lengths.append(begin - at)
                into.append(total)
            for _ in range(count):
                width = length // count
                pieces = [_PIECE] * (width // _PIECE) + [width % _PIECE] * (width % _PIECE > 0)
                lengths += pieces
                into += [row] * len(pieces)
                row += 1
            at = begin + length
        of_pieces, rows_of_pieces = (torch.tensor(n, device=device).long() for n in (lengths, into))
        runs.append(Run(part[0][0], part[0][1], at, of_pieces, rows_of_pieces, total))
    return runs


def _reduce(data: Tensor, lengths: Tensor, into: Tensor, count: int) -> Tensor:
    """Sums pieces [elements] -> [pieces] -> [count] rows."""
    sums = torch.segment_reduce(data, "sum", lengths=lengths, unsafe=True).to(wide(data))
    return torch.zeros(count, dtype=sums.dtype, device=data.device).index_add_(0, into, sums)


def pieces_of(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Cuts rows into pieces of bounded length: gives the length and the row of each."""
    widths = torch.tensor([r.shape[1] for r in rows for _ in range(len(r))])
    pieces = (widths + _PIECE - 1) // _PIECE  # Of every row.
    into = torch.repeat_interleave(torch.arange(len(widths)), pieces)
    lengths = torch.full_like(into, _PIECE)
    lengths[pieces.cumsum(0)[pieces > 0] - 1] = (widths - (pieces - 1) * _PIECE)[pieces > 0]
    return lengths, into


def nothing(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of no rows, where this process holds none."""
    counts = torch.zeros(0, dtype=torch.long, device=device)
    return counts.to(wide(counts)), counts, counts
