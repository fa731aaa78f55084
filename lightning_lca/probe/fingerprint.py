"""A hash of tensors, taken on their device: has anything changed since the last look?

No copy is kept, so that a large frozen model can be watched at the price of reading it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lightning_lca.measure.parameters import local
from lightning_lca.measure.tensors import without_graph

_WIDTH = 1024
_SMALL = 2**16  # Bytes; smaller tensors are hashed as one.


@without_graph
def fingerprint(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Hashes the bits of tensors of any shape, dtype and place: [*shape] each -> [hashes] int64.

    Equal bits give equal hashes. A change gives different ones but for an unlucky chance of about
    2⁻⁶⁴, values that only change places included.

    Example:
        >>> a, b = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
        >>> torch.equal(fingerprint([a], a.device), fingerprint([a.clone()], a.device))
        True
        >>> torch.equal(fingerprint([a], a.device), fingerprint([b], a.device))
        False
    """
    small: dict[torch.device, list[Tensor]] = {}
    hashes = []
    for tensor in tensors:
        data = _bytes(local(tensor))
        if len(data) <= _SMALL:
            small.setdefault(data.device, []).append(data)
        else:
            hashes.append(_hash(data))
    hashes += [_hash(torch.cat(parts)) for parts in small.values()]
    if not hashes:
        return torch.zeros(0, dtype=torch.int64, device=device)
    return torch.stack([h.to(device) for h in hashes])


def _bytes(tensor: Tensor) -> Tensor:
    """Shows a tensor as bytes [n] uint8."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _hash(data: Tensor) -> Tensor:
    """Adds up 8 bytes at a time, times keys that depend on their place: [n] uint8 -> []."""
    keys = _keys(data.device)
    words = len(data) // 8
    if data.storage_offset() % 8:
        data = data.clone()
    whole = data[: words * 8].view(torch.int64)
    rows = words // _WIDTH * _WIDTH
    # Sums of columns and of rows, by additions that wrap around, at the speed of memory; the keys
    # then tell columns apart, and rows.
    table = whole[:rows].view(-1, _WIDTH)
    rest = torch.cat([whole[rows:], data[words * 8 :].to(torch.int64)])
    order = torch.arange(1, 2 * len(table) + 1, 2, device=data.device)
    return (
        (table.sum(0) * keys[0, :_WIDTH]).sum()
        + (table.sum(1) * (order * keys[0, _WIDTH])).sum()
        + (rest * keys[1, : len(rest)]).sum()
        + len(data)
    )


@lru_cache
def _keys(device: torch.device) -> Tensor:
    """Returns fixed odd multipliers [2, _WIDTH + 8] int64, for the columns and for the rest."""
    generator = torch.Generator().manual_seed(190901440)
    keys = torch.randint(-(2**62), 2**62, (2, _WIDTH + 8), generator=generator)
    return (2 * keys + 1).to(device)
