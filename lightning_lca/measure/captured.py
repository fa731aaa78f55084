"""What a device does again and again, captured once and launched as one from then on.

Where a network is small, the host is busy launching kernels for longer than the device is busy
running them. A CUDA graph holds the kernels and where their numbers lie, and starts them all at the
price of one launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")

_LIGHT = 2**26  # Bytes of weights; what works on more keeps a device busy for longer than the host.
_ROOMY = 2**30  # Bytes of all that is computed on the way.
_SHARE = 8  # So many times that must be free: what is captured keeps its memory.


class NotCapturableError(Exception):
    """Why a device cannot run something without its host."""


class Captured(Generic[T]):
    """A function of what lies in fixed places, as its device runs it without the host.

    No code of the function runs any more: nothing may depend on what it decides, and what it reads
    and writes must stay where it was.

    Attributes:
        results: What the function returned; every launch writes to the same tensors.
    """

    def __init__(self, function: Callable[[], T], device: torch.device) -> None:
        """Captures; nothing is computed yet.

        Args:
            function: It must have run before, so that what it makes once is made.
            device: Where all its tensors are.

        Raises:
            NotCapturableError: The host takes part in it, or there is no memory for it.
        """
        self._graph = torch.cuda.CUDAGraph()
        try:
            with _capturing(self._graph, device):
                self.results: T = function()
        except RuntimeError as error:
            raise NotCapturableError(str(error).strip().partition("\n")[0]) from error

    def launch(self) -> T:
        """Computes the results anew."""
        self._graph.replay()
        return self.results

    @staticmethod
    def free(device: torch.device) -> int:
        """Returns how many bytes nobody has taken on a device; 0 where nothing can be captured."""
        if device.type != "cuda" or not hasattr(torch.Generator, "graphsafe_set_state"):
            return 0
        return int(torch.cuda.mem_get_info(device)[0])


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Captures what is launched within; one that fails leaves nothing behind.

    torch's own `torch.cuda.graph` does, up to 2.13: training would go on on another stream, with a
    random stream that cannot draw, and memory that is never freed.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    random: Any = torch.cuda.default_generators[index]
    own = random.graphsafe_get_state()
    pool = torch.cuda.graph_pool_handle()
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    # A capture takes hold of the random stream: it gets one that nobody draws from.
    random.graphsafe_set_state(own.clone_state())
    try:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            # Other threads, such as those that load data, do what they like meanwhile.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                yield
            finally:
                graph.capture_end()
    except BaseException:
        cuda: Any = torch._C
        for tidy in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            with suppress(RuntimeError, AttributeError):
                getattr(cuda, tidy)(index, pool)
        raise
    finally:
        random.graphsafe_set_state(own)
    torch.cuda.current_stream(device).wait_stream(stream)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Makes one stream for all captures: libraries keep memory for each that they ran on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Repeated(Generic[T]):
    """Runs a function as it is, and by one launch once it works where it did the last time.

    Attributes:
        is_captured: Whether the latest results came from a launch.
        why_not: Why it is not captured any more, in a few words; "" if nothing is known against it.
    """

    def __init__(self) -> None:
        """Has seen nothing yet."""
        self.is_captured = False
        self.why_not = ""
        self._captured: Captured[T] | None = None
        self._places: Sequence[object] = ()
        self._addresses: Sequence[int] = ()

    def __call__(
        self,
        function: Callable[[], T],
        places: Sequence[object],
        addresses: Sequence[int],
        device: torch.device,
    ) -> T:
        """Returns what the function does; launched results are overwritten by the next launch.

        Args:
            function: One and the same as long as places and addresses are.
            places: Objects that it works on, which are compared by identity.
            addresses: Of tensors that others may put elsewhere.
            device: Where all of them are.
        """
        same = len(places) == len(self._places) and all(
            a is b for a, b in zip(places, self._places, strict=True)
        )
        if not same or self.why_not or addresses != self._addresses:
            self.forget()
            # What is made at its first use is made now, outside of what is captured.
            self._places, self._addresses = places, addresses
            return function()
        if self._captured is None:
            try:
                self._captured = Captured(function, device)
            except NotCapturableError as error:
                self.why_not = str(error)
                return function()
        self.is_captured = True
        return self._captured.launch()

    @staticmethod
    def pays(device: torch.device, weights: int, room: int) -> bool:
        """Whether launches take longer than what they start, and there is memory to spare.

        Args:
            device: The device.
            weights: Bytes of the weights that are worked on.
            room: Bytes of all that is computed on the way, which is kept for good.
        """
        small = weights <= _LIGHT and room <= _ROOMY
        return small and 0 < _SHARE * (weights + room) <= Captured.free(device)

    def forget(self) -> None:
        """Lets go of what was captured, and of its memory."""
        self.is_captured = False
        self._captured, self._places, self._addresses = None, (), ()
