"""What tests assert of values, histories and records; and how they read what was logged."""

import itertools
import random
import sys
from collections import deque
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_lca.record.tables import StepTable
from support import TESTS

TABLES = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules", "training"}
NOT_STATE = TABLES | {"_trainer", "_fabric", "_metric_attributes"}  # The last is keyed by id.


def differences(a, b, where="", seen=None):
    """Names the places at which two values are not the same, to the bit."""
    seen = set() if seen is None else seen
    if id(a) in seen:
        return
    if type(a).__name__ != type(b).__name__:  # A parametrized module's class is its own.
        yield f"{where}: {type(a).__name__} became {type(b).__name__}"
    elif isinstance(a, Tensor):
        if bits(a) != bits(b) or a.requires_grad != b.requires_grad:
            yield where
    elif isinstance(a, torch.Generator):
        yield from differences(a.get_state(), b.get_state(), where)
    elif isinstance(a, random.Random):
        yield from differences(a.getstate(), b.getstate(), where)
    elif isinstance(a, np.random.Generator):
        yield from differences(a.bit_generator.state, b.bit_generator.state, where)
    elif isinstance(a, nn.Module):
        seen.add(id(a))
        a, b = ({k: v for k, v in vars(m).items() if k not in NOT_STATE} for m in (a, b))
        yield from differences(a, b, where, seen)
    elif isinstance(a, dict):
        if list(a) != list(b):
            yield f"{where}: keys {list(a)} became {list(b)}"
        for key in filter(b.__contains__, a):
            yield from differences(a[key], b[key], f"{where}.{key}", seen)
    elif isinstance(a, list | tuple | deque):
        if len(a) != len(b):
            yield f"{where}: {len(a)} items became {len(b)}"
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from differences(x, y, f"{where}.{i}", seen)
    elif isinstance(a, np.ndarray):
        if (a.dtype, a.shape, a.tobytes()) != (b.dtype, b.shape, b.tobytes()):
            yield where
    elif isinstance(a, SimpleNamespace | Dataset) or is_of_tests(type(a)):
        a, b = ({n: getattr(o, n) for n in attributes_of(o)} for o in (a, b))
        yield from differences(a, b, where, seen)
    elif isinstance(a, int | float | str | bytes | set | type(None)) and a != b and a == a:
        yield f"{where}: {a!r} became {b!r}"


def is_of_tests(kind):
    """Says whether a class was written here, as a user writes one."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return file is not None and Path(file).is_relative_to(TESTS)


def attributes_of(value):
    return vars(value) if hasattr(value, "__dict__") else value.__slots__


def bits(tensor):
    """Gives dtype, shape and every bit of a tensor, so that NaN equals NaN and 0.0 is not -0.0."""
    tensor = tensor.detach()
    if tensor.is_sparse:
        return "sparse", tensor.shape, bits(tensor._indices()), bits(tensor._values())
    flat = tensor.contiguous().flatten()
    return tensor.dtype, tensor.shape, flat.view(torch.uint8).numpy().tobytes()


def assert_same(plain, measured):
    """Two values, of whatever kinds, are the same to the bit."""
    different = list(itertools.islice(differences(plain, measured), 12))
    assert not different, "\n".join(["measuring changed", *different])


def assert_same_history(a, b, *, rows_alone=False):
    """Two histories are the same to the bit, windows included, clocks apart."""
    assert a.groups == b.groups
    for column in {field.name for field in fields(StepTable)} - {"seconds", "shares"}:
        mine, theirs = getattr(a.rows, column), getattr(b.rows, column)
        assert np.array_equal(mine, theirs), column
    assert a.split_columns == b.split_columns
    for name, mine in a.rows.shares.items():
        assert np.array_equal(mine, b.rows.shares[name], equal_nan=True), name
    if rows_alone:
        return
    assert a.windows.keys() == b.windows.keys()
    for name, mine in a.windows.items():
        theirs = b.windows[name]
        assert mine.names == theirs.names, name
        for column in ("steps", "measured", "allocated", "helping"):
            assert np.array_equal(getattr(mine, column), getattr(theirs, column)), (name, column)


def assert_ledger_closes(history, relative):
    """Credits, residuals and drifts are the loss's whole way, and each step's its own."""
    change = history.loss_after[-1] - history.loss_before[0]
    booked = history.allocated.sum() + history.residual.sum() + history.drift.sum()
    assert booked == pytest.approx(change, rel=relative)
    assert np.isfinite(history.allocated).all()
    within = history.loss_before + history.allocated.sum(1) + history.residual
    assert within == pytest.approx(history.loss_after, rel=relative)
    assert history.loss_before[1:] - history.loss_after[:-1] == pytest.approx(
        history.drift[1:], abs=relative * np.abs(history.loss_before[0])
    )


def scalars(log_dir):
    """Every scalar of ours that TensorBoard would show, {tag: [(step, value)]}."""
    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("lca")]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}
