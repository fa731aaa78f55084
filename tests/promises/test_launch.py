"""A measured step without its Python: the same numbers, or the way it went before.

On a CPU it goes straight through its operations; on a device it is one launch, which a CPU plays
here: operations, addresses and numbers are fixed when it captures, as there.
"""

import gc
from contextlib import nullcontext

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from support.accelerator import Played, take_the_cpu_for_one
from support.models import Classifier, mlp, toy_loader
from support.training import Trail, fit
from torch import nn

from lightning_lca import LCACallback
from lightning_lca.measure import captured
from lightning_lca.measure.captured import Repeated, Straight
from lightning_lca.training.meter import Meter


def two_terms(module, batch):
    decay = 1e-3 * sum(p.square().sum() for p in module.parameters())
    return {"loss": nn.functional.cross_entropy(module.net(batch[0]), batch[1]), "decay": decay}


class Counted(Straight):
    """Counts."""

    launches = 0
    captures = 0

    def __init__(self, function):
        super().__init__(function)
        Counted.captures += not self.why_not

    def launch(self):
        Counted.launches += 1
        return super().launch()


@pytest.fixture(params=["straight", "at once"])
def way(request, monkeypatch):
    """Counts what goes without Python."""
    if request.param == "straight":
        monkeypatch.setattr(captured, "Straight", Counted)
        Counted.launches = Counted.captures = 0
        return Counted
    take_the_cpu_for_one(monkeypatch)

    class Device(Played):
        pass

    monkeypatch.setattr(captured, "Captured", Device)
    return Device


def step_by_step(monkeypatch):
    monkeypatch.setattr(Repeated, "__call__", lambda self, function, *_, **__: function())


def convnet():
    return nn.Sequential(
        *(nn.Unflatten(1, (3, 4)), nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(12, 16), nn.Dropout(0.2), nn.Linear(16, 4)),
    )


def train(path, *callbacks, steps=24, net=convnet, precision="32-true", **arguments):
    lca = LCACallback(figures=False, **arguments)
    trail, keeps = Trail(), Keeps(lca)
    dtype = torch.float64 if precision == "64-true" else torch.float32
    data, trainer = toy_loader(samples=16 * 8, dtype=dtype), {"precision": precision}
    fit(
        *(path, lca, *callbacks, trail, keeps),
        **{"model": lambda: Classifier(net()), "data": data, "steps": steps, "trainer": trainer},
    )
    return lca, trail.points, keeps


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


class Stumbles(pl.Callback):
    """Moves weights between two steps, and back: the next start is evaluated."""

    def on_train_batch_start(self, trainer, module, *args):
        if trainer.global_step in (8, 9):
            factor = 30 if trainer.global_step == 8 else 1 / 30
            with torch.no_grad():
                module.net[-1].weight.mul_(factor)


class Keeps(pl.Callback):
    """Keeps what is told of single steps, and counts gradients."""

    def __init__(self, lca):
        self.lca, self.last, self.gradients = lca, [], []

    def on_train_batch_end(self, *args):
        if self.lca._settings.track_parameters:
            self.last.append((self.lca.last.loss_before, self.lca.last.loss_after))
        meters = self.lca._training.meters.values()
        self.gradients.append([meter.gradients for meter in meters])


# A callback, arguments, and how often a way is settled on.
WAYS = {
    "plain": (None, {}, 1),
    "one gradient": (
        *(None, {"quadrature": "closed_trapezoid", "neurons": True, "group_by": "parameter"}, 1),
    ),
    "shares": (None, {"track_parameters": True, "breakdown": "order", "oscillation": True}, 1),
    "chords": (None, {"every_n_steps": 2}, 1),
    "double": (None, {"group_by": "neuron", "precision": "64-true"}, 1),
    "mixed": (None, {"precision": "bf16-mixed"}, 1),
    "two probes": (None, {"probe": {"a": "train", "b": "train"}}, 2),
    "four batches": (None, {"probe_batches": 4}, 1),
    "no start": (None, {"probe_batches": 2, "quadrature": "midpoint"}, 1),
    "terms": (None, {"breakdown": "term", "loss_fn": two_terms, "probe_batches": 2}, 1),
    "swaps": (Swaps, {}, 3),
    "freezes": (Freezes, {}, 3),
    "renews": (Renews, {}, 2),
    "stumbles": (Stumbles, {}, 1),
    "adaptive": (None, {"quadrature": "adaptive"}, 0),
    "refined": (None, {"tolerance": 1e-4}, 0),
    "parts": (None, {"breakdown": "part"}, 0),
    "dropout": (None, {"probe_mode": "train"}, 0),
}


@pytest.mark.parametrize(("callback", "arguments", "captures"), WAYS.values(), ids=WAYS)
def test_without_python_it_finds_the_same(
    tmp_path, way, monkeypatch, callback, arguments, captures
):
    callbacks = [] if callback is None else [callback()]
    lca, path, keeps = train(tmp_path / "one", *callbacks, **arguments)
    assert way.captures == captures
    steps = len(lca.history)
    launches, way.launches = way.launches, 0
    if captures:
        probes = len(lca.histories)
        assert probes * steps - 6 * captures <= launches < probes * steps
    with monkeypatch.context() as patch:
        step_by_step(patch)
        many, other, kept = train(tmp_path / "many", *callbacks, **arguments)
    assert way.launches == 0
    for name, history in lca.histories.items():
        same(history, many.histories[name])
    assert keeps.gradients == kept.gradients
    if arguments.get("track_parameters"):
        assert keeps.last == kept.last
        assert all(map(torch.equal, lca.totals.values(), many.totals.values()))
    for one, two in zip(path, other, strict=True):
        assert all(map(torch.equal, one.values(), two.values()))


def test_a_step_that_breaks_off_in_the_middle_leaves_the_weights_where_they_are(
    tmp_path, way, monkeypatch
):
    class Weights(pl.Callback):
        """Comes before the one that measures."""

        def on_train_batch_end(self, trainer, module, *args):
            self.seen = [p.detach().clone() for p in module.parameters()]

        def on_exception(self, trainer, module, error):
            self.left = [p.detach().clone() for p in module.parameters()]

    launch = way.launch

    def breaks_off(self):
        if way.launches == 5:
            stop = spans[-1].stop
            for memory in stop.wholes:  # As if it had been moved to the middle.
                memory.mul_(2.0)
            raise RuntimeError("no memory")
        return launch(self)

    spans = []
    repeat = Meter._repeat
    monkeypatch.setattr(Meter, "_repeat", lambda self, s: spans.append(s) or repeat(self, s))
    monkeypatch.setattr(way, "launch", breaks_off)
    weights = Weights()
    lca = LCACallback(figures=False)
    with pytest.raises(RuntimeError, match="no memory"):
        fit(tmp_path, weights, lca, model=lambda: Classifier(mlp()), data=toy_loader(), steps=12)
    assert all(map(torch.equal, weights.seen, weights.left))


@pytest.mark.parametrize("breaks_off", [False, True])
def test_after_training_nobody_holds_the_memory_of_the_weights(tmp_path, way, breaks_off):
    class Ends(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if breaks_off and trainer.global_step == 10:
                raise RuntimeError("enough")

    lca = LCACallback(figures=False)
    model = Classifier(mlp())
    with pytest.raises(RuntimeError, match="enough") if breaks_off else nullcontext():
        fit(tmp_path, lca, Ends(), model=model, data=toy_loader(), steps=12)
    assert way.launches > 0
    gc.collect()
    places = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor]
    tensors = [t for t in tensors if t.layout == torch.strided]
    assert not [t for t in tensors if t.untyped_storage().data_ptr() in places]
    assert len(lca.history) >= 9


def test_what_reads_a_number_is_run_as_it_is():
    x = torch.ones(3)

    def function():
        return (x * float(x.sum()),)

    repeated = Repeated()
    for scale in (1.0, 2.0, 3.0, 4.0):
        x.fill_(scale)
        (found,) = repeated(function, (x,), (), x.device)
        assert found.tolist() == [3 * scale**2] * 3
    assert "a number is read" in repeated.why_not


def test_operations_that_nobody_needs_are_left_out_and_views_are_made_once():
    x, y = torch.arange(6.0).view(2, 3), torch.zeros(3)

    def function():
        x.t().exp()  # Nobody needs it.
        y.add_(x.t()[:, 0])
        return (y * 2, x.sum())

    straight = Straight(function)
    with torch.no_grad():
        for _ in range(3):
            doubled, total = straight.launch()
    assert y.tolist() == [0.0, 4.0, 8.0]
    assert doubled.tolist() == [0.0, 8.0, 16.0]
    assert total.item() == 15.0
    assert len(straight._run.__code__.co_names) == 3 + 3  # add_, mul, sum; x's view, y, x.
