"""Sums and counts along the rows of many matrices: the fastest way on a CPU, and on a GPU.

Three numbers per row: the sum, the balance (how many elements are positive, less how many are
negative), and how many are positive. From tensors that lie side by side they come in *pieces*, of
which any number make up a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lca.measure.tensors import ALIGNED, BUSY, CHUNK, wide

Columns = tuple[Tensor, Tensor, Tensor]  # Sum, balance, and count above 0.

_PIECE = 2**12  # Elements that one of an accelerator's many reductions covers.


def in_the_cache(rows: list[Tensor]) -> Columns:
    """Sums and counts chunk by chunk, in the cache: [rows, width] each -> three [all rows]."""
    parts = []
    # One for all: a fresh one for each would cost more in page faults than the sums themselves.
    scratch = {r.dtype: r.new_empty(CHUNK) for r in {r.dtype: r for r in rows}.values()}
    for r in rows:
        for part in torch.split(r, max(1, CHUNK // max(1, r.shape[1]))):
            parts.append(_stats(part, scratch[r.dtype]))
    first, second, third = torch.cat(parts, 1)
    return first, second, third


def _stats(part: Tensor, scratch: Tensor) -> Tensor:
    """Returns the three numbers of some rows: [rows, width] -> [3, rows]."""
    double = wide(part)
    total = torch.zeros(3, len(part), dtype=double, device=part.device)
    for chunk in torch.split(part, CHUNK, 1):
        total[0] += chunk.sum(1, dtype=double)
        # One pass instead of two comparisons; the sign of NaN is 0.
        signs = torch.sign(chunk, out=scratch[: chunk.numel()].view(chunk.shape))
        total[1] += signs.sum(1)
        total[2] += signs.clamp_(min=0).sum(1)
    return total


def in_few_kernels(rows: list[Tensor], pieces: list[tuple[slice, Tensor, Tensor]]) -> Columns:
    """Does the same where launches cost more than memory: small tensors together, in pieces.

    Args:
        rows: [rows, width] each.
        pieces: Bundles of them, and what `pieces_of` says of each.
    """
    parts = []
    for bundle, lengths, into in pieces:
        matrices = rows[bundle]
        if len(matrices) == 1:
            parts.append(_of_large(matrices[0]))
            continue
        count = sum(map(len, matrices))
        flat = torch.cat([r.reshape(-1) for r in matrices])
        exact = torch.float32  # A piece has far fewer than 2**24 elements.
        columns = (flat.to(wide(flat)), torch.sign(flat).to(exact), (flat > 0).to(exact))
        parts.append(torch.stack([_reduce(c, lengths, into, count) for c in columns]))
    first, second, third = torch.cat(parts, 1)
    return first, second, third


def _of_large(rows: Tensor) -> Tensor:
    """Returns the three numbers of rows, of so many elements at once that need little room."""
    found = []
    for some in torch.split(rows, max(1, BUSY // max(1, rows.shape[1]))):
        total = torch.zeros(3, len(some), dtype=wide(some), device=some.device)
        for part in torch.split(some, BUSY, 1):
            total[0] += part.sum(1, dtype=total.dtype)
            total[1] += torch.sign(part).sum(1)
            total[2] += (part > 0).sum(1)
        found.append(total)
    return torch.cat(found, 1)


@dataclass(frozen=True)
class Run:
    """A stretch of memory that tensors share, and which row every piece of it belongs to.

    Attributes:
        memory: Which memory.
        begin: Its first element there.
        end: The element after its last.
        block: Elements that all pieces have, or 0 if their lengths differ. Gaps hold zeros, and
            count as part of the row before them.
        lengths: Of the pieces [pieces], gaps among them, if they differ.
        into: The row of every piece [pieces]; ``rows`` for gaps.
        rows: How many rows it holds.
    """

    memory: int
    begin: int
    end: int
    block: int
    lengths: Tensor
    into: Tensor
    rows: int

    def sums(self, memories: list[Tensor], scratch: Tensor) -> Columns:
        """Returns sum, balance and count above 0 of every piece: [pieces] each.

        Args:
            memories: What tensors share [elements] each.
            scratch: Room for as many elements as the run has.
        """
        data = memories[self.memory][self.begin : self.end]
        double = wide(data)
        if self.block:
            blocks = data.view(-1, self.block)
            signs = torch.sign(blocks, out=scratch[: len(data)].view(-1, self.block))
            # Sums of signs are exact in any type; those of credits add up alike in every table.
            return blocks.sum(1, dtype=double), signs.sum(1), signs.clamp_(min=0).sum(1)
        table = torch.stack([data.to(double), torch.sign(data).to(double), (data > 0).to(double)])
        lengths = self.lengths.expand(3, -1)
        pieces = torch.segment_reduce(table, "sum", lengths=lengths, axis=1, unsafe=True)
        return pieces[0], pieces[1], pieces[2]


def runs_of(
    spans: Sequence[tuple[int, int, int]], rows: Sequence[int], longest: int, device: torch.device
) -> list[Run]:
    """Cuts memories into runs.

    Args:
        spans: Of every tensor: its memory, first element and elements, in the order of memory; each
            begins at a multiple of `ALIGNED`, and ends before a gap of zeros up to the next such.
        rows: How many rows each has, one after the other.
        longest: Elements that a run may have; a longer tensor is a run by itself.
        device: Where the numbers are used.

    Example:
        >>> data = torch.zeros(512)
        >>> data[:4], data[256:259] = torch.tensor([1.0, 2, -3, 4]), torch.tensor([-1.0, -1, 0])
        >>> (run,) = runs_of([(0, 0, 4), (0, 256, 3)], [2, 1], 300, torch.device("cpu"))
        >>> run.block, run.rows
        (2, 3)
        >>> columns = run.sums([data], data.clone())
        >>> [[c[run.into == row].sum().item() for c in columns] for row in range(3)]
        [[3.0, 2.0, 2.0], [1.0, 0.0, 1.0], [-2.0, -2.0, 0.0]]
    """
    parts: list[list[tuple[int, int, int, int]]] = []
    for (memory, begin, length), count in zip(spans, rows, strict=True):
        last = parts[-1] if parts else None
        if last and last[0][0] == memory and begin + length - last[0][1] <= longest:
            last.append((memory, begin, length, count))
        else:
            parts.append([(memory, begin, length, count)])
    few = device.type != "cpu"
    return [_in_pieces(part, device) if few else _in_blocks(part) for part in parts]


def _in_blocks(part: list[tuple[int, int, int, int]]) -> Run:
    """Cuts a run into equal blocks: sums of few elements each, and then of the blocks."""
    widths = [length // count for _, _, length, count in part if count > 1]
    block = math.gcd(ALIGNED, *widths)
    memory, begin, _, _ = part[0]
    into: list[Tensor] = []
    row, at = 0, begin
    for _, first, length, count in part:
        if first > at:  # Tensors that others count lie between.
            into.append(torch.full(((first - at) // block,), -1))
        end = first + -(-length // ALIGNED) * ALIGNED
        of_each = torch.arange((end - first) // block) * block // max(1, length // max(1, count))
        into.append(row + of_each.clamp(max=count - 1))
        row, at = row + count, end
    places = torch.cat(into)
    lengths = torch.zeros(0, dtype=torch.long)
    return Run(memory, begin, at, block, lengths, places.where(places >= 0, row), row)


def _in_pieces(part: list[tuple[int, int, int, int]], device: torch.device) -> Run:
    """Cuts a run into pieces of rows, each short enough for one of many reductions."""
    lengths: list[int] = []
    into: list[int] = []
    rows = sum(count for *_, count in part)
    memory, begin, _, _ = part[0]
    row, at = 0, begin
    for _, first, length, count in part:
        if first > at:
            lengths.append(first - at)
            into.append(rows)
        for _ in range(count):
            width = length // count
            pieces = [_PIECE] * (width // _PIECE) + [width % _PIECE] * (width % _PIECE > 0)
            lengths += pieces
            into += [row] * len(pieces)
            row += 1
        at = first + length
    of_pieces, rows_of_pieces = (torch.tensor(n, device=device).long() for n in (lengths, into))
    return Run(memory, begin, at, 0, of_pieces, rows_of_pieces, rows)


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
