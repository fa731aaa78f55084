"""What is done again and again in the same places, without the Python around it.

Where a network is small, the host is busy for longer than the kernels that it launches. It is less
so where it goes through a list of operations. A CUDA graph holds the kernels and where their
numbers lie, and starts them all at the price of one launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_lca.measure.program import Operation, slots_in, tensors_in, with_slots, written

Tensors = tuple[Tensor, ...]

_LIGHT = 2**26  # Bytes of weights; what works on more keeps a device busy for longer than the host.
_ROOMY = 2**30  # Bytes of all that is computed on the way.
_SHARE = 8  # So many times that must be free: what is captured keeps its memory.


class NotCapturableError(Exception):
    """Why a device cannot run something without its host."""


class Captured:
    """A function of what lies in fixed places, as its device runs it without the host.

    No code of the function runs any more: nothing may depend on what it decides, and what it reads
    and writes must stay where it was.

    Attributes:
        results: What the function returned; every launch writes to the same tensors.
    """

    def __init__(self, function: Callable[[], Tensors], device: torch.device) -> None:
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
                self.results = function()
        except RuntimeError as error:
            raise NotCapturableError(str(error).strip().partition("\n")[0]) from error

    def launch(self) -> Tensors:
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


class Straight:
    """A function of what lies in fixed places, as the operations that it ran, one after the other.

    What holds for `Captured` holds here, but that results are new every time.

    Attributes:
        why_not: Why its operations alone are not the function; "" if they are.
    """

    def __init__(self, function: Callable[[], Tensors]) -> None:
        """Runs it, and notes its operations.

        Args:
            function: It must have run before, so that what it makes once is made.
        """
        with (noting := _Noting()):
            results = function()
        self.why_not = noting.why_not
        if not self.why_not:
            self._run = noting.written(results)
        self._results: Tensors | None = results

    def first(self) -> Tensors:
        """Returns what the function returned, once: it is not kept."""
        results, self._results = self._results, None
        assert results is not None
        return results

    def launch(self) -> Tensors:
        """Computes the results anew."""
        # As recordings are: some kernels ask whether gradients are on.
        with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
            return self._run()


_Dispatched: Any = TorchDispatchMode


class _Noting(_Dispatched):  # type: ignore[misc]
    """Notes the operations that run within, and what lies where before they do."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keeps torch from importing its compiler, which takes seconds, for this mode."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.why_not = ""
        self._operations: list[Operation] = []
        self._slots: Any = WeakTensorKeyDictionary()
        self._count = 0
        self._fixed: dict[int, Tensor] = {}  # By slot.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.why_not:
            return func(*args, **kwargs)
        template = with_slots(args, self._given)
        named = {k: with_slots(v, self._given) for k, v in kwargs.items()}
        result = func(*args, **kwargs)
        if isinstance(result, bool | int | float | complex):
            self.why_not = f"a number is read ({func})"
            return result
        outputs = with_slots(result, self._new, keep=False)
        operation = Operation(func, template, named, outputs)
        is_view = any(r.alias_info is not None for r in func._schema.returns)
        if is_view and not func._schema.is_mutable and self._is_fixed(operation):
            # A view of what lies in a fixed place is one itself.
            for slot, tensor in zip(slots_in(outputs), tensors_in(result), strict=True):
                self._fixed[slot] = tensor
        else:
            self._operations.append(operation)
        return result

    def written(self, results: Tensors) -> Callable[[], Tensors]:
        """Writes a function that runs them, and gives these results."""
        outputs = [self._given(r) for r in results]
        needed = {*outputs}
        kept: list[Operation] = []
        for operation in reversed(self._operations):
            if operation.function._schema.is_mutable or needed & {*slots_in(operation.outputs)}:
                kept.append(operation)
                needed |= {*slots_in([operation.args, operation.kwargs])}
        # Views of parameters are no part of anybody's graph.
        fixed = {s: t.detach() for s, t in self._fixed.items() if s in needed}
        return written(kept[::-1], outputs, fixed)

    def _given(self, tensor: Tensor) -> int:
        slot: int | None = self._slots.get(tensor)
        if slot is None:
            slot = self._new(tensor)
            self._fixed[slot] = tensor
        return slot

    def _new(self, tensor: Tensor) -> int:
        slot: int | None = self._slots.get(tensor)
        if slot is None:
            slot = self._slots[tensor] = self._count
            self._count += 1
        return slot

    def _is_fixed(self, operation: Operation) -> bool:
        return all(s in self._fixed for s in slots_in([operation.args, operation.kwargs]))


class Repeated:
    """Runs a function as it is, and without its Python once it works where it did the last time.

    Attributes:
        overwrites: Whether the latest results are overwritten by the next ones.
        why_not: Why it always runs as it is, in a few words; "" if nothing is known against it.
    """

    def __init__(self) -> None:
        """Has seen nothing yet."""
        self.overwrites = False
        self.why_not = ""
        self._captured: Captured | Straight | None = None
        self._places: Sequence[object] = ()
        self._addresses: Sequence[int] = ()
        self._has_failed = False

    def __call__(
        self,
        function: Callable[[], Tensors],
        places: Sequence[object],
        addresses: Sequence[int],
        device: torch.device,
        *,
        at_once: bool = False,
    ) -> Tensors:
        """Returns what the function does.

        Args:
            function: One and the same as long as places and addresses are.
            places: Objects that it works on, which are compared by identity.
            addresses: Of tensors that others may put elsewhere.
            device: Where all of them are.
            at_once: Launches all as one, if the device can.
        """
        same = len(places) == len(self._places) and all(
            a is b for a, b in zip(places, self._places, strict=True)
        )
        if not same or self.why_not or addresses != self._addresses:
            self.forget()
            # What is made at its first use is made now, outside of what is captured.
            self._places, self._addresses = places, addresses
            return function()
        if self._captured is None and at_once and not self._has_failed:
            try:
                self._captured, self.overwrites = Captured(function, device), True
            except NotCapturableError:
                self._has_failed = True
        if self._captured is None:
            straight = Straight(function)
            self.why_not = straight.why_not
            if not self.why_not:
                self._captured = straight
            return straight.first()
        return self._captured.launch()

    @staticmethod
    def pays(device: torch.device, weights: int, room: float) -> bool:
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
        self.overwrites = False
        self._captured, self._places, self._addresses = None, (), ()
