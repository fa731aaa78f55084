"""Side effects contained: whatever evaluating a loss may change is put back, bit for bit.

A `Fence` saves the random streams and everything that the held values reach, seeds the streams, and
restores all of it on the way out, whether the body succeeds or raises.
"""

from __future__ import annotations

import argparse
import array
import builtins
import contextvars
import ctypes
import dis
import functools
import gc
import io
import mmap
import operator
import os
import random
import sys
import threading
import types
import weakref
from collections import ChainMap, OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as _everywhere
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_lca.probe.guards import is_copied, needs_none, stand_in
from lightning_lca.runtime.lightnings import MisconfigurationException

# Values that cannot change in place and hold nothing: never worth a look.
_SIMPLE = (int, float, complex, bool, str, bytes, type(None))
_ATOMS = frozenset(
    {
        *(
            *_SIMPLE,
            range,
            slice,
            type(...),
            type(NotImplemented),
            types.ModuleType,
            types.CodeType,
        ),
        *(types.GetSetDescriptorType, types.MemberDescriptorType, types.MappingProxyType),
        *(weakref.ProxyType, weakref.CallableProxyType),
        *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
    }
)
# nn.Module's own tables; the hook tables among them are left alone.
_TABLES = frozenset(vars(nn.Module()))
_HELD_TABLES = ("_parameters", "_buffers", "_modules")
_FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_OF_FORWARD_HOOKS = (
    *("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs"),
    "_forward_hooks_always_called",
)
_OF_ALL_FORWARDS = ("_global_forward_pre_hooks", "_global_forward_hooks")
_NOT_OURS = frozenset({"_trainer", "_fabric", "_hook_handles"})
_LIGHTNING = ("pytorch_lightning", "lightning")
# Objects of these packages are not walked into: a logger or a tokenizer is not module state.
_FOREIGN = frozenset(sys.stdlib_module_names) | {
    *("torch", "numpy", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics"),
    *("lightning_utilities", "lightning_lca", "tensorboard", "transformers", "tokenizers"),
    *("matplotlib", "PIL", "tqdm", "rich", "wandb", "mlflow", "comet_ml", "neptune", "google"),
    *("_pytest", "pytest", "IPython", "ipykernel", "ray", "requests", "urllib3"),
}
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_SCALER: Any = getattr(torch.amp, "GradScaler", None) or torch.cuda.amp.GradScaler
_DATA = (DataLoader, Dataset, Sampler)
_OF_C: Any = (ctypes._SimpleCData, ctypes.Structure, ctypes.Union, ctypes.Array)
# Objects of foreign packages that are walked into all the same.
_PLAIN = (
    *(types.SimpleNamespace, argparse.Namespace, UserDict, UserList, ChainMap, threading.local),
    *(weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet),
    *(LRScheduler, ReduceLROnPlateau, _SCALER, *_DATA),
)
_LARGE = 2**16  # Bytes of a tensor that is not copied where it is not the module's own.
_MAPPED = 2**28  # Bytes of a file in memory that is not copied.
_MISSING = object()
_DEEPEST = 9  # Tuples within tuples that are searched for what cannot be put back.


class Fence:
    """Runs one body after the other on seeded random streams, and undoes what each does.

    What is reached is looked at once, when the fence is made: nothing but its bodies may change any
    of it up to the end of the last one. Put back are: the random state of torch (CPU and the given
    devices), numpy and python; the variables of the environment and of the context; and of
    the held values their tensors, arrays, generators, attributes, slots and containers; what their
    functions and methods hold (closures, defaults, owners) and the globals that they name; the
    attributes of the user's classes; optimizers' settings and schedulers.

    Of a Trainer: its own simple values and those of its loops, its optimizers and schedulers,
    the attributes of other callbacks, and the datamodule.

    What nobody can put back, such as an open file or the iterator of a loader, is replaced by a
    guard while a body runs: using it raises, and says what to do.

    Not put back: the values of ``spare`` tensors, hooks on gradients, the inside of foreign
    packages' objects and modules, and whatever lives outside the process. Large tensors that are
    not the module's own (an optimizer's state, data) are not copied, but watched.
    """

    def __init__(
        self,
        *held: Any,
        spare: Iterable[Tensor] = (),
        devices: Iterable[torch.device] = (),
        apart: Iterable[Any] = (),
    ) -> None:
        """Looks at all that is reached.

        Args:
            held: Modules that a body may change, a Trainer, or other values.
            spare: Tensors that need no copy, since someone else keeps one or nobody writes to them;
                only whether they require grad is put back.
            devices: Accelerators whose random state a body may use.
            apart: Objects that are not looked into, e.g. the callback that measures.
        """
        self._memory = memory = _Memory(spare, apart)
        try:
            self._streams = memory.keep_streams(devices)
            memory.keep_environment()
            for value in held:
                memory.keep(value)
            memory.walk()
        except BaseException:
            memory.restore()
            raise

    @property
    def lasts(self) -> bool:
        """Whether it may run another body: what undoes the first is not used up by that."""
        return self._memory.lasts

    @contextmanager
    def around(self, seed: int) -> Iterator[None]:
        """Runs a body, and undoes what it does.

        Args:
            seed: Every random stream, those that are reached included, starts from this number.

        Raises:
            MisconfigurationException: The body used, or changed, what cannot be put back.
        """
        memory = self._memory
        try:
            memory.seed_generators(seed)
            for seed_stream in self._streams:
                seed_stream(seed)
            memory.put_guards()
            yield
        except BaseException as error:
            failure = memory.restore()
            if failure is not None and hasattr(error, "add_note"):
                error.add_note(str(failure))
            raise
        failure = memory.restore()
        if failure is not None:
            raise failure


def fence(
    *held: Any,
    seed: int,
    spare: Iterable[Tensor] = (),
    devices: Iterable[torch.device] = (),
    apart: Iterable[Any] = (),
) -> AbstractContextManager[None]:
    """Runs one body within a `Fence`."""
    return Fence(*held, spare=spare, devices=devices, apart=apart).around(seed)


_Path = tuple[
    Any, str, Any
]  # Of whom it is a part (None: of nobody), how that is written, its name.
_Put = Callable[[Any], object]
_Stream = tuple[Callable[[], object], Callable[[int], object]]


def _root(name: str) -> _Path:
    return None, "{1}", name


def _attribute(owner: _Path, name: Any) -> _Path:
    return owner, "{0}[{1}]" if str(name).isdigit() else "{0}.{1}", name


def _item(owner: _Path, key: Any) -> _Path:
    return owner, "{0}[{1!r}]" if type(key) in _SIMPLE else "{0}[...]", key


def _variable(owner: _Path, name: Any) -> _Path:
    return owner, "the variable {1} of {0}", name


def _written(path: _Path) -> str:
    """Writes a path as the user would, e.g. ``self.streams[0]``."""
    parts = [path]
    while parts[-1][0] is not None:
        parts.append(parts[-1][0])
    text = ""
    for _, form, name in reversed(parts):
        text = form.format(text, name)
    return text


class _Memory:
    """Remembers mutable values as functions that undo what happens to them.

    Values are looked at in the order of their distance, by a list of what is left to do: there is
    no depth that is too deep. Those that are not the module's own come last, and lightly: of them,
    large tensors are not copied.

    Attributes:
        lasts: Whether all of it can be undone again, after another body.
    """

    def __init__(self, spare: Iterable[Tensor], apart: Iterable[Any]) -> None:
        self.lasts = True
        self._undo: list[tuple[Callable[[], object], _Path]] = []
        self._checks: list[Callable[[], str | None]] = []
        self._reseed: list[Callable[[int], object]] = []
        self._guards: list[Callable[[], object]] = []  # Called before a body runs.
        self._stand_ins: dict[int, Any] = {}
        self._seen: dict[int, Any] = {id(value): value for value in apart}  # Alive: ids stay.
        self._names: set[tuple[int, str]] = set()  # Of namespaces.
        self._todo: deque[tuple[Any, _Path]] = deque()
        self._later: deque[tuple[Any, _Path]] = deque()
        self._lightly = False
        self._home: set[str] = set()  # Packages of the held modules.
        self._spare = {id(tensor) for tensor in spare}

    # -- the fence's steps ------------------------------------------------------------------------

    def keep_streams(self, devices: Iterable[torch.device]) -> list[Callable[[int], object]]:
        """Remembers the random streams of this process; returns what seeds them."""
        path = _root("the random state")
        self._undo += [
            (functools.partial(random.setstate, random.getstate()), path),
            (functools.partial(np.random.set_state, np.random.get_state(legacy=False)), path),
        ]
        streams = _torch_streams(devices)
        self._undo += [(undo, path) for undo, _ in streams]
        return [lambda seed: np.random.seed(seed % 2**32), random.seed, *(s for _, s in streams)]

    def keep_environment(self) -> None:
        """Remembers the variables of the environment, and those of the context that are set."""
        context, saved = contextvars.copy_context(), _environment()

        def undo() -> None:
            if _environment() != saved:
                os.environ.clear()
                os.environ.update({os.fsdecode(n): os.fsdecode(v) for n, v in saved.items()})

        def undo_context() -> None:
            for variable, value in context.items():
                if variable.get() is not value:
                    variable.set(value)

        self._undo.append((undo, _root("the environment")))
        self._undo.append((undo_context, _root("a context variable")))

    def keep(self, value: Any) -> None:
        """Remembers one value and, once all are known, what they reach."""
        if isinstance(value, nn.Module):
            roots = {(c.__module__ or "").partition(".")[0] for c in type(value).__mro__}
            self._home |= roots - _FOREIGN
            for name in _OF_ALL_FORWARDS:
                for hook in getattr(_everywhere, name, {}).values():
                    self._push(hook, _root("a hook on all modules"))
            self._push(value, _root("self"))
        elif _is_trainer(value):
            self._seen[id(value)] = value
            self._keep_trainer(value)
        else:
            self._push(value, _root(type(value).__name__))

    def walk(self) -> None:
        """Looks at all that is reached."""
        collects = gc.isenabled()
        gc.disable()  # It would go over all that is remembered, again and again.
        try:
            while self._todo or self._later:
                self._lightly = not self._todo
                value, path = (self._todo or self._later).popleft()
                if id(value) not in self._seen:
                    self._seen[id(value)] = value
                    # What cannot even be read, nobody can put back.
                    with suppress(Exception):
                        self._look_at(value, path)
        finally:
            self._lightly = False
            if collects:
                gc.enable()

    def seed_generators(self, seed: int) -> None:
        """Starts every generator that was found from one number."""
        for reseed in self._reseed:
            reseed(seed % 2**32)

    def put_guards(self) -> None:
        """Puts stand-ins where somebody holds what cannot be put back, and watches optimizers."""
        for put in self._guards:
            put()

    def restore(self) -> BaseException | None:
        """Undoes everything it can; returns the first thing that went wrong, or None."""
        failure: BaseException | None = None
        for check in self._checks:
            text = check()
            if text is not None and failure is None:
                failure = MisconfigurationException(text)
        for undo, path in reversed(self._undo):
            try:
                undo()
            except Exception as error:
                if failure is None:
                    failure = MisconfigurationException(
                        f"The loss changed {_written(path)}, and this could not be put back: "
                        f"{type(error).__name__}: {error}. Training would go on with what the "
                        "measurement left. Give a loss that leaves it alone: "
                        "LCACallback(loss_fn=lambda module, batch: ...)."
                    )
                    failure.__cause__ = error
            except BaseException as error:  # Ctrl-C: later.
                failure = error
        return failure

    # -- one value after the other ----------------------------------------------------------------

    def _push(self, value: Any, path: _Path) -> None:
        if type(value) not in _ATOMS and id(value) not in self._seen:
            (self._later if self._lightly else self._todo).append((value, path))

    def _visit(self, value: Any, path: _Path, put: _Put) -> None:
        """Takes what somebody holds, who can be made to hold something else."""
        if type(value) in _ATOMS:
            return
        other = self._stand_in(value, path)
        if other is not value:
            self._guards.append(functools.partial(put, other))
        self._push(value, path)

    def _stand_in(self, value: Any, path: _Path, depth: int = 0) -> Any:
        kind: Any = type(value)
        if kind is not tuple and needs_none(kind):
            return value
        if id(value) in self._stand_ins:
            return self._stand_ins[id(value)]
        if kind is tuple and depth < _DEEPEST and not _plain(value):
            parts = [self._stand_in(v, _item(path, i), depth + 1) for i, v in enumerate(value)]
            same = all(map(operator.is_, parts, value))
            return value if same else self._stand_ins.setdefault(id(value), tuple(parts))
        other = stand_in(value, functools.partial(_written, path), _is_ours)
        if is_copied(value):  # The body takes items from the copy.
            self.lasts = False
        if other is not value:
            self._stand_ins[id(value)] = other
        return other

    def _look_at(self, value: Any, path: _Path) -> None:
        if id(value) in self._stand_ins and type(value) is not tuple:
            if is_copied(value):
                self._push(value.__reduce__()[1], path)
        elif isinstance(value, Tensor):
            self._keep_tensor(value, path)
        elif isinstance(value, nn.Module):
            self._keep_module(value, path)
        elif isinstance(value, type):
            self._keep_class(value)
        elif isinstance(value, types.FunctionType):
            self._keep_function(value, path)
        elif isinstance(value, functools.partial):
            self._keep_partial(value, path)
        elif isinstance(value, Optimizer):
            self._keep_optimizer(value, path)
        elif not self._keep_container(value, path) and not self._keep_state(value, path):
            for name in ("__self__", "__func__", "func", "fget", "fset", "fdel", "__wrapped__"):
                if type(value).__module__ in ("builtins", "functools", "types"):
                    self._push(getattr(value, name, None), path)
            if isinstance(value, weakref.ref):
                self._push(value(), path)
            elif type(value).__name__ == "LightningOptimizer":
                self._push(value.optimizer, path)
            self._keep_object(value, path)

    def _keep_container(self, value: Any, path: _Path) -> bool:
        if isinstance(value, dict):
            self._keep_dict(value, path, _item)
            self._push(getattr(value, "default_factory", None), path)
        elif isinstance(value, list):
            self._keep_list(value, path)
        elif isinstance(value, deque):
            saved = list(value)
            self._undo.append((functools.partial(_undo_deque, value, saved), path))
            self._visit_items(enumerate(saved), saved, path, functools.partial(_put_item, value))
        elif isinstance(value, set):
            items = set.copy(value)
            self._undo.append((functools.partial(_undo_set, value, items), path))
            pairs = ((i, i) for i in items)
            self._visit_items(pairs, items, path, functools.partial(_put_member, value))
        elif isinstance(value, tuple | frozenset):
            if not _plain(value):
                for i, item in enumerate(value):
                    self._push(item, _item(path, i))
        else:
            return False
        if _is_ours(type(value)):
            self._keep_object(value, path)
        return True

    def _keep_dict(
        self,
        value: dict[Any, Any],
        path: _Path,
        part: Callable[[_Path, Any], _Path],
        but: Iterable[str] = (),
    ) -> None:
        # The type's own methods: a subclass may do more when an item is set.
        kind = OrderedDict if isinstance(value, OrderedDict) else dict
        keys, items = list(kind.keys(value)), list(kind.values(value))
        if not keys:  # As most tables of a module are.
            self._undo.append((lambda: kind.clear(value) if kind.__len__(value) else None, path))
            return

        def undo() -> None:
            # In place where it can be: a thread of the user's may be reading.
            if len(value) == len(keys) and all(map(operator.is_, kind.keys(value), keys)):
                now = list(kind.values(value))
            else:
                kind.clear(value)
                now = [_MISSING] * len(keys)
            for key, item, found in zip(keys, items, now, strict=True):
                if found is not item:
                    kind.__setitem__(value, key, item)

        self._undo.append((undo, path))
        if not _plain(keys):
            for key in keys:
                self._push(key, path)
        pairs = ((k, i) for k, i in zip(keys, items, strict=True) if k not in but)
        self._visit_items(pairs, items, path, functools.partial(kind.__setitem__, value), part)

    def _keep_list(self, value: list[Any], path: _Path) -> None:
        saved = list.copy(value)

        def undo() -> None:
            if list.__len__(value) != len(saved) or not all(
                map(operator.is_, list.__iter__(value), saved)
            ):
                list.__setitem__(value, slice(None), saved)

        self._undo.append((undo, path))
        put = functools.partial(list.__setitem__, value)
        self._visit_items(enumerate(saved), saved, path, put)

    def _visit_items(
        self,
        pairs: Iterable[tuple[Any, Any]],
        items: Iterable[Any],
        path: _Path,
        put: Callable[[Any, Any], object],
        part: Callable[[_Path, Any], _Path] = _item,
    ) -> None:
        if _plain(items):
            return
        for key, item in pairs:
            kind = type(item)
            if kind in _ATOMS or (kind is tuple and _plain(item)):
                continue
            where = part(path, key)
            other = self._stand_in(item, where)
            if other is not item:
                self._guards.append(functools.partial(put, key, other))
            self._push(item, where)

    def _keep_state(self, value: Any, path: _Path) -> bool:
        """Remembers what has a state of its own: arrays, buffers, generators."""
        undo: Callable[[], object]
        if isinstance(value, np.ndarray):
            self._keep_array(value, path)
            return True
        if isinstance(value, bytearray | array.array):
            saved = value[:]
            undo = functools.partial(operator.setitem, value, slice(None), saved)
            self._undo.append((lambda: None if value == saved else undo(), path))
            return True
        if isinstance(value, mmap.mmap):
            if len(value) <= _LARGE:
                written = value[:]
                undo = functools.partial(operator.setitem, value, slice(None), written)
                self._undo.append((lambda: None if value[:] == written else undo(), path))
            return True
        if type(value).__module__ == "multiprocessing.sharedctypes":
            value = value.get_obj()
        if isinstance(value, _OF_C):
            held = ctypes.string_at(ctypes.addressof(value), ctypes.sizeof(value))
            undo = functools.partial(ctypes.memmove, ctypes.addressof(value), held, len(held))
            self._undo.append((lambda: None if bytes(value) == held else undo(), path))
            return True
        if type(value) in (io.StringIO, io.BytesIO):
            if not value.closed:
                undo = functools.partial(value.__setstate__, value.__getstate__())
                self._undo.append((undo, path))
            return True
        if type(value).__module__.startswith("pandas.") and hasattr(value, "_mgr"):
            # Private: there is no other way to put a table back in place.
            manager, copied = value._mgr, value.copy(deep=True)._mgr
            kept = functools.partial(object.__setattr__, value, "_mgr")
            same = functools.partial(_same_table, manager, copied)
            self.lasts = False  # The copy may take the table's place.
            self._undo.append((lambda: kept(manager if same() else copied), path))
            return True
        if type(value) is functools._lru_cache_wrapper:
            self._keep_cache(value, path)
            return True
        if _is_database(value):
            self._undo.append((_kept_transaction(value), path))
            self.lasts = False
            return True
        return self._keep_generator(value, path)

    def _keep_cache(self, value: Any, path: _Path) -> None:
        """Remembers what a function with a cache has in it: results may be random, or a state."""
        self._push(value.__wrapped__, path)
        # Its table is out of Python's reach, but not of the collector's.
        reached = [r for r in gc.get_referents(value) if type(r) not in _ATOMS]
        table: dict[Any, Any] = next(r for r in reached if type(r) is dict and r is not vars(value))
        known = dict(table)
        has_order = value.cache_info().maxsize is not None  # Kept beside the table.

        def undo() -> None:
            for key in table.keys() - known.keys():
                del table[key]
            if not has_order:
                table.update(known)

        self._undo.append((undo, path))
        for part in (*reached, *(() if has_order else known.values())):
            if part is not table:
                self._push(part, path)

    def _keep_generator(self, value: Any, path: _Path) -> bool:
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
        elif isinstance(value, np.random.Generator | np.random.BitGenerator):
            bits: Any = getattr(value, "bit_generator", value)
            saved = bits.state
            undo = functools.partial(setattr, bits, "state")
            reseed = lambda seed: setattr(bits, "state", type(bits)(seed).state)  # noqa: E731
        else:
            return False
        self._undo.append((functools.partial(undo, saved), path))
        self._reseed.append(reseed)
        if _is_ours(type(value)):
            self._keep_object(value, path)
        return True

    def _keep_array(self, value: np.ndarray[Any, Any], path: _Path) -> None:
        if not value.flags.writeable:
            return
        if (self._lightly and value.nbytes > _LARGE) or (
            isinstance(value, np.memmap) and value.nbytes > _MAPPED
        ):
            return
        saved = value.copy()
        self._undo.append((functools.partial(np.copyto, value, saved), path))
        if value.dtype.hasobject:
            for i, item in enumerate(value.flat):
                self._push(item, _item(path, i))
        if type(value) is not np.ndarray:
            self._keep_attributes(value, path)

    # -- tensors and modules ----------------------------------------------------------------------

    def _keep_tensor(self, tensor: Tensor, path: _Path) -> None:
        if type(tensor) in (Tensor, nn.Parameter):
            self._keep_dict(vars(tensor), path, _attribute)
        elif _is_ours(type(tensor)):
            self._keep_object(tensor, path)
        needs_grad, spare = tensor.requires_grad, id(tensor) in self._spare
        if self._lightly and not spare and _bytes(tensor) > _LARGE:
            self._watch(tensor, path)
            return
        # Through .data: neither version counters nor graphs that are still alive take notice.
        alias = tensor.data
        whole = _memory_of(alias)
        try:
            saved = None if spare else whole.detach().clone()
        except (RuntimeError, NotImplementedError):  # torch cannot copy it: a change is refused.
            self._watch(tensor, path)
            return
        gradient = tensor.grad if tensor.is_leaf and not spare else None
        if gradient is not None:
            self._push(gradient, _attribute(path, "grad"))
        placed = _is_placed(whole)
        self.lasts &= placed or saved is None  # Else the copy may take the tensor's place.

        def undo() -> None:
            # Memory that did not change is not written to: it may be a file's, or read-only.
            if saved is not None and placed and not _same_bits(whole, saved):
                whole.copy_(saved)
            if saved is not None and not _same_place(tensor, alias):
                tensor.data = alias if placed else saved
            if tensor.is_leaf and not spare and tensor.grad is not gradient:
                tensor.grad = gradient
            if tensor.requires_grad != needs_grad and tensor.is_leaf:
                tensor.requires_grad_(needs_grad)

        self._undo.append((undo, path))

    def _watch(self, tensor: Tensor, path: _Path) -> None:
        """Notices in-place changes of a tensor that is not copied."""
        if tensor.is_inference():
            return  # It has no version.
        version = tensor._version

        def check() -> str | None:
            if tensor._version == version:
                return None
            return (
                f"The loss changed {_written(path)} in place, a tensor that is too large to keep a "
                "copy of, or cannot be copied. Training would go on with what the measurement "
                "left. Give a loss that leaves it alone: "
                "LCACallback(loss_fn=lambda module, batch: ...)."
            )

        self._checks.append(check)

    def _keep_module(self, module: nn.Module, path: _Path) -> None:
        attributes = vars(module)
        self._keep_dict(attributes, path, _attribute, but=_TABLES | _NOT_OURS)
        for name in _HELD_TABLES:
            table = getattr(module, name)  # Scripted modules have theirs elsewhere.
            if isinstance(table, dict):
                self._keep_dict(table, path, _attribute)
            else:
                for key, value in table.items():
                    self._push(value, _attribute(path, key))
        tables = [attributes[name] for name in _FORWARD_HOOKS if name in attributes]
        others = [attributes[name] for name in _OF_FORWARD_HOOKS if name in attributes]
        for table in tables:
            for hook in table.values():
                self._push(hook, (path, "a hook of {0}", None))
        saved = [dict(table) for table in (*tables, *others)]
        self._undo.append((functools.partial(_undo_hooks, tables, others, saved), path))
        if _is_ours(type(module)):
            self._keep_slots(module, path)
        self._push(type(module), path)

    # -- functions, classes, objects --------------------------------------------------------------

    def _keep_function(self, function: types.FunctionType, path: _Path) -> None:
        if not _is_ours(function):
            return
        self._keep_dict(vars(function), path, _attribute)
        if defaults := function.__defaults__:
            undo = functools.partial(_rebind, function, "__defaults__", defaults)
            self._undo.append((undo, path))
            put = functools.partial(setattr, function, "__defaults__")
            self._visit(defaults, (path, "the defaults of {0}", None), put)
        if function.__kwdefaults__:
            self._keep_dict(function.__kwdefaults__, path, _variable)
        names = function.__code__.co_freevars
        for name, cell in zip(names, function.__closure__ or (), strict=True):
            self._keep_cell(cell, _variable(path, name))
        if self._is_own_code(function.__globals__.get("__name__")):
            named, attributes, modules = _names(function.__code__)
            self._keep_names(function.__globals__, named, attributes, None)
            for module in modules:
                self._keep_names_of_module(sys.modules.get(module), attributes, _root(module))

    def _keep_cell(self, cell: types.CellType, path: _Path) -> None:
        if id(cell) in self._seen:
            return
        self._seen[id(cell)] = cell
        try:
            inside = cell.cell_contents
        except ValueError:  # Not filled yet.
            return
        self._undo.append((functools.partial(_rebind, cell, "cell_contents", inside), path))
        self._visit(inside, path, functools.partial(setattr, cell, "cell_contents"))

    def _keep_names(
        self,
        namespace: dict[str, Any],
        names: Iterable[str],
        attributes: frozenset[str],
        owner: _Path | None,
    ) -> None:
        """Remembers what a function refers to by name, out of its own reach."""
        for name in names:
            if (id(namespace), name) in self._names:
                continue
            if name not in namespace and hasattr(builtins, name):
                continue
            self._names.add((id(namespace), name))
            self._seen[id(namespace)] = namespace
            path = _root(f"the global {name}") if owner is None else _attribute(owner, name)
            value = namespace.get(name, _MISSING)
            self._undo.append((functools.partial(_undo_name, namespace, name, value), path))
            if isinstance(value, types.ModuleType):
                self._keep_names_of_module(value, attributes, path)
            elif value is not _MISSING:
                self._visit(value, path, functools.partial(namespace.__setitem__, name))

    def _keep_names_of_module(
        self, module: types.ModuleType | None, attributes: frozenset[str], path: _Path
    ) -> None:
        """Remembers what is used as ``module.name``, of the user's modules."""
        if module is not None and self._is_own_code(module.__name__):
            self._keep_names(vars(module), attributes, attributes, path)

    def _keep_partial(self, value: functools.partial[Any], path: _Path) -> None:
        state = (value.func, value.args, value.keywords, vars(value) or None)
        self._push(value.func, path)
        self._keep_dict(value.keywords, path, _variable)
        self._keep_dict(vars(value), path, _attribute)

        def put(args: tuple[Any, ...]) -> None:
            value.__setstate__((state[0], args, *state[2:]))  # type: ignore[attr-defined]

        undo = functools.partial(put, value.args)
        self._undo.append((lambda: None if value.args is state[1] else undo(), path))
        self._visit(value.args, (path, "the arguments of {0}", None), put)
        if type(value) is not functools.partial:
            self._keep_object(value, path)

    def _keep_class(self, cls: type) -> None:
        """Remembers the attributes of one of the user's classes, and what its methods reach."""
        for base in (*cls.__mro__[1:], type(cls)):
            self._push(base, _root(base.__name__))
        if not self._is_own_code(cls.__module__) or _is_measuring(cls):
            return
        path = _root(cls.__name__)
        saved = {n: v for n, v in vars(cls).items() if not _is_special(n)}
        self._undo.append((functools.partial(_undo_class, cls, saved), path))
        for name, value in list(vars(cls).items()):
            put = functools.partial(type.__setattr__, cls, name)
            self._visit(value, _attribute(path, name), put)

    def _keep_object(self, value: Any, path: _Path) -> None:
        """Remembers the attributes of a plain object, e.g. a hand-written running average."""
        kind = type(value)
        if _is_measuring(kind) or not (_is_ours(kind) or isinstance(value, _PLAIN)):
            return
        self._lightly = self._lightly or isinstance(value, _DATA)
        self._keep_attributes(value, path)
        self._push(kind, _root(kind.__name__))

    def _keep_attributes(self, value: Any, path: _Path) -> None:
        # A user's own way to look up attributes stays out of it.
        look_up: Any = threading.local if isinstance(value, threading.local) else object
        try:
            attributes = look_up.__getattribute__(value, "__dict__")
        except AttributeError:
            attributes = None
        if type(attributes) is dict:
            self._keep_dict(attributes, path, _attribute)
        self._keep_slots(value, path)

    def _keep_slots(self, value: Any, path: _Path) -> None:
        for cls in type(value).__mro__:
            if "__slots__" not in vars(cls) or not _is_ours(cls):
                continue
            for name, slot in vars(cls).items():
                if isinstance(slot, types.MemberDescriptorType):
                    inside = _slot(slot, value)
                    where = _attribute(path, name)
                    self._undo.append((functools.partial(_undo_slot, slot, value, inside), where))
                    if inside is not _MISSING:
                        self._visit(inside, where, functools.partial(slot.__set__, value))

    def _is_own_code(self, module: Any) -> bool:
        """Whether the user wrote this module: it is not installed, or it is the held module's."""
        package = str(module or "").partition(".")[0]
        return package not in _FOREIGN and (package in self._home or not _is_installed(package))

    # -- what trains ------------------------------------------------------------------------------

    def _keep_optimizer(self, optimizer: Optimizer, path: _Path) -> None:
        """Remembers the settings; of the state what is small. A step that changes more is told."""
        self._lightly = True
        hooks = {name for name in vars(optimizer) if name.endswith("_hooks")}
        self._keep_dict(vars(optimizer), path, _attribute, but=hooks)
        self._push(type(optimizer), path)
        steps: list[int] = []
        handles: list[Any] = []

        def watch() -> None:
            steps.clear()
            handles.append(optimizer.register_step_post_hook(lambda *_: steps.append(1)))

        def undo() -> None:
            while handles:
                handles.pop().remove()

        self._guards.append(watch)
        self._undo.append((undo, path))

        def check() -> str | None:
            # Fused kernels do not count versions.
            if not steps or all(_bytes(t) <= _LARGE for t in _tensors_of(optimizer.state)):
                return None
            return (
                f"training_step steps an optimizer itself: {_written(path)}, whose state is too "
                "large to keep a copy of. Evaluating the loss would be one more step of training. "
                "Use manual optimization (self.automatic_optimization = False), and give a loss "
                "that does not step: LCACallback(loss_fn=lambda module, batch: ...)."
            )

        self._checks.insert(0, check)

    def _keep_trainer(self, trainer: Any) -> None:
        path = _root("trainer")
        self._keep_simple(trainer, path)
        loops = [(trainer.fit_loop, _attribute(path, "fit_loop"))]
        while loops:
            loop, where = loops.pop()
            if id(loop) in self._seen:
                continue
            self._seen[id(loop)] = loop
            self._keep_simple(loop, where)
            for name, part in vars(loop).items():
                package, _, module = type(part).__module__.partition(".")
                if package in _LIGHTNING and "loops." in module:
                    loops.append((part, _attribute(where, name)))
        strategy = trainer.strategy
        where = _attribute(path, "strategy")
        self._keep_simple(strategy, where)
        for name in ("accelerator", "precision_plugin"):
            if (part := getattr(strategy, name, None)) is not None:
                self._keep_simple(part, _attribute(where, name))
        self._lightly = True
        for i, config in enumerate(getattr(trainer, "lr_scheduler_configs", None) or ()):
            where = _item(_attribute(path, "lr_scheduler_configs"), i)
            self._keep_simple(config, where)
            self._push(config.scheduler, _attribute(where, "scheduler"))
        for i, optimizer in enumerate(trainer.optimizers):
            self._push(optimizer, _item(_attribute(path, "optimizers"), i))
        for i, callback in enumerate(trainer.callbacks):
            if id(callback) not in self._seen and not _is_measuring(type(callback)):
                self._seen[id(callback)] = callback
                self._keep_attributes(callback, _item(_attribute(path, "callbacks"), i))
                self._push(type(callback), path)
        self._push(getattr(trainer, "datamodule", None), _attribute(path, "datamodule"))
        self._lightly = False

    def _keep_simple(self, owner: Any, path: _Path) -> None:
        """Remembers the numbers, strings and flags of an object, and nothing else."""
        attributes = vars(owner)
        saved = {name: v for name, v in attributes.items() if type(v) in _SIMPLE}
        names = set(attributes)

        def undo() -> None:
            for name in attributes.keys() - names:
                del attributes[name]
            for name, value in saved.items():
                if attributes.get(name, _MISSING) is not value:
                    attributes[name] = value

        self._undo.append((undo, path))


# -- what kind of thing it is ----------------------------------------------------------------------


def _is_ours(kind: Any) -> bool:
    """Whether a class or function is neither of the standard library nor of a known package."""
    return (kind.__module__ or "").partition(".")[0] not in _FOREIGN


def _environment() -> dict[Any, Any]:
    """Copies the variables of the environment, encoded if they are held so: that saves the work."""
    held = getattr(os.environ, "_data", None)
    return dict(held if isinstance(held, dict) else os.environ)


def _is_database(value: Any) -> bool:
    """Whether it is a connection to a database of sqlite3, which few programs import."""
    module = sys.modules.get("sqlite3")
    return module is not None and isinstance(value, module.Connection)


def _kept_transaction(connection: Any) -> Callable[[], object]:
    """Marks where a database is, and returns what takes it back there."""
    name = "lightning_lca"
    changes = connection.total_changes
    connection.execute(f"SAVEPOINT {name}")

    def undo() -> None:
        if connection.total_changes == changes and not connection.in_transaction:
            return  # Ended by the body, which wrote nothing.
        connection.execute(f"ROLLBACK TO {name}")
        connection.execute(f"RELEASE {name}")

    return undo


def _is_measuring(kind: type) -> bool:
    """Whether it is a class of this package, or derived from one."""
    return any((c.__module__ or "").partition(".")[0] == "lightning_lca" for c in kind.__mro__)


@functools.lru_cache(maxsize=4096)
def _is_installed(package: str) -> bool:
    """Whether a package came from elsewhere: the user's own code is where the user works."""
    module = sys.modules.get(package)
    places = [getattr(module, "__file__", None), *(getattr(module, "__path__", None) or ())]
    return any(f"{kind}-packages" in str(p) for p in places for kind in ("site", "dist"))


def _is_trainer(value: Any) -> bool:
    return any(
        c.__name__ == "Trainer" and c.__module__.partition(".")[0] in _LIGHTNING
        for c in type(value).__mro__
    )


def _is_special(name: str) -> bool:
    """Whether a name is Python's own: it keeps caches under such names."""
    return name.startswith("__") and name.endswith("__")


def _plain(items: Iterable[Any]) -> bool:
    """Whether there is nothing to look at."""
    return _ATOMS.issuperset(map(type, items))


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """Lists the globals, the attributes and the modules that a function refers to."""
    found: dict[str, set[str]] = {"GLOBAL": set(), "ATTR": set(), "IMPORT": set()}
    codes = [code]
    while codes:
        code = codes.pop()
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        for instruction in dis.get_instructions(code):
            _, _, what = instruction.opname.partition("_")
            if what in ("GLOBAL", "NAME") and not instruction.opname.startswith("IMPORT"):
                found["GLOBAL"].add(instruction.argval)
            elif what in ("ATTR", "METHOD", "FROM"):
                found["ATTR"].add(instruction.argval)
            elif instruction.opname == "IMPORT_NAME":
                found["IMPORT"].add(instruction.argval)
    names, attributes, modules = (frozenset(f) for f in found.values())
    return names, attributes, modules


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors_of(state: Any) -> Iterator[Tensor]:
    """Lists the tensors in an optimizer's state."""
    todo, seen = [state], set()
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            todo += value.values() if isinstance(value, dict) else value


def _memory_of(tensor: Tensor) -> Tensor:
    """Shows what must be copied to keep a tensor: its memory, if its elements share places."""
    if not _is_placed(tensor) or tensor.is_nested or 0 not in tensor.stride():
        return tensor
    size = tensor.untyped_storage().nbytes() // max(1, tensor.element_size())
    return tensor.as_strided((size,), (1,), 0)


def _is_placed(tensor: Tensor) -> bool:
    """Whether its elements lie in memory that can be written to in place."""
    return tensor.layout == torch.strided or tensor.is_nested


def _same_place(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same view of the same memory."""
    if a.is_nested and b.is_nested:
        a, b = (t if t.layout == torch.strided else t.values() for t in (a, b))
        return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    return (
        a.layout == b.layout == torch.strided
        and (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        and a.data_ptr() == b.data_ptr()
    )


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors surely hold the same bits; a NaN is itself."""
    if type(a) is not Tensor or a.is_quantized or a.is_nested or a.is_meta or a.is_conj():
        return False
    if a.shape != b.shape or a.element_size() not in _WORDS or a.is_neg():
        return False
    word = _WORDS[a.element_size()]
    return torch.equal(a.view(word), b.view(word))


# -- how it is undone -----------------------------------------------------------------------------


@contextmanager
def seeded(seed: int, devices: Iterable[torch.device]) -> Iterator[None]:
    """Runs the body on seeded streams of torch, here and on these devices, and puts them back.

    ``torch.manual_seed`` would seed all other devices, too, where nobody puts theirs back.
    """
    streams = _torch_streams(devices)
    try:
        for _, seed_stream in streams:
            seed_stream(seed)
        yield
    finally:
        for undo, _ in streams:
            undo()


def _torch_streams(devices: Iterable[torch.device]) -> list[_Stream]:
    """Finds torch's random streams: what puts each back to where it is now, and what seeds it."""
    undo = functools.partial(torch.random.set_rng_state, torch.random.get_rng_state())
    streams: list[_Stream] = [(undo, torch.default_generator.manual_seed)]
    for device in devices:
        if device.type in ("cuda", "mps"):
            its = getattr(torch, device.type)
            index = (device,) if device.type == "cuda" else ()
            undo = functools.partial(its.set_rng_state, its.get_rng_state(*index), *index)
            streams.append((undo, functools.partial(_seed_device, device)))
    return streams


def _seed_device(device: torch.device, seed: int) -> None:
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        getattr(torch, device.type).manual_seed(seed)


def _same_table(a: Any, b: Any) -> bool:
    """Whether a table of pandas is what it was."""
    return bool(a.equals(b))


def _rebind(owner: Any, name: str, value: Any) -> None:
    if getattr(owner, name, _MISSING) is not value:
        setattr(owner, name, value)


def _undo_deque(value: deque[Any], saved: list[Any]) -> None:
    if len(value) != len(saved) or not all(map(operator.is_, value, saved)):
        deque.clear(value)
        deque.extend(value, saved)


def _undo_set(value: set[Any], saved: set[Any]) -> None:
    now = {id(item) for item in set.__iter__(value)}
    if now != {id(item) for item in saved}:
        set.clear(value)
        set.update(value, saved)


def _put_item(value: deque[Any], i: int, other: Any) -> None:
    deque.__setitem__(value, i, other)


def _put_member(value: set[Any], item: Any, other: Any) -> None:
    set.discard(value, item)
    set.add(value, other)


def _undo_name(namespace: dict[str, Any], name: str, value: Any) -> None:
    if namespace.get(name, _MISSING) is value:
        return
    if value is _MISSING:
        namespace.pop(name)
    else:
        namespace[name] = value


def _undo_class(cls: type, saved: dict[str, Any]) -> None:
    for name in [n for n in vars(cls) if n not in saved and not _is_special(n)]:
        type.__delattr__(cls, name)
    for name, value in saved.items():
        if vars(cls).get(name, _MISSING) is not value:
            type.__setattr__(cls, name, value)


def _slot(slot: types.MemberDescriptorType, value: Any) -> Any:
    try:
        return slot.__get__(value)
    except AttributeError:
        return _MISSING


def _undo_slot(slot: types.MemberDescriptorType, value: Any, inside: Any) -> None:
    if _slot(slot, value) is inside:
        return
    if inside is _MISSING:
        slot.__delete__(value)
    else:
        slot.__set__(value, inside)


def _undo_hooks(tables: list[Any], others: list[Any], saved: list[dict[int, Any]]) -> None:
    """Puts back hooks on the forward, unless a package came or went with one of its own."""
    changed = []
    for table, before in zip(tables, saved, strict=False):
        changed += [{**before, **table}[key] for key in before.keys() ^ table.keys()]
    if changed and all(map(_is_users_hook, changed)):
        for table, before in zip((*tables, *others), saved, strict=True):
            table.clear()
            table.update(before)


def _is_users_hook(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return _is_ours(hook if hasattr(hook, "__module__") else type(hook))


_Owner = tuple[Any, tuple[str, ...]]  # Who has tables of hooks, and their names.
_OF_PARAMETERS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_OF_MODULES = ("_backward_hooks", "_backward_pre_hooks")
_OF_ALL_MODULES = ("_global_backward_hooks", "_global_backward_pre_hooks")


class GradientHooks:
    """Hooks on the gradients of a module's parameters and submodules.

    Hooks on other tensors, which a forward registers on its way, are not among them.
    """

    def __init__(self, module: nn.Module) -> None:
        """Finds who may have some; the module must keep its submodules and parameters."""
        # The tables are private. They are emptied in place: handles and autograd hold on to them.
        self._owners: list[_Owner] = [(_everywhere, _OF_ALL_MODULES)]
        for m in module.modules():  # Once for both: walking large modules takes its time.
            self._owners.append((m, _OF_MODULES))
            self._owners += [(p, _OF_PARAMETERS) for p in m._parameters.values() if p is not None]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Runs the body without them; those that are registered within are dropped at its end."""
        saved = [(table, dict(table)) for table in _tables(self._owners)]
        for table, _ in saved:
            table.clear()
        try:
            yield
        finally:
            for table in _tables(self._owners):
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
