"""Side effects contained: whatever evaluating a loss may change is put back, bit for bit.

`fence` saves the random streams and everything the module holds, seeds the streams, and restores
all of it on the way out, whether the body succeeds or raises.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import types
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as _everywhere

# Values that cannot change in place: never worth a look.
_ATOMS = frozenset(
    {
        *(int, float, complex, bool, str, bytes, type, range, slice, type(None), type(...)),
        *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType),
        *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, frozenset),
    }
)
# nn.Module's own tables; the hook tables among them are left alone.
_TABLES = frozenset(vars(nn.Module()))
_HELD_TABLES = ("_parameters", "_buffers", "_modules")
_FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_NOT_OURS = frozenset({"_trainer", "_fabric", "_hook_handles"})
# Objects of these packages are not walked into: a logger or a tokenizer is not module state.
_FOREIGN = frozenset(sys.stdlib_module_names) | {
    *("torch", "numpy", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics"),
    *("lightning_utilities", "lightning_lca", "tensorboard", "transformers", "tokenizers"),
}
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_PLAIN = (types.SimpleNamespace, argparse.Namespace, UserDict, UserList)
_MANY = 1000  # Items of longer containers are put back, but not looked into.


@contextmanager
def fence(
    *held: Any, seed: int, spare: Iterable[Tensor] = (), devices: Iterable[torch.device] = ()
) -> Iterator[None]:
    """Runs the body on seeded random streams and undoes what it does to modules and other values.

    Put back are: the random state of torch (CPU and the given devices), numpy and python; the
    generators, parameters, buffers and plain tensors held by modules; their attributes, training
    flags and the contents of their lists, dicts, sets, deques, arrays and plain objects.

    The same holds for what the modules' forward hooks hold: closures, owners, arguments.

    Not put back: the values of ``spare`` tensors, hooks, and whatever lives outside the modules.

    Args:
        held: Modules that the body may change, or other values such as lists and generators.
        seed: Every random stream, those held by the modules included, starts from this number.
        spare: Tensors that need no copy, since someone else keeps one or nobody writes to them;
            only whether they require grad is put back.
        devices: Accelerators whose random state the body may use.
    """
    memory = _Memory(spare)
    accelerators = [d for d in devices if d.type in ("cuda", "mps")]
    states = [_device_random(d).get_rng_state(*_index(d)) for d in accelerators]
    torch_state, numpy_state, python_state = (
        torch.random.get_rng_state(),
        np.random.get_state(legacy=False),
        random.getstate(),
    )
    try:
        for value in held:
            memory.keep(value)
        memory.seed_generators(seed)
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        for device in accelerators:
            with torch.cuda.device(device) if device.type == "cuda" else _nothing():
                _device_random(device).manual_seed(seed)
        yield
    finally:
        memory.restore()
        for device, state in zip(accelerators, states, strict=True):
            _device_random(device).set_rng_state(state, *_index(device))
        torch.random.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _device_random(device: torch.device) -> Any:
    return getattr(torch, device.type)


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return (device,) if device.type == "cuda" else ()


class _Memory:
    """Remembers mutable values as functions that undo what happens to them."""

    def __init__(self, spare: Iterable[Tensor]) -> None:
        self._undo: list[Callable[[], object]] = []
        self._reseed: list[Callable[[int], object]] = []
        self._seen: set[int] = set()
        self._spare = {id(tensor) for tensor in spare}

    def restore(self) -> None:
        for undo in reversed(self._undo):
            undo()

    def seed_generators(self, seed: int) -> None:
        for reseed in self._reseed:
            reseed(seed % 2**32)

    def keep(self, value: Any) -> None:
        """Remembers one value and what it holds; immutable and foreign values pass."""
        if type(value) in _ATOMS or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            self._keep_tensor(value)
        elif isinstance(value, nn.Module):
            self._keep_module(value)
        elif isinstance(value, dict):
            self._keep_dict(value)
            self._keep_items(value.values())
        elif isinstance(value, list | set | deque):
            self._keep_collection(value)
            self._keep_items(value)
        elif isinstance(value, tuple):
            self._keep_items(value)
        elif isinstance(value, np.ndarray):
            self._undo.append(functools.partial(np.copyto, value, value.copy()))
        elif not self._keep_generator(value):
            self._keep_object(value)

    def _keep_tensor(self, tensor: Tensor) -> None:
        # Through .data: neither version counters nor graphs that are still alive take notice.
        needs_grad, alias = tensor.requires_grad, tensor.data
        spare = id(tensor) in self._spare
        whole = _memory_of(alias)
        saved = None if spare else whole.detach().clone()
        gradient = tensor.grad if tensor.is_leaf and not spare else None
        if gradient is not None:
            self.keep(gradient)

        def undo() -> None:
            if saved is not None and whole.layout == torch.strided:
                whole.copy_(saved)
            if saved is not None and (not _same_place(tensor, alias)):
                tensor.data = alias if whole.layout == torch.strided else saved
            if tensor.is_leaf and not spare:
                tensor.grad = gradient
            if tensor.requires_grad != needs_grad and tensor.is_leaf:
                tensor.requires_grad_(needs_grad)

        self._undo.append(undo)

    def _keep_module(self, module: nn.Module) -> None:
        attributes = vars(module)
        self._keep_dict(attributes)
        for name, value in attributes.items():
            if name not in _TABLES and name not in _NOT_OURS and type(value) not in _ATOMS:
                self.keep(value)
        for name in _HELD_TABLES:
            self._keep_dict(attributes[name])
            for value in attributes[name].values():
                self.keep(value)
        for name in _FORWARD_HOOKS:
            for hook in attributes.get(name, {}).values():
                self._keep_function(hook)

    def _keep_function(self, value: Any) -> None:
        """Remembers what a hook holds: it may count, or collect what passes by."""
        if isinstance(value, functools.partial):
            self.keep(value.args)
            self.keep(value.keywords)
            self._keep_function(value.func)
        elif isinstance(value, types.MethodType):
            self.keep(value.__self__)
        elif not isinstance(value, types.FunctionType):
            self.keep(value)
        elif id(value) not in self._seen and _is_ours(value):
            self._seen.add(id(value))
            self._keep_dict(vars(value))
            self._keep_items([*vars(value).values(), *(value.__defaults__ or ())])
            for cell in value.__closure__ or ():
                self._keep_cell(cell)

    def _keep_cell(self, cell: types.CellType) -> None:
        try:
            inside = cell.cell_contents
        except ValueError:  # Not filled yet.
            return
        self._undo.append(functools.partial(setattr, cell, "cell_contents", inside))
        if isinstance(inside, types.FunctionType | types.MethodType | functools.partial):
            self._keep_function(inside)
        else:
            self.keep(inside)

    def _keep_dict(self, value: dict[Any, Any]) -> None:
        saved = list(value.items())
        # The type's own methods: a subclass may do more when an item is set.
        kind = OrderedDict if isinstance(value, OrderedDict) else dict

        def undo() -> None:
            kind.clear(value)
            for key, item in saved:
                kind.__setitem__(value, key, item)

        self._undo.append(undo)

    def _keep_collection(self, value: list[Any] | set[Any] | deque[Any]) -> None:
        saved = list(value)

        def undo() -> None:
            value.clear()
            if isinstance(value, set):
                value.update(saved)
            else:
                value.extend(saved)

        self._undo.append(undo)

    def _keep_items(self, items: Any) -> None:
        if len(items) <= _MANY:
            for item in items:
                self.keep(item)

    def _keep_generator(self, value: Any) -> bool:
        saved: Any
        undo: Callable[[Any], object]
        reseed: Callable[[int], object]
        if isinstance(value, torch.Generator):
            saved, undo, reseed = value.get_state(), value.set_state, value.manual_seed
        elif isinstance(value, random.SystemRandom):
            return True  # It has no state.
        elif isinstance(value, random.Random):
            saved, undo, reseed = value.getstate(), value.setstate, value.seed
        elif isinstance(value, np.random.RandomState):
            saved, undo, reseed = value.get_state(legacy=False), value.set_state, value.seed
        elif isinstance(value, np.random.Generator):
            bits = value.bit_generator
            saved = bits.state
            undo = functools.partial(setattr, bits, "state")
            reseed = lambda seed: setattr(bits, "state", type(bits)(seed).state)  # noqa: E731
        else:
            return False
        self._undo.append(functools.partial(undo, saved))
        self._reseed.append(reseed)
        return True

    def _keep_object(self, value: Any) -> None:
        """Remembers the attributes of a plain object, e.g. a hand-written running average."""
        kind = type(value)
        if not _is_ours(kind) and not isinstance(value, _PLAIN):
            return
        attributes = getattr(value, "__dict__", None)
        if type(attributes) is dict:
            self._keep_dict(attributes)
            self._keep_items(attributes.values())
        slots = {s for cls in kind.__mro__ for s in _as_tuple(vars(cls).get("__slots__", ()))}
        held = {s: getattr(value, s) for s in slots if hasattr(value, s)}
        if held:
            self._undo += [functools.partial(object.__setattr__, value, *i) for i in held.items()]
            self._keep_items(held.values())


def _is_ours(kind: Any) -> bool:
    """Whether a class or function is neither of the standard library nor of a known package."""
    return (kind.__module__ or "").partition(".")[0] not in _FOREIGN


def _as_tuple(slots: Any) -> tuple[str, ...]:
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _memory_of(tensor: Tensor) -> Tensor:
    """Shows what must be copied to keep a tensor: its memory, if its elements share places."""
    if tensor.layout != torch.strided or 0 not in tensor.stride():
        return tensor
    size = tensor.untyped_storage().nbytes() // max(1, tensor.element_size())
    return tensor.as_strided((size,), (1,), 0)


def _same_place(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same view of the same memory."""
    return (
        a.layout == b.layout == torch.strided
        and (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        and a.data_ptr() == b.data_ptr()
    )


_Owner = tuple[Any, tuple[str, ...]]  # Who has tables of hooks, and their names.
_OF_PARAMETERS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_OF_MODULES = ("_backward_hooks", "_backward_pre_hooks")
_OF_ALL_MODULES = ("_global_backward_hooks", "_global_backward_pre_hooks")


@contextmanager
def no_gradient_hooks(module: nn.Module) -> Iterator[None]:
    """Runs the body without hooks on the gradients of parameters and modules.

    Those that are registered within the body are dropped at its end. Hooks on other tensors, which
    a forward registers on its way, stay.
    """
    # The tables are private. They are emptied in place: handles and autograd hold on to them.
    owners: list[_Owner] = [(_everywhere, _OF_ALL_MODULES)]
    for m in module.modules():  # Once for both: walking large modules takes its time.
        owners.append((m, _OF_MODULES))
        owners += [(p, _OF_PARAMETERS) for p in m._parameters.values() if p is not None]
    saved = [(table, dict(table)) for table in _tables(owners)]
    for table, _ in saved:
        table.clear()
    try:
        yield
    finally:
        for table in _tables(owners):
            table.clear()
        for table, hooks in saved:
            table.update(hooks)


def drop_gradient_hooks(weights: Iterable[Tensor]) -> None:
    """Takes all hooks off the gradients of weights."""
    for table in _tables([(w, _OF_PARAMETERS) for w in weights]):
        table.clear()


def _tables(owners: list[_Owner]) -> list[MutableMapping[int, Any]]:
    """Lists the tables that have entries."""
    tables = (getattr(owner, name, None) for owner, names in owners for name in names)
    return [table for table in tables if table]
