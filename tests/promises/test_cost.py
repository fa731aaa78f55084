"""What a measured step asks of the host, in counts that are exact: times are for benchmarks."""

import sys
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from support.models import Classifier, pl, toy_loader
from support.training import make_trainer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lca import LCACallback

FROM, TO = 24, 44  # Steps that are counted: none of them is audited, logged or told of.


class Ops(TorchDispatchMode):
    """Counts what torch is asked to compute."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


class Calls:
    """Counts calls of Python functions."""

    def __init__(self):
        self.count = 0

    def __enter__(self):
        sys.setprofile(lambda frame, event, arg: self._note(event))
        return self

    def __exit__(self, *error):
        sys.setprofile(None)

    def _note(self, event):
        self.count += event == "call"


class Bare(pl.Callback):
    """Two gradients of the loss on one batch, and nothing else."""

    def on_train_start(self, trainer, module):
        self.batch = next(iter(toy_loader(shuffle=False)))

    def on_train_batch_end(self, trainer, module, *args):
        for _ in range(2):
            loss = F.cross_entropy(module.net(self.batch[0]), self.batch[1])
            torch.autograd.grad(loss, list(module.parameters()))


@contextmanager
def counting(kind):
    counter = kind()
    with counter:
        yield counter


class Counted(pl.Callback):
    """Counts from the end of one batch to the end of another, in front of all other callbacks."""

    def __init__(self, kind):
        self.counter, self.before = kind(), 0

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == FROM:
            self.counter.__enter__()
        if trainer.global_step == TO:
            self.counter.__exit__(None, None, None)


def deep(layers):
    hidden = [layer for _ in range(layers - 1) for layer in (nn.Linear(12, 12), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(12, 4))


def count(path, kind, layers, *callbacks):
    """Counts what one step asks for."""
    pl.seed_everything(3, verbose=False)
    counted = Counted(kind)
    trainer = make_trainer(
        path,
        counted,
        *callbacks,
        max_steps=TO + 2,
        log_every_n_steps=1000,
        enable_checkpointing=False,
    )
    trainer.fit(Classifier(deep(layers)), toy_loader(samples=16 * (TO + 4)))
    return counted.counter.count / (TO - FROM)


@pytest.mark.parametrize(("kind", "least", "per_layer"), [(Calls, 1500, 60), (Ops, 80, 10)])
def test_beyond_two_bare_gradients_a_measured_step_asks_little_of_the_host(
    tmp_path, kind, least, per_layer
):
    few, many = 4, 24
    extra = {}
    for layers in (few, many):
        bare = count(tmp_path / f"bare{layers}", kind, layers, Bare())
        lca = LCACallback(figures=False)
        extra[layers] = count(tmp_path / f"lca{layers}", kind, layers, lca) - bare
        assert lca.history.settings["evaluated"] == "recorded"
    slope = (extra[many] - extra[few]) / (many - few)
    print(kind.__name__, extra, slope)
    assert slope <= per_layer
    assert extra[few] - few * slope <= least
