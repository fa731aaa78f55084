"""Sums and counts along the rows of many matrices: the fastest way on a CPU, and on a GPU.

Three numbers per row: the sum, how many elements are negative, and how many are positive.
"""

from __future__ import annotations

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
