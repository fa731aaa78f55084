"""A measured step as one launch of its device: the same numbers, or the way it went before.

A CPU plays the device: operations, addresses and numbers are fixed when it captures, as there.
"""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from support.accelerator import Played, take_the_cpu_for_one
from support.models import Classifier, toy_loader
from support.training import Trail, fit
from torch import nn

from lightning_lca import LCACallback
from lightning_lca.measure import captured


@pytest.fixture
def device(monkeypatch):
    """The CPU captures, and goes the ways of an accelerator."""
    take_the_cpu_for_one(monkeypatch)

    class Device(Played):
        pass

    monkeypatch.setattr(captured, "Captured", Device)
    return Device


def convnet():
    return nn.Sequential(
        *(nn.Unflatten(1, (3, 4)), nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(12, 16), nn.Dropout(0.2), nn.Linear(16, 4)),
    )


def train(path, *callbacks, steps=24, net=convnet, **arguments):
    lca = LCACallback(figures=False, **arguments)
    trail = Trail()
    data = toy_loader(samples=16 * 8, dtype=torch.float32)
    fit(path, lca, *callbacks, trail, model=lambda: Classifier(net()), data=data, steps=steps)
    return lca, trail.points


def same(a, b):
    """Whether two histories are equal to the bit."""
    for name, column in a.rows.arrays.items():
        if name != "seconds":
            assert np.array_equal(column, b.rows.arrays[name], equal_nan=True), name


class Swaps(pl.Callback):
    """Puts a weight elsewhere in memory, as averaging and offloading do."""

    def on_train_batch_start(self, trainer, module, *args):
        if trainer.global_step in (6, 13):
            weight = module.net[-1].weight
            weight.data = weight.data.clone() * 0.9


class Freezes(pl.Callback):
    def on_train_batch_start(self, trainer, module, *args):
        module.net[-1].weight.requires_grad_(not 9 <= trainer.global_step <= 13)


class Renews(pl.Callback):
    """Turns what the loss is: it is recorded anew."""

    def on_train_batch_start(self, trainer, module, *args):
        module.net[2].train(trainer.global_step < 12)


@pytest.mark.parametrize(
    ("callback", "arguments", "captures"),
    [
        (None, {}, 1),
        (None, {"quadrature": "closed_trapezoid", "neurons": True, "group_by": "parameter"}, 1),
        (None, {"track_parameters": True, "breakdown": "order", "oscillation": True}, 1),
        (None, {"every_n_steps": 2}, 1),
        (None, {"group_by": "neuron"}, 1),
        (Swaps, {}, 3),
        (Freezes, {}, 3),
        (Renews, {}, 2),
        (None, {"quadrature": "adaptive"}, 0),
        (None, {"tolerance": 1e-4}, 0),
        (None, {"probe_batches": 4}, 0),
        (None, {"breakdown": "part"}, 0),
        (None, {"probe_mode": "train"}, 0),
    ],
    ids=str,
)
def test_one_launch_finds_what_many_do(
    tmp_path, device, monkeypatch, callback, arguments, captures
):
    callbacks = [] if callback is None else [callback()]
    lca, path = train(tmp_path / "one", *callbacks, **arguments)
    assert device.captures == captures
    steps = len(lca.history)
    launches, device.launches = device.launches, 0
    assert captures == 0 or steps - 4 - 4 * captures <= launches < steps
    monkeypatch.setattr(device, "free", staticmethod(lambda device: 0))
    many, other = train(tmp_path / "many", *callbacks, **arguments)
    assert device.launches == 0
    same(lca.history, many.history)
    if arguments.get("track_parameters"):
        assert all(map(torch.equal, lca.totals.values(), many.totals.values()))
    for one, two in zip(path, other, strict=True):
        assert all(map(torch.equal, one.values(), two.values()))
