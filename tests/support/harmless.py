"""Training twice, with and without the callback: what a user could see of it, and what differs.

`fit` collects it; `Awkward` and what follows are models that do what users do beside their forward.
"""

from __future__ import annotations

import copy
import csv
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchmetrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_flatten

from lightning_lca import LCACallback
from support.models import Classifier, pl, toy_loader
from support.training import make_trainer

CSVLogger, TensorBoardLogger = pl.loggers.CSVLogger, pl.loggers.TensorBoardLogger
Logger = pl.loggers.logger.Logger


def random_state():
    return torch.random.get_rng_state(), np.random.get_state(), random.getstate()


def foreign(metrics):
    return {k: v for k, v in metrics.items() if not k.startswith("lca")}


class Recorder(Logger):
    """Keeps every call; its ``experiment`` is itself."""

    name, version, save_dir = "recorder", 0, None

    def __init__(self):
        super().__init__()
        self.calls = []

    @property
    def experiment(self):
        return self

    def note(self, *values):
        self.calls.append(("note", *values))

    def log_metrics(self, metrics, step=None):
        if foreign(metrics):
            self.calls.append(("metrics", foreign(metrics), step))

    def log_hyperparams(self, params, *args, **kwargs):
        self.calls.append(("hyperparameters", dict(params)))


class Watcher(pl.Callback):
    """Notes at every batch what a later callback sees of training."""

    def __init__(self):
        self.seen = []

    def note(self, module, batch=None):
        gradients = [copy.deepcopy(p.grad) for p in module.parameters()]
        flags = [m.training for m in module.modules()]
        trained = [p.requires_grad for p in module.parameters()]
        state = [p.detach().clone() for p in (*module.parameters(), *module.buffers())]
        notes = {"gradients": gradients, "training": flags, "requires_grad": trained}
        notes |= {"weights and buffers": state, "random": random_state()}
        self.seen.append(notes | {"batch": copy.deepcopy(batch)})

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.note(pl_module, batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.note(pl_module)

    def on_validation_start(self, trainer, pl_module):
        self.note(pl_module)


@dataclass
class Case:
    """What is trained, on what, and how it is measured."""

    model: Callable[[], Any] = Classifier
    data: Callable[[], Any] = lambda: (toy_loader(samples=48),)
    callbacks: Callable[[Any], Any] = lambda path: ()
    trainer: dict[str, Any] = field(default_factory=dict)
    lca: Any = field(default_factory=dict)  # Keywords, or a function of the data that gives them.
    resume: Any = None


class BoomError(Exception):
    """Raised on purpose."""


def fit(case, path, *first, lca=None):
    """Trains once from a fixed seed; gives everything that a user could see of it."""
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    model, data = case.model(), case.data()
    if lca is not None:
        options = case.lca(*data) if callable(case.lca) else case.lca
        lca.append(LCACallback(**({"probe_batches": 2} | options)))
        first = (*first, lca[-1])
    others, watcher = case.callbacks(path), Watcher()
    loggers = [Recorder(), CSVLogger(path, "csv"), TensorBoardLogger(path, "tb")]
    options = {"max_steps": 7, "logger": loggers, "log_every_n_steps": 2, "num_sanity_val_steps": 0}
    # The first of several keeps the directory: so the one that was there before must come first.
    kin = [other for other in others if isinstance(other, LCACallback)]
    rest = [other for other in others if other not in kin]
    trainer = make_trainer(path, *kin, *first, *rest, watcher, **(options | case.trainer))
    raised = None
    try:
        trainer.fit(model, *data, ckpt_path=case.resume)
    except BoomError as boom:
        raised = boom
    return {
        "seen": watcher.seen,
        "model": model,
        "data": [(d.dataset, d.generator, d.collate_fn) for d in tree_flatten(data)[0]],
        "optimizers": [o.state_dict() for o in trainer.optimizers],
        "schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
        "callbacks": [c.state_dict() for c in others],
        "checkpoints": {file.name: read_checkpoint(file) for file in sorted(path.rglob("*.ckpt"))},
        "recorder": loggers[0].calls,
        "csv": read_csv(path / "csv"),
        "tensorboard": read_tensorboard(path / "tb"),
        "callback_metrics": dict(trainer.callback_metrics),
        "logged_metrics": dict(trainer.logged_metrics),
        "progress_bar_metrics": dict(trainer.progress_bar_metrics),
        "loggers": [logger is mine for logger, mine in zip(trainer.loggers, loggers, strict=True)],
        "random": random_state(),
        "done": (trainer.global_step, trainer.current_epoch, type(raised), repr(raised)),
    }


def read_checkpoint(file):
    saved = torch.load(file, weights_only=False)
    return {k: v for k, v in saved.items() if k != "callbacks"}  # Those are compared directly.


def read_csv(path):
    rows = []
    for file in path.rglob("metrics.csv"):
        with file.open() as lines:
            # Old Lightnings write the columns in an order that differs from process to process.
            found = [sorted(foreign(row).items()) for row in csv.DictReader(lines)]
            rows += [{k: v for k, v in row if v} for row in found]
    return [row for row in rows if row.keys() - {"step"}]


def read_tensorboard(path):
    values = {}
    for file in path.rglob("*tfevents*"):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        tags = events.Tags()
        values |= {t: [(e.step, e.value) for e in events.Scalars(t)] for t in tags["scalars"]}
        values |= dict.fromkeys(tags["tensors"])
    return dict(sorted(foreign(values).items()))


def twins(case, tmp_path, capsys):
    """Trains without and with the callback, in a directory of one name: both runs, the callback."""
    lca, runs = [], []
    capsys.readouterr()
    for name in ("plain", "measured"):
        directory = tmp_path / "run"
        run = fit(case, directory, lca=lca if name == "measured" else None)
        runs.append(run | {"printed": capsys.readouterr().out})
        directory.rename(tmp_path / name)
    return *runs, lca[0]


# -- awkward models -------------------------------------------------------------------------------


class Awkward(Classifier):
    """A classifier that does something beside its forward; subclasses can be combined."""

    def __init__(self, net=None, optimizer=None):
        super().__init__(rich_net() if net is None else net, optimizer)
        self.begin()

    def begin(self):
        pass

    def awkward(self, x, y):
        return x

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(self.awkward(x, y)), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss


def rich_net():
    first = parametrizations.spectral_norm(nn.Linear(12, 16))
    norm, dropout = nn.BatchNorm1d(16), nn.Dropout(0.3)
    return nn.Sequential(first, norm, nn.Tanh(), dropout, nn.Linear(16, 4))


class OwnGenerators(Awkward):
    def begin(self):
        super().begin()
        self.torch_random = torch.Generator().manual_seed(4)
        self.held = {"numpy": np.random.default_rng(5), "python": [random.Random(6)]}
        self.legacy = Remembering(np.random.RandomState(7))

    def awkward(self, x, y):
        x = super().awkward(x, y) + 0.1 * torch.randn(len(x), 1, generator=self.torch_random)
        noise = self.held["numpy"].normal() + self.held["python"][0].gauss(0, 1)
        return x + 0.1 * (noise + self.legacy.last.normal())


class GlobalRandomness(Awkward):
    def awkward(self, x, y):
        x = super().awkward(x, y) + 0.1 * torch.randn_like(x)
        return x + 0.1 * (np.random.normal() + random.gauss(0, 1))


class Remembering:
    """A plain object of the user's."""

    def __init__(self, last=None):
        self.last, self.count, self.trail = last, 0, []


class Remembers(Awkward):
    """Keeps notes in containers and objects, and reads them."""

    def begin(self):
        super().begin()
        self.steps, self.losses, self.means = 0, [], {"x": {"sum": torch.zeros(12)}}
        self.recent, self.labels, self.tally = deque(maxlen=3), set(), Counter()
        self.memory, self.pair, self.table = Remembering(), ([], {}), np.zeros(4)
        self.center = None
        self.register_buffer("average", torch.zeros(12))

    def awkward(self, x, y):
        x = super().awkward(x, y)
        self.steps += 1
        self.losses.append(float(x.detach().mean()))
        self.means["x"]["sum"] += x.detach().mean(0).float()
        self.means[f"step {self.steps}"] = self.steps
        self.recent.append(x.detach().sum().item())
        self.labels.add(int(y.sum()))
        self.tally.update(y.tolist())
        self.memory.count += 1
        self.memory.trail.append(y.clone())
        self.memory.last = x.detach().clone()
        self.pair[0].append(self.steps)
        self.table[y[0]] += 1
        self.center = x.detach().mean() if self.center is None else 0.9 * self.center
        self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
        noise = len(self.losses) + len(self.means) + sum(self.recent) + len(self.labels)
        noise += self.tally[0] + self.memory.count + len(self.pair[0]) + self.table[0]
        return x + 1e-3 * noise + 0.1 * (self.center + self.average)


class Metered(Awkward):
    def begin(self):
        super().begin()
        accuracy = torchmetrics.Accuracy("multiclass", num_classes=4)
        recall = torchmetrics.Recall("multiclass", num_classes=4, average="macro")
        precision = torchmetrics.Precision("multiclass", num_classes=4, average="macro")
        self.accuracy, self.mean = accuracy, torchmetrics.CatMetric()
        self.collection = torchmetrics.MetricCollection([recall, precision])

    def awkward(self, x, y):
        x = super().awkward(x, y)
        guess = (y + (x[:, 0] > 0).long()) % 4
        self.accuracy(guess, y)
        self.mean.update(x.detach().mean())
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict(self.collection(guess, y))
        return x + 1e-2 * (self.mean.compute().mean() + self.accuracy.compute())


class Loud(Awkward):
    def awkward(self, x, y):
        x, at = super().awkward(x, y), self.global_step
        self.logger.log_metrics({"direct": x.sum().item()}, step=at)
        self.logger.experiment.note("y", y.tolist())
        self.loggers[1].log_metrics({"direct_csv": x.sum().item()}, step=at)
        self.loggers[2].experiment.add_scalar("direct_tensorboard", x.sum().item(), at)
        self.print("step", at, x.sum().item())
        self.log_dict({"a": x.mean(), "b": x.sum()}, prog_bar=True, on_epoch=True, on_step=False)
        return x


class Inner(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.scale, self.calls = nn.Linear(12, 12), []

    def forward(self, x):
        self.calls.append(len(x))
        self.print("inner", len(self.calls))
        return x + 1e-2 * len(self.calls) * self.scale(x)


class Nesting(Awkward):
    def begin(self):
        super().begin()
        self.inner = Inner()

    def awkward(self, x, y):
        return self.inner(super().awkward(x, y))


class Everything(OwnGenerators, GlobalRandomness, Remembers, Metered, Loud, Nesting):
    """All of them at once."""


class Validated(Everything):
    """The same, with a validation whose tensors, made in inference mode, stay on the module."""

    def begin(self):
        super().begin()
        self.validated, self.score = [], torchmetrics.Accuracy("multiclass", num_classes=4)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        self.validated.append(logits)
        self.score(logits, y)
        self.log("val_score", self.score)
        self.log("val_loss", F.cross_entropy(logits, y))


def both():
    return toy_loader(samples=48), toy_loader(samples=32, shuffle=False)


validating = {"val_check_interval": 2, "num_sanity_val_steps": 2}
