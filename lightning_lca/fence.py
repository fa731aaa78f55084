"""Side effects contained: whatever evaluating a loss may change is put back, bit for bit.

`fence` saves the random streams and everything the module holds, seeds the streams, and restores
all of it on the way out, whether the body succeeds or raises.
"""

from __future__ import annotations

import functools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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
_NOT_OURS = frozenset({"_trainer", "_fabric", "_hook_handles"})
# Objects of these packages are not walked into: a logger or a tokenizer is not module state.
_FOREIGN = frozenset(sys.stdlib_module_names) | {
    *("torch", "numpy", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics"),
    *("lightning_utilities", "lightning_lca", "tensorboard", "transformers", "tokenizers"),
}
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_MANY = 1000  # Items of longer containers are put back, but not looked into.


@contextmanager
def fence(
    *held: Any, seed: int, guard: Iterable[Tensor] = (), devices: Iterable[torch.device] = ()
) -> Iterator[None]:
    """Runs the body on seeded random streams and undoes what it does to modules and other values.

    Put back are: the random state of torch (CPU and the given devices), numpy and python; the
    generators, buffers and plain tensors held by modules; their attributes, training flags and the
    contents of their lists, dicts, sets, deques, arrays and plain objects; the ``guard`` tensors.

    Not put back: parameters other than ``guard``, hooks, and whatever lives outside the modules.

    Args:
        held: Modules that the body may change, or other values such as lists and generators.
        seed: Every random stream, those held by the modules included, starts from this number.
        guard: Further tensors to put back, such as frozen parameters that a forward writes to.
        devices: Accelerators whose random state the body may use.
    """
    memory = _Memory()
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
        for tensor in guard:
            memory.keep_tensor(tensor)
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

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self._reseed: list[Callable[[int], object]] = []
        self._seen: set[int] = set()

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
        if isinstance(value, nn.Parameter):
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            self.keep_tensor(value)
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
            saved = value.copy()
            self._undo.append(lambda: np.copyto(value, saved))
        elif not self._keep_generator(value):
            self._keep_object(value)

    def keep_tensor(self, tensor: Tensor) -> None:
        saved = tensor.detach().clone()

        def undo() -> None:
            # Through .data: neither version counters nor graphs that are still alive take notice.
            if tensor.shape == saved.shape:
                tensor.data.copy_(saved)
            else:
                tensor.data = saved

        self._undo.append(undo)

    def _keep_module(self, module: nn.Module) -> None:
        attributes = vars(module)
        self._keep_dict(attributes)
        for name, value in attributes.items():
            if name not in _TABLES and name not in _NOT_OURS and type(value) not in _ATOMS:
                self.keep(value)
        for name in _HELD_TABLES:
            self._keep_dict(attributes[name])
        for buffer in module._buffers.values():
            self.keep(buffer)
        for child in module._modules.values():
            self.keep(child)

    def _keep_dict(self, value: dict[Any, Any]) -> None:
        saved = dict(value)

        def undo() -> None:
            dict.clear(value)
            dict.update(value, saved)

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
        attributes = getattr(value, "__dict__", None)
        if type(attributes) is dict and type(value).__module__.partition(".")[0] not in _FOREIGN:
            self._keep_dict(attributes)
            self._keep_items(attributes.values())
