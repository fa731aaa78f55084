"""Arithmetic over the many tensors of a network, without a second copy of them all.

On a CPU it goes piece by piece, in the cache; on an accelerator in few kernels over many tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
CHUNK = 2**19  # Elements that stay in a processor's cache while several kernels go over them.
LARGE = 2**20  # Elements that keep an accelerator busy.


def total(values: Iterable[Tensor]) -> Tensor:
    """Sums all elements of all tensors in float64 where the device has it: [*shape] each -> []."""
    return torch.stack([v.sum(dtype=wide(v)) for v in values]).sum()


def wide(tensor: Tensor) -> torch.dtype:
    """Names the dtype for sums: float64, or float32 where the device lacks it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def on_accelerator(tensor: Tensor) -> bool:
    """Whether launches of kernels cost more than memory: then a few go over many tensors."""
    return tensor.device.type != "cpu"


def bundles(tensors: Sequence[Tensor]) -> Iterator[slice]:
    """Cuts a list of tensors into bundles of bounded size; a large tensor is one by itself.

    What goes over one bundle needs room for its results only, not for those of the whole list.

    Example:
        >>> list(bundles([torch.empty(9), torch.empty(9), torch.empty(2**21), torch.empty(9)]))
        [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None)]
    """
    begin = elements = 0
    for i, tensor in enumerate(tensors):
        if i > begin and elements + tensor.numel() > LARGE:
            yield slice(begin, i)
            begin, elements = i, 0
        elements += tensor.numel()
    if tensors:
        yield slice(begin, len(tensors))


def accumulator(weight: Tensor) -> Tensor:
    """Makes an empty tensor for gradient sums [*shape]: float32 if the weight is half precision."""
    dtype = torch.float32 if weight.dtype in HALF else None
    return torch.empty_like(weight, dtype=dtype, requires_grad=False).detach()


@torch.no_grad()
def add(sums: list[Tensor], gradients: list[Tensor], weight: float, *, fresh: bool = False) -> None:
    """Adds weight · gradient to the sums; ``fresh`` replaces them, and both may be one tensor."""
    if fresh and on_accelerator(sums[0]):
        if sums is not gradients:
            torch._foreach_copy_(sums, gradients)
        torch._foreach_mul_(sums, weight)
    elif fresh:
        for sum_, gradient in zip(sums, gradients, strict=True):
            torch.mul(gradient, weight, out=sum_)
    else:
        torch._foreach_add_(sums, gradients, alpha=weight)


@torch.no_grad()
def times_motion(sums: list[Tensor], starts: list[Tensor], stops: list[Tensor]) -> None:
    """Multiplies by stop − start, in place; the motion is never a whole copy."""
    if on_accelerator(sums[0]):
        for part in bundles(sums):
            # Exact in the wider type: half-precision weights would round their own motion.
            ends = [w.to(s.dtype) for w, s in zip(stops[part], sums[part], strict=True)]
            torch._foreach_mul_(sums[part], torch._foreach_sub(ends, starts[part]))
        return
    # One buffer for all pieces: fresh ones would cost more in page faults than the work itself.
    buffer = starts[0].new_empty(CHUNK)
    for tensors in zip(sums, starts, stops, strict=True):
        for piece, a, b in _pieces(*tensors):
            if piece.dtype != b.dtype:  # Half-precision weights would round their own motion.
                a, b = a.to(piece.dtype), b.to(piece.dtype)
            fits = b.numel() <= CHUNK and (b.dtype, b.device) == (buffer.dtype, buffer.device)
            moved = buffer[: b.numel()].view(b.shape) if fits else torch.empty_like(b)
            piece.mul_(torch.sub(b, a, out=moved))


def _pieces(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Cuts large tensors of one shape alike, so that on a CPU each piece stays in its cache."""
    large = tensors[0].numel() > CHUNK and tensors[0].device.type == "cpu"
    if not (large and all(t.is_contiguous() for t in tensors)):
        return [tensors]
    return zip(*(torch.split(t.view(-1), CHUNK) for t in tensors), strict=True)


class DeferredBool:
    """A boolean [] on a device; ``bool(flag)`` reads it on the host.

    From CUDA it is copied as soon as it is known, beside whatever is queued behind it: reading it
    waits for the flag alone and not for the device.
    """

    def __init__(self, value: Tensor) -> None:
        """Takes a boolean tensor [], and starts to copy it."""
        self.tensor = value
        self._host = value
        self._arrived: torch.cuda.Event | None = None
        if value.device.type == "cuda":
            self._host = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._host.copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(value.device))

    def __bool__(self) -> bool:
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._host)

    @classmethod
    def of(cls, value: bool, device: torch.device) -> DeferredBool:
        """Makes a flag of what the host knows."""
        # A fill, and not a copy: the host would wait for a copy.
        return cls(torch.full((), value, dtype=torch.bool, device=device))
