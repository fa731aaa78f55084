"""The fence, held against everything that it claims to put back, one kind of value at a time."""

from __future__ import annotations

import array
import contextvars
import csv
import ctypes
import functools
import gc
import io
import itertools
import mmap
import multiprocessing
import os
import queue
import random
import socket
import sqlite3
import sys
import threading
import types
import warnings
import weakref
from argparse import Namespace
from collections import ChainMap, Counter, OrderedDict, UserDict, defaultdict, deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from support.models import pl
from support.training import make_trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_lca import LCACallback
from lightning_lca.probe.isolation import Fence, fence
from lightning_lca.runtime.lightnings import MisconfigurationException


@contextmanager
def fenced(*held, fails, **options):
    """Fences a body that ends in an error if ``fails``."""
    with suppress(KeyboardInterrupt), fence(*held, **({"seed": 7} | options)):
        yield
        if fails:
            raise KeyboardInterrupt


class Plain:
    """An object of the user's."""

    def __init__(self):
        self.count, self.items = 0, [1]


@dataclass(slots=True)
class Slotted:
    count: int = 0
    items: Any = None


class Bank(dict):
    """A container with attributes."""

    def __init__(self):
        super().__init__(a=[1])
        self.count = 0


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)


def strided():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def inference_tensor():
    with torch.inference_mode():
        return torch.zeros(3)


def metric():
    metric = torchmetrics.MeanMetric()
    metric.update(torch.ones(2))
    return metric


def norm():
    norm = nn.BatchNorm1d(2)
    norm(torch.randn(4, 2))
    return norm.eval()


def tensor_of(make):
    def read(value):
        dense = value.to_dense() if value.is_sparse else value
        return value.dtype, value.shape, value.stride() if dense is value else 0, dense.tolist()

    return make, read


def change_norm(value):
    value.train()
    value(torch.randn(4, 2))


def all_of(value):
    return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in vars(value).items()}


# What it is: how one is made, how its content is read, how a body changes it.
tensor, filled = tensor_of(lambda: torch.arange(3.0))
KINDS = {
    "tensor": (tensor, filled, lambda v: v.add_(1)),
    "tensor by .data": (tensor, filled, lambda v: v.data.zero_()),
    "tensor with other data": (tensor, filled, lambda v: setattr(v, "data", torch.ones(3))),
    "resized tensor": (tensor, filled, lambda v: v.resize_(7).fill_(1)),
    "shrunk tensor": (tensor, filled, lambda v: setattr(v, "data", v.data[:1])),
    "converted tensor": (tensor, filled, lambda v: setattr(v, "data", v.data.half())),
    "transposed tensor": (*tensor_of(lambda: torch.rand(2, 3).T), lambda v: v.add_(1)),
    "expanded tensor": (*tensor_of(lambda: torch.ones(1, 2).expand(3, 2)), lambda v: v[:1].add_(1)),
    "sparse tensor": (*tensor_of(lambda: torch.eye(2).to_sparse()), lambda v: v.mul_(2)),
    "complex scalar": (*tensor_of(lambda: torch.tensor(1j)), lambda v: v.add_(1)),
    "tensor of a graph": (
        *tensor_of(lambda: torch.ones(2, requires_grad=True) * 2),
        lambda v: v.data.add_(1),
    ),
    "inference tensor": (
        inference_tensor,
        torch.Tensor.tolist,
        torch.inference_mode()(lambda v: v.add_(1)),
    ),
    "complex tensor": (*tensor_of(lambda: torch.ones(2) * 1j), lambda v: v.mul_(2)),
    "conjugate": (*tensor_of(lambda: (torch.ones(2) * 1j).conj()), lambda v: v.mul_(2)),
    "tensor with a NaN": (lambda: torch.tensor([torch.nan, 1]), str, lambda v: v.add_(1)),
    "8-bit float": (lambda: torch.ones(2).to(torch.float8_e4m3fn), str, torch.Tensor.zero_),
    "sparse rows": (
        lambda: torch.eye(2).to_sparse(),
        lambda v: v.to_dense().tolist(),
        lambda v: v.zero_(),
    ),
    "quantized tensor": (
        quantized,
        lambda v: v.int_repr().tolist(),
        lambda v: v.copy_(v.dequantize() * 2),
    ),
    "nested tensor": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        lambda v: v.values().tolist(),
        lambda v: v.mul_(2),
    ),
    "note on a tensor": (tensor, lambda v: dict(vars(v)), lambda v: setattr(v, "count", 1)),
    "list": (lambda: [1, [2]], str, lambda v: (v[1].append(3), v.insert(0, 4))),
    "long list": (lambda: list(range(5000)), str, lambda v: v.reverse()),
    "tuple": (lambda: ([1], {2: [3]}), str, lambda v: (v[0].append(2), v[1][2].clear())),
    "dict": (
        lambda: {"b": 1, "a": {}},
        str,
        lambda v: (v["a"].update(c=1), v.update(b=v.pop("b"))),
    ),
    "defaultdict": (lambda: defaultdict(list, a=[1]), str, lambda v: v["b"].append(v["a"].pop())),
    "OrderedDict": (
        lambda: OrderedDict(a=1, b=2),
        lambda v: (list(v.items()), list(reversed(v)), len(v)),
        lambda v: (v.update(c=3), v.move_to_end("a"), v.popitem(last=False)),
    ),
    "Counter": (lambda: Counter("aab"), str, lambda v: v.update("abc")),
    "set": (lambda: {1, 2}, str, lambda v: (v.add(3), v.discard(1))),
    "deque": (lambda: deque([1, [2]], maxlen=2), str, lambda v: (v[1].append(3), v.append(4))),
    "array": (lambda: np.zeros((2, 2)), str, lambda v: np.add(v, 1, out=v)),
    "array of objects": (
        lambda: np.array([[1], None], dtype=object),
        str,
        lambda v: (v[0].append(2), v.__setitem__(1, 3)),
    ),
    "bytearray": (lambda: bytearray(b"ab"), str, lambda v: v.append(1)),
    "memory of a file": (
        lambda: mmap.mmap(-1, 9),
        lambda v: v[:],
        lambda v: v.__setitem__(2, 4),
    ),
    "number of C": (lambda: ctypes.c_long(3), str, lambda v: setattr(v, "value", 4)),
    "array of C": (lambda: (ctypes.c_int * 3)(1, 2), list, lambda v: v.__setitem__(2, 9)),
    "number in shared memory": (
        lambda: multiprocessing.Value("d", 3),
        lambda v: v.value,
        lambda v: setattr(v, "value", 4),
    ),
    "array in shared memory": (
        lambda: multiprocessing.Array("i", 3),
        list,
        lambda v: v.__setitem__(1, 4),
    ),
    "array.array": (lambda: array.array("d", [1]), str, lambda v: v.append(1)),
    "StringIO": (
        lambda: io.StringIO("ab"),
        lambda v: (v.getvalue(), v.tell()),
        lambda v: (v.read(1), v.write("c")),
    ),
    "BytesIO": (
        lambda: io.BytesIO(b"ab"),
        lambda v: (v.getvalue(), v.tell()),
        lambda v: v.write(b"c"),
    ),
    "container with attributes": (
        Bank,
        lambda v: (str(v), v.count),
        lambda v: (v["a"].append(2), setattr(v, "count", 1)),
    ),
    "ChainMap": (lambda: ChainMap({"a": [1]}), str, lambda v: v.update(b=2)),
    "weak dictionary": (
        lambda: weakref.WeakValueDictionary(a=nn),
        lambda v: sorted(v),
        lambda v: v.update(b=torch),
    ),
    "object": (
        Plain,
        lambda v: str(vars(v)),
        lambda v: (setattr(v, "count", 1), v.items.append(2), setattr(v, "new", 1)),
    ),
    "SimpleNamespace": (
        lambda: SimpleNamespace(count=0, items=[1]),
        str,
        lambda v: (setattr(v, "count", 1), v.items.append(2)),
    ),
    "argparse.Namespace": (
        lambda: Namespace(count=0, items=[1]),
        str,
        lambda v: (setattr(v, "count", 1), v.items.append(2)),
    ),
    "UserDict": (lambda: UserDict(a=[1]), str, lambda v: (v["a"].append(2), v.update(b=3))),
    "object with slots": (
        lambda: Slotted(0, [1]),
        str,
        lambda v: (setattr(v, "count", 1), v.items.append(2)),
    ),
    "metric": (metric, all_of, lambda v: v.update(torch.zeros(5))),
    "module": (
        norm,
        lambda v: (v.training, [b.tolist() for b in v.buffers()]),
        change_norm,
    ),
    "torch.Generator": (
        lambda: torch.Generator().manual_seed(3),
        lambda v: v.get_state().tolist(),
        lambda v: torch.rand(1, generator=v),
    ),
    "numpy Generator": (
        lambda: np.random.default_rng(3),
        lambda v: str(v.bit_generator.state),
        lambda v: v.normal(),
    ),
    "numpy Generator of another kind": (
        lambda: np.random.Generator(np.random.Philox(3)),
        lambda v: str(v.bit_generator.state),
        lambda v: v.integers(9, dtype=np.int32),
    ),
    "RandomState": (
        lambda: np.random.RandomState(3),
        lambda v: str(v.get_state(legacy=False)),
        lambda v: v.normal(),
    ),
    "bits of numpy": (
        lambda: np.random.PCG64(3),
        lambda v: str(v.state),
        lambda v: v.random_raw(),
    ),
    "random.Random": (lambda: random.Random(3), random.Random.getstate, lambda v: v.gauss(0, 1)),
}


def attribute(value):
    module = nn.Linear(1, 1)
    module.value = value
    return module


def deep_inside(value):
    module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    module[1].held, held = {"one": [(Plain(),)]}, value
    module[1].held["one"][0][0].held = held
    return module


HOLDERS = {"directly": lambda v: v, "as an attribute": attribute, "deep inside": deep_inside}


@pytest.mark.parametrize("fails", [False, True], ids=["on success", "on an error"])
@pytest.mark.parametrize("hold", [pytest.param(h, id=name) for name, h in HOLDERS.items()])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_body_changes_is_put_back(kind, hold, fails):
    make, read, change = KINDS[kind]
    value = make()
    holder, before = hold(value), read(value)
    with fenced(holder, fails=fails):
        entered = read(value)
        change(value)
        assert read(value) != entered, "The case changes nothing."
    assert read(value) == before


# Torch writes to none of these in place: what is put back is the copy itself.
USED_UP = {"sparse tensor", "sparse rows"}


@pytest.mark.parametrize("kind", KINDS)
def test_one_fence_puts_back_what_several_bodies_change(kind):
    make, read, change = KINDS[kind]
    value = make()
    before = read(value)
    one = Fence(deep_inside(value))
    seen = []
    for _ in range(3 if one.lasts else 1):
        with one.around(7):
            seen.append(read(value))
            change(value)
            assert read(value) != seen[-1], "The case changes nothing."
        assert read(value) == before
    assert one.lasts == (kind not in USED_UP)
    # Each body finds the same; a generator starts from the seed for all.
    assert all(s == seen[0] for s in seen)


def database(notes):
    table = sqlite3.connect(":memory:")
    table.execute("CREATE TABLE t(a)")
    return table


def pandas_table(notes):
    # As pandas is built: a table holds a manager, and says whether another equals it.
    class Manager:
        def equals(self, other):
            return self is other

    class Table:
        _mgr = Manager()

        def copy(self, deep):
            return Table()

    Table.__module__ = "pandas.core"
    return Table()


@pytest.mark.parametrize("make", [iter, database, pandas_table])
def test_a_fence_says_that_its_copy_is_used_up(make):
    assert Fence(nn.Linear(1, 1)).lasts
    assert not Fence(attribute(make([1, 2]))).lasts


def test_an_optimizer_is_watched_in_every_body():
    module = stepped(200)
    one = Fence(module)
    for _ in range(2):
        with one.around(0):
            pass
    with pytest.raises(MisconfigurationException, match="steps an optimizer"), one.around(0):
        step(module)
    assert not module.optimizer._optimizer_step_post_hooks


def test_guards_stand_in_every_body():
    with open(__file__, encoding="utf-8") as file:
        module = attribute(file)
        one = Fence(module)
        for _ in range(2):
            with pytest.raises(MisconfigurationException, match=r"self\.value"), one.around(0):
                module.value.read()
            assert file.tell() == 0


@pytest.mark.parametrize("fails", [False, True], ids=["on success", "on an error"])
def test_every_name_of_a_module_is_bound_to_the_same_object_again(fails):
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    module.notes, module.gone, module.count = [1], {}, 0
    module[2].eval()
    names = {n: dict(vars(m)) for n, m in module.named_modules()}
    tables = {n: [dict(m._buffers), dict(m._modules)] for n, m in module.named_modules()}
    with fenced(module, fails=fails):
        module.notes, module.new, module.count = [1], 1, 5
        del module.gone
        module.register_buffer("extra", torch.zeros(1))
        module[1].running_mean = torch.ones(2)
        module[1].num_batches_tracked = None
        module.add_module("more", nn.Linear(1, 1))
        module[2] = nn.Identity()
        module.train()
        module[0].eval()
        module[0].forward = lambda x: x
    for name, child in module.named_modules():
        assert vars(child).keys() == names[name].keys()
        assert all(vars(child)[k] is v for k, v in names[name].items())
        for table, before in zip((child._buffers, child._modules), tables[name], strict=True):
            assert list(table) == list(before)
            assert all(table[k] is v for k, v in before.items())
    assert [m.training for m in module] == [True, True, False]


@pytest.mark.parametrize("fails", [False, True], ids=["on success", "on an error"])
def test_parameters_are_put_back_unless_someone_else_keeps_them(fails):
    module, hidden = nn.Linear(2, 2), nn.Linear(2, 2)
    module.hidden = [hidden]
    before = module.weight.tolist(), hidden.weight.tolist()
    with fenced(module, fails=fails, spare=[module.bias]):
        for parameter in (*module.parameters(), *hidden.parameters()):
            parameter.data.fill_(2)
            parameter.requires_grad_(False)
    assert (module.weight.tolist(), hidden.weight.tolist()) == before
    assert module.bias.tolist() == [2, 2]
    assert all(p.requires_grad for p in (*module.parameters(), *hidden.parameters()))


@pytest.mark.parametrize("fails", [False, True], ids=["on success", "on an error"])
def test_the_gradient_of_a_tensor_is_put_back(fails):
    module = attribute(torch.ones(2, requires_grad=True))
    with fenced(module, fails=fails):
        module.value.sum().backward()
    assert module.value.grad is None
    module.value.square().sum().backward()
    gradient = module.value.grad
    with fenced(module, fails=fails):
        module.value.sum().backward()
    assert module.value.grad is gradient
    assert gradient.tolist() == [2, 2]


def test_the_error_of_the_body_comes_out():
    with pytest.raises(ValueError, match="ours"), fence(nn.Linear(1, 1), seed=0):
        raise ValueError("ours")


# -- what is reached ------------------------------------------------------------------------------


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


def with_a_closure(notes):
    return lambda: notes


def with_a_default(notes):
    return lambda notes=notes: notes


def with_a_keyword(notes):
    return lambda *, notes=notes: notes


def with_an_attribute(notes):
    function = with_a_closure(None)
    function.notes = notes
    return function


def plain(notes):
    value = Plain()
    value.notes = notes
    return value


class Keeper:
    """Holds something, and has methods."""

    __slots__ = ("__hidden", "notes")

    def __init__(self, notes):
        self.__hidden = notes

    def method(self):
        return self.__hidden


class Bare:
    """Takes what a test puts on its class."""


class Heir(Bare):
    """Finds it there."""


def on_a_class(notes):
    Bare.notes = [notes]
    return Heir()


def on_a_thread(notes):
    local = threading.local()
    local.notes = notes
    return local


def deep(notes):
    chain = notes
    for _ in range(3000):
        chain = plain(chain)
    return chain


class Items(Dataset):
    """A dataset with notes."""

    def __init__(self, notes):
        self.notes = notes

    def __len__(self):
        return 2


def scaled(notes):
    scaler = torch.amp.GradScaler("cpu") if hasattr(torch.amp, "GradScaler") else Plain()
    scaler.notes = notes
    return scaler


# Who holds the notes; a module holds them.
REACHES = {
    "the middle of a long list": lambda n: [*([i] for i in range(3000)), n],
    "a long dict": lambda n: {i: ([i] if i else n) for i in range(3000)},
    "a set": lambda n: {plain(n)},
    "a frozenset": lambda n: frozenset({plain(n)}),
    "a key": lambda n: {plain(n): 1},
    "a slot": Keeper,
    "a closure": with_a_closure,
    "a default": with_a_default,
    "a default keyword": with_a_keyword,
    "a function's attribute": with_an_attribute,
    "a decorated function": lambda n: decorated(with_a_closure(n)),
    "a cached function": lambda n: functools.lru_cache(with_a_closure(n)),
    "a partial's argument": lambda n: functools.partial(print, n),
    "a partial's keyword": lambda n: functools.partial(print, end=n),
    "a partial's function": lambda n: functools.partial(with_a_closure(n)),
    "the owner of a method": lambda n: Keeper(n).method,
    "the owner of a built-in method": lambda n: n.append,
    "a weak reference": lambda n: weakref.ref(KEPT.setdefault("value", plain(n))),
    "a class": on_a_class,
    "a class that is held": lambda n: type(on_a_class(n)),
    "a thread's own": on_a_thread,
    "three thousand objects deep": deep,
    "a loader's dataset": lambda n: DataLoader(Items(n)),
    "a default factory": lambda n: defaultdict(with_a_closure(n)),
    "an iterator": lambda n: iter([n]),
    "a scaler": scaled,
}
KEPT: dict[str, Any] = {}


@pytest.mark.parametrize("fails", [False, True], ids=["on success", "on an error"])
@pytest.mark.parametrize("reach", REACHES)
def test_what_is_reached_is_put_back(reach, fails):
    KEPT.clear()
    notes = [1]
    module = attribute(REACHES[reach](notes))
    with fenced(module, fails=fails):
        notes.append(2)
    assert notes == [1]


@pytest.mark.parametrize("fails", [False, True], ids=["on success", "on an error"])
def test_variables_of_functions_are_put_back(fails):
    count, notes = 0, [1]

    def step():
        nonlocal count, notes
        count, notes = count + 1, [*notes, count]

    module, before = attribute(step), notes
    with fenced(module, fails=fails):
        module.value()
        assert count == 1
    assert count == 0
    assert notes is before


NUMBER, LIST, NUMPY, TORCH = 0, [[1]], np.random.default_rng(0), torch.Generator()
SETTINGS = types.ModuleType("settings_of_the_user")
SETTINGS.count, SETTINGS.notes = 0, [1]
sys.modules[SETTINGS.__name__] = SETTINGS


def helper():
    LIST[0].append(2)


class Uses(nn.Module):
    """Changes globals and its classes in its methods."""

    count, notes, extra = 0, [1], "here"

    def training_step(self):
        global NUMBER, NEW
        NUMBER, NEW = NUMBER + 1, "new"
        SETTINGS.count += 1
        SETTINGS.notes.append(2)
        (lambda: helper())()
        type(self).count += 1
        Uses.notes.append(2)
        Uses.more = 1
        del Uses.extra
        Uses.training_step = None
        return NUMPY.normal(), torch.rand((), generator=TORCH).item(), self.imports()

    def imports(self):
        import settings_of_the_user

        settings_of_the_user.late = 1


class Derived(Uses):
    """Is what a user trains."""


def globals_and_classes():
    classes = [
        sorted(f"{k}: {v}" for k, v in vars(c).items() if k[:2] != "__") for c in (Uses, Derived)
    ]
    numbers = NUMPY.bit_generator.state, TORCH.get_state().tolist()
    return str((NUMBER, "NEW" in globals(), LIST, vars(SETTINGS), classes, numbers))


@pytest.mark.parametrize("fails", [False, True], ids=["on success", "on an error"])
def test_globals_and_classes_that_methods_name_are_put_back(fails):
    module, before, drawn = Derived(), globals_and_classes(), []
    for _ in range(2):
        with fenced(module, fails=fails):
            drawn.append(module.training_step())
            assert globals_and_classes() != before
        assert globals_and_classes() == before
        NUMPY.normal()
        before = globals_and_classes()
    assert drawn[0] == drawn[1]  # They were seeded.


def test_hooks_of_all_modules_are_reached():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(1))
    try:
        module = nn.Linear(1, 1)
        with fence(module, seed=0):
            module(torch.ones(1, 1))
    finally:
        handle.remove()
    assert seen == []


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(np.broadcast_to(np.zeros(1), (3,)), id="array that is read-only"),
        pytest.param(types.MappingProxyType({"a": [1]}), id="mappingproxy"),
        pytest.param(torch.ones(3, device="meta"), id="meta tensor"),
        pytest.param(strided(), id="strided nested tensor"),
        pytest.param(torch.fx.immutable_collections.immutable_list([1, [2]]), id="immutable list"),
        pytest.param(torch.fx.immutable_collections.immutable_dict(a=1), id="immutable dict"),
        pytest.param(nn.Parameter(torch.ones(1).expand(3), requires_grad=False), id="expanded"),
        pytest.param(torch.eye(2).to_sparse(), id="sparse tensor"),
        pytest.param(sys.stdout, id="standard output"),
    ],
)
def test_what_cannot_change_is_no_obstacle(value):
    holder = attribute(value)
    if isinstance(value, nn.Parameter):
        assert holder.value is value
    with fence(holder, [value], seed=0):
        assert holder.value is value
    assert holder.value is value


def test_a_file_that_is_mapped_is_no_obstacle(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((9, 4)))
    module = attribute(np.load(tmp_path / "a.npy", mmap_mode="r"))
    with fence(module, seed=0):
        assert module.value.sum() == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated.*", "ignore:.*is deprecated.*")
def test_a_scripted_network_is_put_back():
    module = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with fence(module, seed=0):
        module(torch.randn(4, 2))
        module[0][0].weight.data.zero_()
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("fails", [False, True], ids=["on success", "on an error"])
def test_all_is_tried_where_something_cannot_be_put_back(fails):
    module = nn.Module()
    module.first, module.stubborn, module.last, views = [1], bytearray(b"a"), [1], []
    error, match = (ValueError, "ours") if fails else (MisconfigurationException, r"self\.stubborn")
    random.seed(3)
    expected = random.Random(3).random()

    def change():
        for notes in (module.first, module.last):
            notes.append(2)
        module.stubborn.append(1)
        views.append(memoryview(module.stubborn))  # Its size is fixed from now on.
        if fails:
            raise ValueError("ours")

    with pytest.raises(error, match=match), fence(module, seed=0):
        change()
    assert (module.first, module.last, random.random()) == ([1], [1], expected)


VARIABLE = contextvars.ContextVar("VARIABLE")


@pytest.mark.parametrize("fails", [False, True], ids=["on success", "on an error"])
def test_variables_of_the_context_are_put_back(fails):
    VARIABLE.set(1)
    with fenced(fails=fails):
        VARIABLE.set(2)
    assert VARIABLE.get() == 1


@pytest.mark.parametrize("fails", [False, True], ids=["on success", "on an error"])
def test_the_environment_is_put_back(monkeypatch, fails):
    monkeypatch.setenv("LCA_A", "1")
    monkeypatch.setenv("LCA_B", "2")
    before = dict(os.environ)
    with fenced(fails=fails):
        os.environ["LCA_A"] = "3"
        os.environ["LCA_C"] = "4"
        del os.environ["LCA_B"]
    assert dict(os.environ) == before
    assert os.getenv("LCA_C") is None


@pytest.mark.parametrize("size", [None, 2, 100], ids=["any size", "full", "not full"])
@pytest.mark.parametrize("fails", [False, True], ids=["on success", "on an error"])
def test_a_function_with_a_cache_forgets_what_it_was_asked_meanwhile(size, fails):
    module = nn.Linear(1, 1)
    pytest.asked = []
    module.drawn = functools.lru_cache(size)(lambda key: pytest.asked.append(key) or [key])
    held = [module.drawn(0), module.drawn(1)]
    with fenced(module, fails=fails):
        held[0].append("changed")
        module.drawn(2)
        if size is None:
            module.drawn.cache_clear()
    pytest.asked.clear()
    assert held == [[0], [1]], "what is in it is put back, too"
    module.drawn(2)
    assert pytest.asked == [2]
    if size != 2:  # A full one has let go of something.
        assert module.drawn(0) is held[0]
        assert module.drawn(1) is held[1]
        assert module.drawn(2) is module.drawn(2)
        assert pytest.asked == [2]
    assert [module.drawn(key) for key in range(5)] == [[key] for key in range(5)]


@pytest.mark.parametrize("level", [None, ""], ids=["without transactions", "with transactions"])
@pytest.mark.parametrize("fails", [False, True], ids=["on success", "on an error"])
def test_a_database_is_taken_back(level, fails):
    module = nn.Linear(1, 1)
    module.table = sqlite3.connect(":memory:", isolation_level=level)
    module.table.execute("CREATE TABLE t(a)")
    module.table.execute("INSERT INTO t VALUES (1)")
    before = module.table.in_transaction
    with fenced(module, fails=fails):
        module.table.execute("INSERT INTO t VALUES (2)")
        assert module.table.execute("SELECT a FROM t").fetchall() == [(1,), (2,)]
    assert module.table.execute("SELECT a FROM t").fetchall() == [(1,)]
    assert module.table.in_transaction == before


def test_a_database_that_is_only_read_is_left_alone():
    module = nn.Linear(1, 1)
    module.table = sqlite3.connect(":memory:")
    module.table.execute("CREATE TABLE t(a)")
    with fence(module, seed=0):
        assert module.table.execute("SELECT a FROM t").fetchall() == []
        module.table.commit()
    assert not module.table.in_transaction


def test_what_was_committed_to_a_database_is_refused():
    module = nn.Linear(1, 1)
    module.table = sqlite3.connect(":memory:")
    module.table.execute("CREATE TABLE t(a)")
    refused = pytest.raises(MisconfigurationException, match=r"self\.table.* could not be put back")
    with refused, fence(module, seed=0):
        module.table.execute("INSERT INTO t VALUES (2)")
        module.table.commit()


# -- what cannot be put back ----------------------------------------------------------------------


def counting():
    yield from range(9)


def loader_iterator():
    return iter(DataLoader(TensorDataset(torch.arange(4.0))))


GENERATOR = counting()


class OnClass(nn.Module):
    """Its class holds a generator."""

    r = counting()

    def training_step(self):
        return next(self.r)


class OnGlobal(nn.Module):
    """Its method uses a global generator."""

    def training_step(self):
        return next(GENERATOR)


CONSUMED = {
    "a generator": (counting, next),
    "an iterator of a loader": (loader_iterator, next),
    "map": (lambda: map(str, [1, 2]), next),
    "zip": (lambda: zip([1], [2]), lambda v: list(v)),
    "itertools.cycle": (lambda: itertools.cycle([1, 2]), lambda v: [x for x, _ in zip(v, "ab")]),
    "itertools.count": (itertools.count, next),
    "a queue": (lambda: filled_queue(queue.Queue()), lambda v: v.get()),
    "a simple queue": (lambda: filled_queue(queue.SimpleQueue()), lambda v: v.get()),
    "a method of a generator": (lambda: counting().__next__, lambda v: v()),
    "a method of a queue": (lambda: filled_queue(queue.Queue()).get, lambda v: v()),
    "an open file": (Path(__file__).open, lambda v: v.readline()),
    "a csv writer": (lambda: csv.writer(io.StringIO()), lambda v: v.writerow("a")),
    "a socket": (socket.socket, lambda v: v.fileno()),
}


def filled_queue(value):
    value.put(1)
    value.put(2)
    return value


def in_a_partial(value):
    return functools.partial(next, value)


# Where it is held, how it is found there, what it is called.
PLACES = {
    "an attribute": (lambda v: v, lambda m: m.value, "self.value"),
    "a list": (lambda v: [v], lambda m: m.value[0], "self.value[0]"),
    "a dict": (lambda v: {"a": v}, lambda m: m.value["a"], "self.value['a']"),
    "a tuple": (lambda v: (0, v), lambda m: m.value[1], "self.value[1]"),
    "a tuple in a list": (lambda v: [(v,)], lambda m: m.value[0][0], "self.value[0][0]"),
    "a deque": (lambda v: deque([v]), lambda m: m.value[0], "self.value[0]"),
    "a set": (lambda v: {v}, lambda m: next(iter(m.value)), "self.value"),
    "an object": (plain, lambda m: m.value.notes, "self.value.notes"),
    "slots": (lambda v: Slotted(items=v), lambda m: m.value.items, "self.value.items"),
    "a closure": (
        with_a_closure,
        lambda m: m.value(),
        "the variable notes of self.value",
    ),
    "a default": (with_a_default, lambda m: m.value(), "the defaults of self.value"),
    "a partial": (
        lambda v: functools.partial(with_a_default(None), v),
        lambda m: m.value(),
        "the arguments of self.value",
    ),
}


def assert_refused(caught, name):
    text = str(caught.value)
    assert f"uses {name}, which is" in text or f"uses {name}[" in text
    assert "training would see the next item" in text
    assert "LCACallback(loss_fn=" in text


@pytest.mark.parametrize("kind", CONSUMED)
def test_the_use_of_what_cannot_be_put_back_is_refused_by_name(kind):
    make, use = CONSUMED[kind]
    value = make()
    module = attribute(value)
    with pytest.raises(MisconfigurationException) as caught, fence(module, seed=0):
        use(module.value)
    assert_refused(caught, "self.value")
    assert module.value is value
    use(value)  # As if nothing had been.
    if hasattr(value, "close"):
        value.close()


@pytest.mark.parametrize("fails", [False, True], ids=["on success", "on an error"])
@pytest.mark.parametrize("place", PLACES)
def test_what_cannot_be_put_back_is_refused_wherever_it_is_held(place, fails):
    hold, find, name = PLACES[place]
    value = counting()
    module = attribute(hold(value))
    with fenced(module, fails=fails):
        with pytest.raises(MisconfigurationException) as caught:
            next(find(module))
        assert_refused(caught, name)
        assert isinstance(find(module), types.GeneratorType)
    assert find(module) is value
    assert list(value) == list(range(9))


@pytest.mark.parametrize(
    ("module", "name"), [(OnClass, "OnClass.r"), (OnGlobal, "the global GENERATOR")]
)
def test_generators_of_classes_and_globals_are_refused_by_name(module, name):
    with pytest.raises(MisconfigurationException) as caught, fence(module(), seed=0):
        module().training_step()
    assert_refused(caught, name)
    assert isinstance(GENERATOR, types.GeneratorType)
    assert type(OnClass.r) is types.GeneratorType


USES = {
    "next": next,
    "iter": iter,
    "an attribute": lambda v: v.send,
    "setting one": lambda v: setattr(v, "a", 1),
    "a call": lambda v: v(),
    "len": len,
    "bool": bool,
    "with": lambda v: v.__enter__(),
    "an index": lambda v: v[0],
    "in": lambda v: 1 in v,
    "unpacking": lambda v: [*v],
}


@pytest.mark.parametrize("use", USES)
def test_every_use_is_refused(use):
    module = attribute(counting())
    with pytest.raises(MisconfigurationException, match=r"self\.value"), fence(module, seed=0):
        USES[use](module.value)


def test_what_nobody_uses_may_be_held_and_found_under_two_names():
    module = attribute(counting())
    module.other = [module.value]
    with fence(module, seed=0):
        assert module.value is module.other[0]
    assert next(module.value) == 0


def test_other_threads_go_on_using_it():
    module, got = attribute(filled_queue(queue.Queue())), []

    def work():
        got.append((module.value.get(), len(module.other), next(module.other[0])))

    module.other = [counting()]
    with fence(module, seed=0):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert got == [(1, 1, 0)]


@pytest.mark.parametrize("items", [[1, 2, 3], (1, 2, 3), "abc", range(3), b"abc"])
def test_iterators_that_can_be_copied_go_on_where_they_were(items):
    value = iter(items)
    next(value)
    module = attribute(value)
    with fence(module, seed=0):
        assert list(module.value) == list(items)[1:]
    assert module.value is value
    assert list(value) == list(items)[1:]


# -- optimizers, schedulers, the Trainer ----------------------------------------------------------


def stepped(size, **options):
    """Makes a module that holds an optimizer with momentum, and a scheduler."""
    module = nn.Linear(size, size)
    module.optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(module.optimizer, lambda n: 1 / (1 + n))
    module.schedule = schedule
    step(module)
    return module


def step(module):
    module(torch.ones(1, module.in_features)).sum().backward()
    module.optimizer.step()


def state_of(module):
    optimizer, schedule = module.optimizer, module.schedule
    tensors = [s["momentum_buffer"].tolist() for s in optimizer.state.values()]
    rates = [(g["lr"], g["momentum"], len(g["params"])) for g in optimizer.param_groups]
    return tensors, rates, schedule.last_epoch, schedule.get_last_lr()


@pytest.mark.parametrize("fails", [False, True], ids=["on success", "on an error"])
def test_schedulers_and_rates_are_put_back(fails):
    module = stepped(3)
    before, group = state_of(module), module.optimizer.param_groups[0]
    with fenced(module, fails=fails):
        module.schedule.step()
        module.optimizer.param_groups[0]["momentum"] = 0.0
        module.optimizer.add_param_group({"params": [torch.ones(1, requires_grad=True)]})
    assert state_of(module) == before
    assert module.optimizer.param_groups[0] is group


@pytest.mark.parametrize("fails", [False, True], ids=["on success", "on an error"])
def test_a_small_state_is_put_back(fails):
    module = stepped(3)
    before, weights = state_of(module), module.weight.tolist()
    hooks = len(module.optimizer._optimizer_step_post_hooks)
    with fenced(module, fails=fails):
        step(module)
    assert state_of(module) == before
    assert module.weight.tolist() == weights
    assert len(module.optimizer._optimizer_step_post_hooks) == hooks


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_a_large_state_is_not_copied_and_a_step_is_refused(options):
    module = stepped(200, **options)
    state, weights = module.optimizer.state[module.weight], module.weight.tolist()
    with fence(module, seed=0):
        pass
    with (
        pytest.raises(MisconfigurationException, match=r"steps an optimizer.*self\.optimizer"),
        fence(module, seed=0),
    ):
        step(module)
    assert module.weight.tolist() == weights
    assert module.optimizer.state[module.weight] is state


def test_the_first_step_of_an_optimizer_is_refused_where_a_second_would_be():
    module = stepped(200)
    module.optimizer = torch.optim.Adam(module.parameters())
    with pytest.raises(MisconfigurationException, match="manual"), fence(module, seed=0):
        step(module)
    assert not module.optimizer.state


class Other(pl.Callback):
    """A callback of the user's."""

    def __init__(self):
        self.count, self.notes = 0, [1]


class Data(pl.LightningDataModule):
    """A datamodule that counts."""

    def __init__(self):
        super().__init__()
        self.count, self.notes, self.large = 0, [1], torch.zeros(100_000)


def trained(tmp_path, *callbacks):
    """Makes a Trainer in the state of training."""
    module = stepped(3)
    trainer = make_trainer(tmp_path, *callbacks, logger=pl.loggers.CSVLogger(tmp_path))
    trainer.datamodule = Data()
    trainer.strategy.optimizers = [module.optimizer]
    config = pl.utilities.types.LRSchedulerConfig(module.schedule)
    trainer.strategy.lr_scheduler_configs = [config]
    return module, trainer


@pytest.mark.parametrize("fails", [False, True], ids=["on success", "on an error"])
def test_what_a_trainer_knows_is_put_back(tmp_path, fails):
    other = Other()
    module, trainer = trained(tmp_path, other)
    before, loop = state_of(module), trainer.fit_loop
    with fenced(nn.Linear(1, 1), trainer, fails=fails):
        trainer.should_stop, trainer.note = True, 1
        trainer.strategy.note, trainer.strategy.accelerator.note = 1, 1
        loop.epoch_progress.current.completed += 1
        loop.epoch_loop.batch_progress.total.ready += 1
        loop.epoch_loop._batches_that_stepped += 1
        module.schedule.step()
        trainer.lr_scheduler_configs[0].interval = "step"
        other.count, other.new = 1, 1
        other.notes.append(2)
        trainer.datamodule.count += 1
        trainer.datamodule.notes.append(2)
    assert (trainer.should_stop, hasattr(trainer, "note")) == (False, False)
    assert not hasattr(trainer.strategy, "note")
    assert not hasattr(trainer.strategy.accelerator, "note")
    assert loop.epoch_progress.current.completed == loop.epoch_loop.batch_progress.total.ready == 0
    assert loop.epoch_loop._batches_that_stepped == 0
    assert state_of(module) == before
    assert trainer.lr_scheduler_configs[0].interval == "epoch"
    assert (other.count, other.notes, hasattr(other, "new")) == (0, [1], False)
    assert (trainer.datamodule.count, trainer.datamodule.notes) == (0, [1])


def test_what_measures_is_left_alone(tmp_path):
    lca, other = LCACallback(), Other()
    _, trainer = trained(tmp_path, lca, other)
    with fence(trainer, seed=0, apart=[other]):
        lca.note = other.note = "left by the body"
    assert lca.note == other.note == "left by the body"


def test_large_tensors_of_others_are_watched(tmp_path):
    _, trainer = trained(tmp_path)
    with fence(trainer, seed=0):
        trainer.datamodule.large.sum()
    with (
        pytest.raises(MisconfigurationException, match=r"trainer\.datamodule\.large in place"),
        fence(trainer, seed=0),
    ):
        trainer.datamodule.large.add_(1)


def test_collection_of_garbage_goes_on():
    with fence(nn.Linear(1, 1), seed=0):
        assert gc.isenabled()


# -- random numbers -------------------------------------------------------------------------------


def streams():
    """Makes a module that owns generators, and a function that draws from all streams."""
    module = nn.Linear(1, 1)
    module.own = [torch.Generator(), np.random.default_rng(), np.random.RandomState()]
    module.python = Plain()
    module.python.random = random.Random()

    def draw():
        ours, numpy, legacy = module.own
        return [
            *(torch.rand(()).item(), torch.randn(3).sum().item(), np.random.normal()),
            *(random.random(), random.gauss(0, 1), torch.rand((), generator=ours).item()),
            *(numpy.normal(), legacy.normal(), module.python.random.gauss(0, 1)),
        ]

    return module, draw


def test_every_stream_starts_from_the_seed_at_every_entry():
    module, draw = streams()
    drawn = {}
    for seed, _ in itertools.product((0, 1, 2**40), range(3)):
        draw()  # Streams are elsewhere every time.
        with fence(module, seed=seed):
            drawn.setdefault(seed, []).append(draw() + draw())
    assert all(values == [values[0]] * 3 for values in drawn.values())
    assert all(a != b for a, b in zip(drawn[0][0], drawn[1][0], strict=True))


@pytest.mark.parametrize("fails", [False, True], ids=["on success", "on an error"])
def test_every_stream_goes_on_as_if_the_body_had_not_run(fails):
    module, draw = streams()
    with fence(module, seed=5):
        draw()  # Half of every pair of normal numbers is kept for the next call.
        expected = draw()
    with fence(module, seed=5):
        draw()
        with fenced(module, fails=fails):
            draw()
        assert draw() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_stream_of_a_device_is_seeded_and_goes_on_as_if_the_body_had_not_run():
    device = torch.device("cuda", torch.cuda.current_device())

    def draw():
        return torch.rand((), device=device).item()

    torch.cuda.manual_seed(3)
    expected = [draw(), draw()]
    torch.cuda.manual_seed(3)
    drawn = [draw()]
    inside = []
    for _ in range(2):
        with fence(seed=7, devices=[device]):
            inside.append(draw())
    assert [*drawn, draw()] == expected
    assert inside[0] == inside[1] != expected[0]


# -- what stays outside ---------------------------------------------------------------------------


def test_trainers_and_loggers_are_left_alone(tmp_path):
    module = nn.Linear(1, 1)
    logger = pl.loggers.CSVLogger(tmp_path)
    trainer = make_trainer(tmp_path, logger=logger)
    module.held, module._trainer = [trainer, logger, {"sum": sum}], trainer
    with fence(module, seed=0):
        trainer.note = logger.note = "left by the body"
    assert (trainer.note, logger.note) == ("left by the body",) * 2
    assert trainer.logger is logger


def test_hooks_that_the_body_registers_are_taken_off():
    module = nn.Linear(1, 1)
    module.register_forward_hook(print)
    with fence(module, seed=0):
        module.register_forward_hook(lambda *args: None)
    assert list(module._forward_hooks.values()) == [print]


def test_a_generator_without_a_state_is_no_obstacle():
    module = attribute(random.SystemRandom())
    with fence(module, seed=0):
        module.value.random()


def test_items_of_a_long_list_are_put_back_too():
    module = attribute([[] for _ in range(5000)])
    with fence(module, seed=0):
        module.value[4999].append(1)
    assert module.value[4999] == []


def test_what_refers_to_itself_is_put_back():
    module = attribute([Plain()])
    module.value += [module.value, module]
    module.value[0].owner = module
    with fence(module, module.value, seed=0):
        module.value[0].count = 7
        module.value.clear()
    assert [len(module.value), module.value[0].count] == [3, 0]


def test_graphs_that_are_alive_can_still_be_used():
    module = nn.BatchNorm1d(2).eval()
    loss = module(torch.randn(4, 2)).square().sum()
    with fence(module, seed=0):
        module.running_var.data.add_(1)
    loss.backward()
    assert module.weight.grad.isfinite().all()


def test_fences_nest():
    module = attribute([])
    with fence(module, seed=0):
        module.value.append(1)
        with fence(module, seed=0):
            module.value.append(2)
        assert module.value == [1]
    assert module.value == []
