"""The way of an accelerator, walked on the CPU: the same history, and nothing read between logs."""

import numpy as np
import pytest
import torch
from support.accelerator import take_the_cpu_for_one
from support.models import Classifier, mlp, toy_loader
from support.training import Guarded, fit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lca import LCACallback
from lightning_lca.measure.tensors import DeferredBool

WAITS = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "unique")


@pytest.fixture
def accelerated(monkeypatch):
    take_the_cpu_for_one(monkeypatch)


def convnet():
    return nn.Sequential(
        nn.Unflatten(1, (3, 4)),
        nn.ConvTranspose1d(3, 6, 3, groups=3),
        nn.BatchNorm1d(6),
        nn.Flatten(),
        nn.Linear(36, 1100),
        nn.Linear(1100, 1000),  # One tensor that stands alone.
        nn.Linear(1000, 4),
    )


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-3)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True)


def train(path, lca, net=convnet, steps=8, samples=96, optimizer=adam):
    def model():
        return Classifier(net(), optimizer)

    data, double = toy_loader(samples=samples, dtype=torch.float64), {"precision": "64-true"}
    return fit(path, lca, model=model, data=data, steps=steps, run_seed=2, trainer=double).lca


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"quadrature": "midpoint"},
        {"tolerance": 1e-8},
        {"group_by": "neuron"},
        {"neurons": True, "every_n_steps": 3},
        {"breakdown": True, "oscillation": True, "probe_batches": 3},
        {"breakdown": "part", "every_n_steps": 3},
    ],
    ids=str,
)
def test_both_ways_give_the_same_history(tmp_path, request, arguments):
    def run(name):
        lca = LCACallback(figures=False, **arguments)
        return train(tmp_path / name, lca).history

    cpu = run("cpu")
    request.getfixturevalue("accelerated")
    other = run("accelerator")
    largest = np.abs(cpu.allocated).max()
    assert np.allclose(other.allocated, cpu.allocated, rtol=0, atol=1e-12 * largest)
    assert np.array_equal(other.helping, cpu.helping)
    assert np.array_equal(other.hurting, cpu.hurting)
    assert np.allclose(other.residual, cpu.residual, rtol=0, atol=1e-12)
    assert np.array_equal(other.drift, cpu.drift)
    for name, shares in cpu.rows.shares.items():
        mine = other.rows.shares[name]
        assert np.allclose(mine, shares, rtol=1e-9, atol=1e-12, equal_nan=True), name
    if "neurons" in arguments:
        credit = cpu.neurons.allocated
        assert np.allclose(other.neurons.allocated, credit, rtol=0, atol=1e-12 * largest)


class Reads(TorchDispatchMode):
    """Notes every operation that makes the host wait for a value of the device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in WAITS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"neurons": True, "track_parameters": True},
        {"breakdown": True, "oscillation": True, "probe_batches": 4},
        {"breakdown": "part", "every_n_steps": 2},
    ],
    ids=str,
)
def test_the_host_reads_nothing_between_logs(tmp_path, accelerated, monkeypatch, arguments):
    read = DeferredBool.__bool__

    def without_notes(flag):
        with torch.utils._python_dispatch._disable_current_modes():
            return read(flag)

    monkeypatch.setattr(DeferredBool, "__bool__", without_notes)
    reads = Reads()  # Flags that were sent ahead do not count.
    watched = Guarded(lambda: reads, log_every_n_steps=30, figures=False, **arguments)
    # In one epoch: at the start of each the user's code runs to audit the recording.
    # Adam counts its steps on the host, where reading them makes nobody wait.
    lca = train(tmp_path, watched, net=mlp, steps=30, samples=16 * 30, optimizer=sgd)
    assert len(lca.history) == 30 // arguments.get("every_n_steps", 1)
    assert lca.history.settings["evaluated"] == "recorded"
    assert reads.seen == []
    with reads:
        bool(torch.ones(1) > 0)
    assert reads.seen, "the watch is able to see it"
