"""The fence, held against everything that it claims to put back, one kind of value at a time."""

from __future__ import annotations

import itertools
import random
from argparse import Namespace
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from support.models import pl
from support.training import make_trainer
from torch import nn

from lightning_lca.probe.isolation import fence


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
