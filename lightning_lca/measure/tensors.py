"""Arithmetic over the many tensors of a network, without a second copy of them all.

On a CPU it goes piece by piece, in the cache; on an accelerator in few kernels over many tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

HALF = (torch.float16, torch.bfloat16)
CHUNK = 2**17  # Elements that stay in a processor's cache while several kernels go over them.
LARGE = 2**20  # Elements that keep an accelerator busy.
BUSY = 2**24  # Elements that it works on at once: results of more would take too much room.
ALIGNED = 256  # Elements; as kernels like it, and so that blocks of them can be summed.


_forms: dict[tuple[object, ...], tuple[object, ...]] = {}  # Each by itself: one object for all.


class Flat(dict[str, Tensor]):
    """Tensors of a network side by side in few memories, so that one operation goes over all.

    Each is a view with the shape and the strides of the tensor that it is made like; between them
    are zeros, so that each begins where a kernel likes it to.

    Attributes:
        wholes: The memories [elements], one per device and dtype.
        spans: Of every tensor {name: (which memory, first element, elements)}.
        form: One and the same object for all that lie alike, down to the order of elements.

    Example:
        >>> flat = Flat({"a": torch.ones(2, 3), "b": torch.ones(4)})
        >>> flat["b"].fill_(2.0).sum().item(), flat.wholes[0].sum().item()
        (8.0, 8.0)
    """

    def __init__(self, like: Mapping[str, Tensor], *, sums: bool = False) -> None:
        """Makes tensors of zeros.

        Args:
            like: {name: [*shape]}.
            sums: Makes room for sums of many such numbers: float32 where they have half of that.
        """
        super().__init__()
        kinds: dict[tuple[torch.device, torch.dtype], int] = {}
        self.spans: dict[str, tuple[int, int, int]] = {}
        lengths: list[int] = []
        for name, tensor in like.items():
            which = kinds.setdefault((tensor.device, tensor.dtype), len(kinds))
            if which == len(lengths):
                lengths.append(0)
            self.spans[name] = which, lengths[which], tensor.numel()
            lengths[which] += -(-tensor.numel() // ALIGNED) * ALIGNED
        self.wholes = [
            torch.zeros(n, device=device, dtype=torch.float32 if sums and d in HALF else d)
            for n, (device, d) in zip(lengths, kinds, strict=True)
        ]
        for name, tensor in like.items():
            which, begin, length = self.spans[name]
            part = self.wholes[which][begin : begin + length]
            # As torch would lay out one like it: gaps and overlaps are not repeated.
            strides = torch.empty_like(tensor, device="meta").stride()
            self[name] = part.as_strided(tensor.shape, strides)
        form = tuple(
            (name, *self.spans[name], tuple(t.shape), t.stride()) for name, t in self.items()
        )
        self.form = _forms.setdefault(form, form)
        self._scratch: Tensor | None = None

    def scratch(self) -> Tensor:
        """Returns room for work on a piece of the first memory [elements], made once.

        Made at every use it would cost more in page faults than the work itself.
        """
        if self._scratch is None:
            whole = self.wholes[0]
            self._scratch = whole.new_empty(min(CHUNK, len(whole)))
        return self._scratch

    def goes_with(self, *others: object) -> bool:
        """Whether others lie alike, so that one operation goes over the memories of all."""
        form = self.form
        return all([isinstance(o, Flat) and o.form is form for o in others])


def without_graph(function: Callable[P, T]) -> Callable[P, T]:
    """Runs a function as `torch.no_grad` does, at next to no cost where gradients are off."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return run


def together(*tensors: Mapping[str, Tensor]) -> list[list[Tensor]]:
    """Lists what one operation after the other goes over: memories, or tensors name by name.

    All have the names of the first.
    """
    first = tensors[0]
    if isinstance(first, Flat) and first.goes_with(*tensors[1:]):
        return [f.wholes for f in tensors if isinstance(f, Flat)]
    return [[t[name] for name in first] for t in tensors]


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


@without_graph
def add(
    into: Mapping[str, Tensor], more: Mapping[str, Tensor], weight: float, *, fresh: bool = False
) -> None:
    """Adds weight · gradient to sums {name: [*shape]}; ``fresh`` replaces them: both may be one."""
    sums, gradients = together(into, more)
    if fresh and on_accelerator(sums[0]):
        if sums[0] is not gradients[0]:
            torch._foreach_copy_(sums, gradients)
        torch._foreach_mul_(sums, weight)
    elif fresh:
        for sum_, gradient in zip(sums, gradients, strict=True):
            torch.mul(gradient, weight, out=sum_)
    else:
        torch._foreach_add_(sums, gradients, alpha=weight)


@without_graph
def times_motion(
    values: Mapping[str, Tensor], begin: Mapping[str, Tensor], end: Mapping[str, Tensor]
) -> None:
    """Multiplies by stop − start, in place; the motion is never a whole copy."""
    starts, stops, sums = together(begin, end, values)
    if on_accelerator(sums[0]):
        for some, of_start, of_stop in side_by_side(sums, starts, stops):
            # Exact in the wider type: half-precision weights would round their own motion.
            ends = [w.to(s.dtype) for w, s in zip(of_stop, some, strict=True)]
            torch._foreach_mul_(some, torch._foreach_sub(ends, of_start))
        return
    # One buffer for all pieces: fresh ones would cost more in page faults than the work itself.
    buffer = values.scratch() if isinstance(values, Flat) else starts[0].new_empty(CHUNK)
    for tensors in zip(sums, starts, stops, strict=True):
        for piece, a, b in pieces(*tensors):
            if piece.dtype != b.dtype:  # Half-precision weights would round their own motion.
                a, b = a.to(piece.dtype), b.to(piece.dtype)
            fits = b.numel() <= len(buffer) and (b.dtype, b.device) == (buffer.dtype, buffer.device)
            moved = buffer[: b.numel()].view(b.shape) if fits else torch.empty_like(b)
            piece.mul_(torch.sub(b, a, out=moved))


def pieces(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Cuts large tensors of one shape alike, so that results of a piece are small.

    On a CPU it stays in its cache.
    """
    size = BUSY if on_accelerator(tensors[0]) else CHUNK
    if tensors[0].numel() <= size or not all(t.is_contiguous() for t in tensors):
        return [tensors]
    return zip(*(torch.split(t.view(-1), size) for t in tensors), strict=True)


def side_by_side(*lists: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Cuts lists of tensors of the same shapes alike: small ones in bundles, large in pieces."""
    for part in bundles(lists[0]):
        some = [tensors[part] for tensors in lists]
        if len(some[0]) > 1:
            yield tuple(some)
        else:
            for cut in pieces(*(one[0] for one in some)):
                yield tuple([piece] for piece in cut)


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
