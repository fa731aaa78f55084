"""A loss and its gradient, recorded once as the operations that gave them, and evaluated elsewhere.

The user's code runs once, under a `Recorder`, which notes every operation below autograd: those of
the forward, of the backward pass, of checkpointing's second forward. A `Recording` runs the same
operations, in the same order and by the same kernels, on other weights: no code of the user runs,
no module is touched, and what nobody reads (metrics, running statistics) is left out.

What becomes a number in Python is fixed from then on: control flow, shapes, an epoch, ``.item()``.
Where a shape follows from the weights, a recording would be another function in silence: that is
refused here. All else is found by comparing with the user's code now and then (see `Probe`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_lca.measure.program import (
    Operation,
    Slot,
    slots_in,
    tensors_in,
    with_slots,
    written,
)

_ALIASES = ("aten.detach.default", "aten.alias.default", "aten.lift_fresh.default")
_FLIPS = ("aten.t.default", "aten.transpose.int")  # Done twice, they undo themselves.
_Number = bool | int | float | complex
# They change what a tensor is, and not what is in it.
_TURNS = ("t_", "transpose_", "squeeze_", "unsqueeze_", "as_strided_", "swapdims_", "swapaxes_")
_REPLACES = ("resize_", "set_", "resize_as_", "_resize_output_")
# They write to running statistics (arguments 3 and 4) where they normalise by the batch (5).
_NORMS = tuple(f"aten.{n}_batch_norm.default" for n in ("native", "cudnn", "miopen"))
_NORMS_BACKWARD = tuple(n.replace(".default", "_backward.default") for n in _NORMS)
_LIKE = re.compile(r"aten\.(ones_like|zeros_like|full_like|new_zeros|new_ones|new_full)\.")
_LITTLE = 2**16  # Bytes of a result that is kept in place of the operations that gave it.
# They may ask the device for a number; so may what is not torch's own.
_WAITS = re.compile(
    r"(?<![a-z])(linalg|cholesky|svd|eigh|lu|qr|solve|inverse|det|ctc|unique2?|nonzero|sparse"
    r"|masked_select|embedding_bag|embedding_renorm|bincount|histc|item|sort|segment)(?![a-z])"
)
_MASKS = (torch.bool, torch.uint8)
_WAITING = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
_COLLECTIVE = ("c10d", "_c10d_functional", "_dtensor")
_GOES_PAST = frozenset({"numpy", "tolist", "__array__", "__dlpack__"})


class NotRecordableError(Exception):
    """Why a loss cannot be recorded, in a few words."""


@dataclass
class _Operation(Operation):
    """What else is known of one."""

    reads: set[int]  # Memories of its arguments.
    gives: set[int]  # Memories of its results.
    writes: set[int]  # Memories that it writes to.
    is_random: bool
    waits: bool


@dataclass
class Recording:
    """Loss and gradient as a function of the weights.

    Attributes:
        operations: Number of operations of one evaluation.
        reads_numbers: Whether numbers were read from tensors that may change: they are fixed now.
        is_random: Whether it draws random numbers from the global streams.
        live: Tensors that it reads as they are at each evaluation.
        room: Bytes that all results of one evaluation take, and what it reads.
        devices: Where these are.
        waits: Whether the host may wait for the device on the way.
        dtype: torch's default while it is evaluated.
    """

    run: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
    operations: int
    reads_numbers: bool
    is_random: bool
    live: list[Tensor] = field(default_factory=list)
    room: int = 0
    devices: frozenset[torch.device] = frozenset()
    waits: bool = False
    _refresh: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    _generators: list[tuple[torch.Generator, Tensor]] = field(default_factory=list)

    @property
    def is_alone(self) -> bool:
        """Whether nothing but its operations takes part: no random stream, no other default."""
        is_random = self.is_random or bool(self._generators)
        return not is_random and self.dtype == torch.get_default_dtype()

    def stays_on(self, device: torch.device) -> bool:
        """Whether all of it is there, and the host takes no part."""
        return self.devices == {device} and self.is_alone and not self.waits

    def __call__(self, weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Evaluates loss [] and gradients [*shape].

        Random numbers are drawn from the global streams as they are: whoever calls seeds them.
        """
        default = torch.get_default_dtype()
        if default != self.dtype:
            torch.set_default_dtype(self.dtype)
        states = [(g, g.get_state()) for g, _ in self._generators]
        try:
            # Straight to the kernels that were recorded, where no graph is made. Some of them ask
            # whether gradients are on, to keep what the backward pass needs.
            with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
                for scratch, value in self._refresh:
                    scratch.copy_(value)
                for generator, state in self._generators:
                    generator.set_state(state)
                loss, *gradients = self.run(weights)
        finally:
            for generator, state in states:
                generator.set_state(state)
            if default != self.dtype:
                torch.set_default_dtype(default)
        return loss, gradients


_weak: Any = StorageWeakRef  # An address is not used again while there is such a reference.
_Dispatched: Any = TorchDispatchMode
_Functions: Any = TorchFunctionMode


class Recorder(_Dispatched):  # type: ignore[misc]
    """Notes the operations that run within it, until `finish` makes a recording of them.

    Example:
        >>> w, x = torch.ones(2, requires_grad=True), torch.tensor([1.0, 2.0])
        >>> with (recorder := Recorder([w])):
        ...     loss = (w * x).square().sum()
        ...     gradients = torch.autograd.grad(loss, w)
        >>> loss, (gradient,) = recorder.finish(loss, gradients)([torch.tensor([0.0, 3.0])])
        >>> loss.item(), gradient.tolist()
        (36.0, [0.0, 24.0])
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keeps torch from importing its compiler, which takes seconds, for this mode."""
        return False

    def __init__(self, weights: Sequence[Tensor], live: Iterable[Tensor] = ()) -> None:
        """Takes the weights that the loss is a function of.

        Args:
            weights: They become the arguments of the recording.
            live: Tensors whose values may change between evaluations, such as buffers: a recording
                reads them as they are then. Of all others it keeps what they held.
        """
        super().__init__()
        self._slots: Any = WeakTensorKeyDictionary()
        self._memories: dict[int, tuple[Any, int]] = {}  # By address.
        self._count_of_memories = 0
        self._memory_of: list[int] = []  # Of every slot.
        self._constants: dict[int, Tensor] = {}  # By slot.
        self._originals: dict[int, Tensor] = {}  # What was in those that were written to.
        self._settled: dict[int, Tensor] = {}  # Results, by slot, that are the same every time.
        self._live = {id(t) for t in live}
        self._kept_live = list(live)  # An id is unique while its owner lives.
        self._depends: set[int] = set()  # Memories that descend from the weights.
        self._varies: set[int] = set()  # And from live tensors.
        self._running: set[int] = set()  # Slots of running statistics.
        self._turned: set[int] = set()  # Memories of tensors whose shape was changed in place.
        self._operations: list[_Operation] = []
        self._generators: dict[int, tuple[torch.Generator, Tensor]] = {}
        self._reads_numbers = False
        self._room = 0
        self._devices: set[torch.device] = set()
        self._why: str | None = None
        self._reader = _Reader(self)
        self._count = len(weights)
        self._weights = list(weights)
        for weight in weights:
            if not _is_plain(weight) or weight.layout != torch.strided:
                raise NotRecordableError(f"a weight is a {type(weight).__name__}")
            self._depends.add(self._memory_of[self._add(weight)])
        self._trained = frozenset(self._depends)

    def __enter__(self) -> Any:
        entered = super().__enter__()
        self._reader.__enter__()
        return entered

    def __exit__(self, *error: Any) -> None:
        self._reader.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and notes it."""
        kwargs = kwargs or {}
        if self._why is not None:
            return func(*args, **kwargs)
        try:
            written = self._look(func, args, kwargs)
        except NotRecordableError as error:
            self._give_up(str(error))
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        try:
            self._note(func, args, kwargs, result, written)
        except NotRecordableError as error:
            self._give_up(str(error))
        return result

    def finish(self, loss: Tensor, gradients: Sequence[Tensor]) -> Recording:
        """Makes a recording that gives this loss and these gradients, which ran within.

        Raises:
            NotRecordableError: It would be another function than the one that ran.
        """
        if self._why is not None:
            raise NotRecordableError(self._why)
        results = [loss, *gradients]
        outputs = [self._slots.get(r) for r in results]
        if None in outputs:
            raise NotRecordableError("its loss or gradient was computed out of sight")
        return self._build(outputs)

    # -- noting -----------------------------------------------------------------------------------

    def _give_up(self, why: str) -> None:
        self._why = why
        self._operations, self._constants, self._originals, self._settled = [], {}, {}, {}

    def _add(self, tensor: Tensor, memory: int | None = None) -> int:
        slot = len(self._memory_of)
        self._slots[tensor] = slot
        self._devices.add(tensor.device)
        if memory is None and tensor.layout != torch.strided:
            memory = self._fresh()
        if memory is None:
            storage = _storage(tensor)
            known = self._memories.get(storage._cdata)
            memory = known[1] if known else self._fresh()
            if not known:
                self._memories[storage._cdata] = _weak(storage), memory
                self._room += storage.nbytes()
        self._memory_of.append(memory)
        return slot

    def _fresh(self) -> int:
        self._count_of_memories += 1
        return self._count_of_memories

    def _slot(self, tensor: Tensor) -> int:
        """Finds an argument's slot; what nobody computed here is a constant."""
        slot: int | None = self._slots.get(tensor)
        if slot is not None:
            return slot
        if not _is_plain(tensor):
            raise NotRecordableError(f"it computes with a {type(tensor).__name__}")
        known = None
        if tensor.layout == torch.strided:
            known = self._memories.get(_storage(tensor)._cdata)
        if known is not None and known[1] in self._depends:
            for number, weight in enumerate(self._weights):
                if _same(tensor, weight):
                    self._slots[tensor] = number
                    return number
            raise NotRecordableError("it reaches its own numbers by a way that is out of sight")
        slot = self._add(tensor)
        self._constants[slot] = tensor
        if id(tensor) in self._live:
            self._varies.add(self._memory_of[slot])
        return slot

    def _look(self, func: Any, args: Any, kwargs: Any) -> set[int]:
        """Finds the slots that an operation is about to write to."""
        if func.namespace in _COLLECTIVE:
            raise NotRecordableError("it talks to other processes")
        name = str(func)
        if name in _NORMS and args[5]:
            self._running.update(self._slot(a) for a in args[3:5] if a is not None)
        for value in kwargs.values():
            if isinstance(value, torch.Generator) and id(value) not in self._generators:
                self._generators[id(value)] = value, value.get_state()
        written: set[int] = set()
        schema = func._schema
        if not schema.is_mutable:
            return written
        kind = schema.name.partition("::")[2]
        if kind in _REPLACES:
            raise NotRecordableError(f"it calls {name}")
        named = [*zip(schema.arguments, args, strict=False)]
        named += [(a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs]
        for argument, value in named:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors_in(value):
                    slot = self._slot(tensor)
                    memory = self._memory_of[slot]
                    if memory in self._trained:
                        raise NotRecordableError("it writes to trained weights")
                    if kind in _TURNS:
                        if slot in self._constants:
                            raise NotRecordableError(f"it calls {name} on what it was given")
                        self._turned.add(memory)
                    written.add(slot)
        memories = {self._memory_of[slot] for slot in written}
        for slot, tensor in self._constants.items() if memories else ():
            if self._memory_of[slot] in memories and slot not in self._originals:
                self._originals[slot] = _copy(tensor)
        return written

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any, written: set[int]) -> None:
        name = str(func)
        slots = [self._slot(t) for t in tensors_in([args, kwargs])]
        reads = {self._memory_of[s] for s in slots}
        depends, varies = bool(reads & self._depends), bool(reads & self._varies)
        if _LIKE.match(name):  # Whatever is in what they are like.
            depends = varies = False
        if isinstance(result, _Number):
            self._reads_numbers |= depends or varies
            return
        tags = func.tags
        if any(self._depends_on(t) for t in _shaping(name, tags, args)):
            raise NotRecordableError(f"a shape follows from the weights ({name})")
        template = with_slots(args, self._slot)
        named = {k: with_slots(v, self._slot) for k, v in kwargs.items()}
        gives: set[int] = set()

        def place(tensor: Tensor) -> int:
            slot: int | None = self._slots.get(tensor)
            if slot is None:
                if not _is_plain(tensor):
                    raise NotRecordableError(f"it computes with a {type(tensor).__name__}")
                slot = self._add(tensor)
            gives.add(self._memory_of[slot])
            return slot

        outputs = with_slots(result, place, keep=False)
        writes = {self._memory_of[s] for s in written}
        if depends:
            self._depends |= gives | writes
        if varies:
            self._varies |= gives | writes
        is_random = torch.Tag.nondeterministic_seeded in tags
        if not (depends or varies or is_random or writes or kwargs.get("generator")):
            fresh = tensors_in(result)
            if all(t.layout == torch.strided and _storage(t).nbytes() <= _LITTLE for t in fresh):
                self._settled.update((self._slot(t), t) for t in fresh)
        self._operations.append(
            _Operation(
                func,
                template,
                named,
                outputs,
                reads,
                gives,
                writes,
                is_random,
                _waits(name, tags, args),
            )
        )

    def _depends_on(self, tensor: Tensor) -> bool:
        return self._memory_of[self._slot(tensor)] in self._depends

    # -- building ---------------------------------------------------------------------------------

    def _build(self, outputs: list[int]) -> Recording:
        needed = {self._memory_of[s] for s in outputs}
        kept: list[_Operation] = []
        for operation in reversed(self._operations):
            if operation.is_random or (operation.gives | operation.writes) & needed:
                kept.append(operation)
                needed |= operation.reads
        kept = self._unsettled(kept[::-1], outputs)
        turned = {s for s, memory in enumerate(self._memory_of) if memory in self._turned}
        kept, outputs = _shortened(kept, outputs, turned)
        refresh, constants = self._scratch(kept)
        return Recording(
            written(kept, outputs, constants, self._count),
            len(kept),
            self._reads_numbers,
            any(operation.is_random for operation in kept),
            [t for s, t in self._constants.items() if s in constants and self._is_read(s)],
            self._room,
            frozenset(self._devices),
            any(operation.waits for operation in kept),
            refresh,
            torch.get_default_dtype(),
            list(self._generators.values()),
        )

    def _unsettled(self, operations: list[_Operation], outputs: list[int]) -> list[_Operation]:
        """Leaves out those whose results are the same every time: these become constants."""
        touched = self._turned.union(*(o.writes for o in operations))
        touched |= {self._memory_of[slot] for slot in outputs}
        left = []
        for operation in operations:
            slots = slots_in(operation.outputs)
            is_settled = bool(slots) and all(slot in self._settled for slot in slots)
            if not is_settled or touched & (operation.reads | operation.gives):
                left.append(operation)
            else:
                self._constants.update((slot, self._settled[slot]) for slot in slots)
        self._settled = {}
        return left

    def _is_read(self, slot: int) -> bool:
        """Whether a recording reads a live tensor; what it is normalised by is no such."""
        return id(self._constants[slot]) in self._live and slot not in self._running

    def _scratch(
        self, kept: list[_Operation]
    ) -> tuple[list[tuple[Tensor, Tensor]], dict[int, Tensor]]:
        """Finds the constants that are left; those that are written to become scratch copies."""
        used = {slot for o in kept for slot in slots_in([o.args, o.kwargs])}
        constants = {s: t for s, t in self._constants.items() if s in used}
        written = set().union(*(o.writes for o in kept)) if kept else set()
        norms = (*_NORMS, *_NORMS_BACKWARD)
        read = set().union(*(o.reads for o in kept if str(o.function) not in norms))
        refresh = []
        for slot, tensor in constants.items():
            memory = self._memory_of[slot]
            if slot in self._running and memory not in read | written:
                constants[slot] = tensor.detach().clone()
                continue
            original, is_live = self._originals.get(slot), id(tensor) in self._live
            if memory not in written and slot not in self._running:
                if is_live:
                    constants[slot] = tensor.detach()
                else:
                    constants[slot] = _copy(tensor) if original is None else original
                continue
            if sum(self._memory_of[other] == memory for other in constants) > 1:
                raise NotRecordableError("it writes to memory that it reads in several ways")
            value = tensor.detach() if is_live or original is None else original
            constants[slot] = scratch = torch.empty_like(tensor).detach()
            refresh.append((scratch, value))
        return refresh, constants


class _Reader(_Functions):  # type: ignore[misc]
    """Notices numbers that leave tensors past the dispatcher."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _GOES_PAST and args and isinstance(args[0], Tensor):
            slot = self._recorder._slots.get(args[0])
            if slot is not None:
                memory, recorder = self._recorder._memory_of[slot], self._recorder
                recorder._reads_numbers |= memory in recorder._depends | recorder._varies
        return func(*args, **(kwargs or {}))


def _shortened(
    operations: list[_Operation], outputs: list[int], turned: set[int]
) -> tuple[list[_Operation], list[int]]:
    """Leaves out what gives what is there already, and what nobody uses then.

    Args:
        operations: In their order.
        outputs: The slots that are wanted.
        turned: Slots whose shape is changed in place: another name for one would not stay true.

    Returns:
        The operations that are left, and the slots that are what was wanted.
    """
    same: dict[int, int] = {}
    flipped: dict[int, tuple[int, Any]] = {}
    left: list[_Operation] = []
    for operation in operations:
        name, result = str(operation.function), operation.outputs
        args, kwargs = _renamed(operation.args, same), _renamed(operation.kwargs, same)
        if isinstance(result, Slot) and name in (*_ALIASES, *_FLIPS):
            source, how = args[0].number, (name, args[1:])
            if result.number != source and not turned & {source, result.number}:
                before = flipped.get(source)
                if name in _ALIASES:
                    same[result.number] = source
                    continue
                if before is not None and before[1] == how:
                    same[result.number] = before[0]
                    continue
                flipped[result.number] = source, how
        left.append(replace(operation, args=args, kwargs=kwargs))
    outputs = [same.get(slot, slot) for slot in outputs]
    used = set(outputs)
    needed: list[_Operation] = []
    for operation in reversed(left):
        if operation.is_random or operation.writes or used & {*slots_in(operation.outputs)}:
            needed.append(operation)
            used |= {*slots_in([operation.args, operation.kwargs])}
    return needed[::-1], outputs


def _renamed(value: Any, same: dict[int, int]) -> Any:
    """Puts other slots in the place of some."""
    if isinstance(value, Slot):
        return Slot(same.get(value.number, value.number))
    if isinstance(value, list | tuple):
        items = [_renamed(v, same) for v in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {k: _renamed(v, same) for k, v in value.items()}
    return value


def _shaping(name: str, tags: Any, args: Any) -> list[Tensor]:
    """Lists the tensors whose values, and not only their shapes, shape the result."""
    if name.startswith("aten.index."):
        return [t for t in tensors_in(args[1]) if t.dtype in _MASKS]
    if torch.Tag.dynamic_output_shape not in tags:
        return []
    by_the_rest = name.startswith(("aten.masked_select", "aten._ctc_loss"))
    return tensors_in(args[1:] if by_the_rest else args)


def _waits(name: str, tags: Any, args: Any) -> bool:
    """Whether the host may wait for the device in an operation."""
    if name.startswith(("aten.index.", "aten.index_put", "aten._index_put")):
        return any(t.dtype in _MASKS for t in tensors_in(args[1]))
    is_known = name.startswith("aten.") and not _WAITS.search(name)
    return not is_known or bool({*tags}.intersection(_WAITING))


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is one array of numbers, handled by torch alone."""
    dispatch = getattr(type(tensor), "__torch_dispatch__", None)
    own = getattr(Tensor, "__torch_dispatch__", None)
    return (
        dispatch in (own, None, torch._C._disabled_torch_dispatch_impl)
        and not tensor.is_nested
        and not tensor.is_quantized
    )


def _copy(tensor: Tensor) -> Tensor:
    """Copies a tensor, its strides included: another kernel may run on others."""
    copy = tensor.detach().clone()
    is_plain = tensor.layout == torch.strided and tensor.numel()
    if not is_plain or copy.stride() == tensor.stride():
        return copy
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    memory = tensor.detach().as_strided((span,), (1,)).clone()
    return memory.as_strided(tensor.shape, tensor.stride(), 0)


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same view of the same memory."""
    return (
        (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        and a.storage_offset() == b.storage_offset()
        and _storage(a)._cdata == _storage(b)._cdata
    )
