"""Harmless: training with and without the callback is the same, bit for bit.

Every case is trained twice from one seed, without and with LCACallback, and everything that a user
could see of the two runs is compared: `fit` collects it, `differences` names what is not the same.
"""

from __future__ import annotations

import copy
import csv
import functools
import itertools
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from cases import Classifier, make_trainer, mlp, pl, toy_data, toy_loader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, random_split

from lightning_lca import LCACallback

plc = pl.callbacks
CSVLogger, TensorBoardLogger = pl.loggers.CSVLogger, pl.loggers.TensorBoardLogger
Logger = pl.loggers.logger.Logger

# -- what is compared -----------------------------------------------------------------------------

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
    elif isinstance(a, Slotted):
        yield from differences(a.count, b.count, where)
    elif isinstance(a, SimpleNamespace | Dataset) or type(a).__module__ == __name__:
        yield from differences(vars(a), vars(b), where, seen)
    elif isinstance(a, int | float | str | bytes | set | type(None)) and a != b and a == a:
        yield f"{where}: {a!r} became {b!r}"


def bits(tensor):
    """Gives dtype, shape and every bit of a tensor, so that NaN equals NaN and 0.0 is not -0.0."""
    tensor = tensor.detach()
    if tensor.is_sparse:
        return "sparse", tensor.shape, bits(tensor._indices()), bits(tensor._values())
    flat = tensor.contiguous().flatten()
    return tensor.dtype, tensor.shape, flat.view(torch.uint8).numpy().tobytes()


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
    trainer = make_trainer(path, *first, *others, watcher, **(options | case.trainer))
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


def assert_same(plain, measured):
    different = list(itertools.islice(differences(plain, measured), 12))
    assert not different, "\n".join(["measuring changed", *different])


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


@dataclass(slots=True)
class Slotted:
    count: int = 0


class RemembersOddly(Awkward):
    """The same in containers with ways of their own; one kind at a time, by name."""

    def __init__(self, kind):
        self.kind = kind
        super().__init__()

    def begin(self):
        kinds = {"ordered": OrderedDict(a=0, b=0), "space": SimpleNamespace(count=0)}
        self.odd = (kinds | {"slots": Slotted()})[self.kind]

    def awkward(self, x, y):
        if self.kind != "ordered":
            self.odd.count += 1
            return x + 0.1 * self.odd.count
        self.odd[int(y.sum())] = len(self.odd)  # A cache that drops its oldest entry.
        self.odd.move_to_end(next(iter(self.odd)))
        self.odd.popitem(last=False)
        return x + 0.1 * sum(self.odd.values())


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


class Alternating(Everything):
    """All of them, and two optimizers that it steps itself, each with the other toggled off."""

    def begin(self):
        super().begin()
        self.automatic_optimization = False

    def loss(self, batch):
        return super().training_step(batch, 0)

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        first, last = self.net[:3].parameters(), self.net[3:].parameters()
        return [torch.optim.Adam(first, 0.01), torch.optim.SGD(last, 0.1, momentum=0.9)]


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


class WritesIntoItsBatch(Awkward):
    def awkward(self, x, y):
        y.add_(1).remainder_(4)
        return x.mul_(1.1)


class WritesInTransfer(Awkward):
    def begin(self):
        self.transfers = []

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.transfers.append(np.random.normal() + random.gauss(0, 1))
        batch[0].mul_(1.1).add_(0.1 * torch.randn(12) + 0.1 * sum(self.transfers))
        return batch


class Teacher(Awkward):
    """Follows its own net with a frozen copy, which its loss reads."""

    def __init__(self, begin_at=0, registered=True, ballast=1):
        self.begin_at, self.registered, self.ballast = begin_at, registered, ballast
        super().__init__()

    def begin(self):
        self.teacher = nn.Linear(16, 4).requires_grad_(False)
        self.backbone = nn.Linear(self.ballast, self.ballast).requires_grad_(False)
        if not self.registered:
            self.hidden = [self._modules.pop("teacher")]

    def awkward(self, x, y):
        teacher = self.teacher if self.registered else self.hidden[0]
        if self.global_step >= self.begin_at:
            for ours, theirs in zip(teacher.parameters(), self.net[-1].parameters(), strict=True):
                ours.data.lerp_(theirs.data, 0.3)
        return x + 0.1 * teacher(x.new_ones(16)).sum()


class ShrinksItsWeights(Awkward):
    def awkward(self, x, y):
        with torch.no_grad():
            self.net[-1].weight.mul_(0.95)
        return x


class Thaws(Awkward):
    """Trains its first layer at some of its calls."""

    def __init__(self, thaws):
        self.thaws = thaws
        super().__init__()

    def begin(self):
        self.calls, self.early = 0, nn.Linear(12, 12).requires_grad_(False)

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())

    def awkward(self, x, y):
        self.calls += 1
        self.early.requires_grad_(self.thaws(self.calls))
        return self.early(x)


class SetsItsRate(Awkward):
    def awkward(self, x, y):
        for group in self.optimizers().param_groups:
            group["lr"] *= 0.9
        return x


class AsksToStop(Awkward):
    def begin(self):
        self.calls = 0

    def awkward(self, x, y):
        self.calls += 1
        self.trainer.should_stop = self.trainer.should_stop or self.calls == 5
        return x


class Adversarial(Awkward):
    """Attacks its own input by a backward pass of its own."""

    def begin(self):
        self.net[3].p = 0.0

    def awkward(self, x, y):
        x = x.clone().requires_grad_()
        F.cross_entropy(self.net(x), y).backward()
        return (x + 0.1 * x.grad.sign()).detach()


class GathersGradients(Awkward):
    """Keeps a perturbation that is no parameter, and the sum of its gradients."""

    def begin(self):
        self.push = torch.zeros(12, requires_grad=True)

    def awkward(self, x, y):
        F.cross_entropy(self.net(x + self.push), y).backward(inputs=[self.push])
        return x + 0.1 * self.push.grad


class Skips(Classifier):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 2 else super().training_step(batch, batch_idx)


class WithoutIndex(Classifier):
    def training_step(self, batch):
        return super().training_step(batch, 0)


class LogsLate(Classifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "extra": batch[0].sum()}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("late", outputs["extra"] + outputs["loss"])


class TwoLoaders(Classifier):
    def training_step(self, batch, batch_idx):
        return sum(super(TwoLoaders, self).training_step(batch[k], batch_idx) for k in batch)


class LoadsItself(Classifier):
    """Gives its own loaders, and counts how often it is asked for them."""

    asked = 0

    def train_dataloader(self):
        return toy_loader(samples=48)

    def val_dataloader(self):
        self.asked += 1
        return toy_loader(samples=16 * self.asked, shuffle=False)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", super().training_step(batch, batch_idx))


class Net(nn.Module):
    """A network whose forward is a function of itself and x."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


def lstm():
    cell = nn.LSTM(3, 8, num_layers=2, dropout=0.3, batch_first=True)
    return Net(lambda m, x: m.head(m.cell(x.view(-1, 4, 3))[0][:, -1]), cell=cell, head=mlp(8))


def transformer():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True)
    attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)

    def forward(m, x):
        x = m.layer(x.view(-1, 3, 4))
        return m.head((x + m.attention(x, x, x)[0]).flatten(1))

    return Net(forward, layer=layer, attention=attention, head=mlp())


def tied():
    net = Net(
        lambda m, x: m.c(m.b(m.a(x).tanh())), a=nn.Linear(12, 12), b=nn.Linear(12, 12), c=mlp()
    )
    net.b.weight = net.a.weight
    return net


def embedding(**options):
    words = nn.Embedding(10, 4, **options)
    return Net(lambda m, x: m.words((3 * x).long().clamp(-5, 4) + 5).mean(1), words=words)


def weight_normed():
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(12, 16)),
        nn.Tanh(),
        nn.utils.spectral_norm(nn.Linear(16, 16)),  # The old kind, which works by a hook.
        parametrizations.spectral_norm(nn.Linear(16, 4)),
    )


def reentrant():
    def forward(m, x):
        return m.last(checkpoint(m.middle, m.first(x), use_reentrant=True))

    return Net(forward, first=nn.Linear(12, 12), middle=nn.Linear(12, 12), last=nn.Linear(12, 4))


def sparse_buffer():
    net = Net(lambda m, x: m.net((m.graph @ x.T).T), net=mlp())
    net.register_buffer("graph", torch.eye(12).to_sparse())
    return net


def overlapping_buffer():
    net = mlp()
    net.register_buffer("scale", torch.ones(1).expand(4))
    return nn.Sequential(net, Net(lambda m, x: x))


# -- awkward data and settings --------------------------------------------------------------------


class Noise:
    """A transform with a generator of its own."""

    def __init__(self):
        self.random, self.torch_random = np.random.default_rng(8), torch.Generator().manual_seed(9)

    def __call__(self, x):
        noise = torch.randn(x.shape, generator=self.torch_random)
        return (x + 0.1 * noise + self.random.normal()).float()


class NoisyData(Dataset):
    """Draws from the global random streams and from its own, directly or through a transform."""

    def __init__(self, transform=None):
        self.data, self.random, self.transform = toy_data(48), random.Random(10), transform

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, y = self.data[i]
        x = x + 0.1 * torch.randn(12) + 0.1 * (np.random.normal() + random.gauss(0, 1))
        x = x + 0.1 * self.random.gauss(0, 1)
        return (x.float() if self.transform is None else self.transform(x)), y


class Collate:
    def __init__(self):
        self.noise = Noise()

    def collate(self, items, scale):
        x, y = torch.utils.data.default_collate(items)
        return scale * self.noise(x), y


def loader_of(data=None, **options):
    generator = torch.Generator().manual_seed(11)
    data = toy_data(48) if data is None else data
    return DataLoader(data, batch_size=16, shuffle=True, generator=generator, **options)


def noisily_collated():
    return (loader_of(collate_fn=functools.partial(Collate().collate, scale=2.0)),)


def subset():
    return random_split(NoisyData(Noise()), [40, 8], torch.Generator().manual_seed(12))[0]


def both():
    return toy_loader(samples=48), toy_loader(samples=32, shuffle=False)


def batches():
    return (DataLoader([tuple(b) for b in toy_loader(samples=48)], batch_size=None),)


def everything_by(optimizer):
    return lambda: Everything(optimizer=optimizer)


def plateau(weights):
    optimizer = torch.optim.Adam(weights, lr=0.05)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "monitor": "train_loss"},
    }


def every_step(weights):
    optimizer = torch.optim.SGD(weights, lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=20)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
    }


class Unfreeze(plc.BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[4])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[4], optimizer)


def checkpoint_and_stop(path):
    return [
        plc.ModelCheckpoint(str(path / "steps"), "{step}", every_n_train_steps=2, save_top_k=-1),
        plc.ModelCheckpoint(
            str(path / "best"), "best-{val_loss}", monitor="val_loss", save_top_k=2
        ),
        plc.EarlyStopping("val_loss", patience=2, min_delta=10.0),
    ]


validating = {"val_check_interval": 2, "num_sanity_val_steps": 2}
half = {"precision": "bf16-mixed"}
double = {"precision": "64-true"}
MODELS = {
    "everything at once": Case(Everything),
    "generators of the module": Case(OwnGenerators),
    "noise from the global streams": Case(GlobalRandomness),
    "containers and objects of the module": Case(Remembers),
    "an OrderedDict of the module": Case(lambda: RemembersOddly("ordered")),
    "a SimpleNamespace of the module": Case(lambda: RemembersOddly("space")),
    "an object with slots of the module": Case(lambda: RemembersOddly("slots")),
    "torchmetrics": Case(Metered),
    "direct use of loggers and print": Case(Loud),
    "a LightningModule in a LightningModule": Case(Nesting),
    "a step that writes into a batch that the probe shares": Case(
        lambda: WritesIntoItsBatch(mlp()), batches
    ),
    "a transfer hook that writes into a batch that the probe shares": Case(
        WritesInTransfer, batches
    ),
    "a frozen teacher updated in the step": Case(Teacher),
    "a frozen teacher updated from the fourth step on": Case(lambda: Teacher(begin_at=3)),
    "a frozen teacher beside a large backbone": Case(lambda: Teacher(ballast=99)),
    "a frozen teacher hidden in a list": Case(lambda: Teacher(registered=False)),
    "a step that writes to trained weights": Case(ShrinksItsWeights),
    "an embedding that renormalises itself": Case(lambda: Classifier(embedding(max_norm=0.5))),
    "a step that thaws a layer": Case(lambda: Thaws(lambda calls: calls >= 3)),
    "a step that freezes a layer": Case(lambda: Thaws(lambda calls: calls % 3 == 0)),
    "a step that sets its learning rate": Case(SetsItsRate),
    "a step that asks the trainer to stop": Case(AsksToStop),
    "a step with a backward pass of its own": Case(Adversarial),
    "a tensor that gathers gradients": Case(GathersGradients),
    "a step without batch_idx": Case(WithoutIndex),
    "a step that skips batches": Case(Skips),
    "a step that returns a dict and logs late": Case(LogsLate),
    "several loaders": Case(
        TwoLoaders, lambda: ({"a": loader_of(), "b": toy_loader(samples=48, batch_size=8)},)
    ),
    "an LSTM": Case(lambda: Awkward(lstm())),
    "a transformer": Case(lambda: Awkward(transformer())),
    "tied weights": Case(lambda: Awkward(tied())),
    "weight norm and spectral norm": Case(lambda: Awkward(weight_normed())),
    "sparse gradients": Case(
        lambda: Classifier(embedding(sparse=True), lambda p: torch.optim.SparseAdam(p, lr=0.1))
    ),
    "reentrant checkpointing": Case(lambda: Classifier(reentrant())),
    "a sparse buffer": Case(lambda: Classifier(sparse_buffer())),
    "a buffer that overlaps itself": Case(lambda: Classifier(overlapping_buffer())),
}
SETTINGS = {
    "accumulated gradients": Case(Everything, trainer={"accumulate_grad_batches": 3}),
    "accumulation and reentrant checkpointing": Case(
        lambda: Classifier(reentrant()), trainer={"accumulate_grad_batches": 2}
    ),
    "accumulation and a backward pass of the step's own": Case(
        Adversarial, trainer={"accumulate_grad_batches": 2}
    ),
    "clipping by norm": Case(Everything, trainer={"gradient_clip_val": 0.1}),
    "clipping by value": Case(
        Everything, trainer={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    ),
    "LBFGS": Case(everything_by(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3))),
    "a segment of every step by hand": Case(
        Alternating, lca={"loss_fn": lambda m, batch: m.loss(batch), "segments": "step"}
    ),
    "a plateau scheduler": Case(everything_by(plateau)),
    "a scheduler of every step": Case(everything_by(every_step)),
    "validation in mid-epoch": Case(Validated, both, trainer=validating),
    "bf16-mixed": Case(Validated, both, trainer=half | validating),
    "64-true": Case(Everything, lambda: (toy_loader(dtype=torch.float64),), trainer=double),
    "checkpoints and early stopping": Case(
        Validated,
        both,
        checkpoint_and_stop,
        validating | {"enable_checkpointing": True, "max_steps": 30},
    ),
    "persistent workers": Case(
        Everything, lambda: (loader_of(num_workers=1, persistent_workers=True),)
    ),
    "data that draws random numbers": Case(data=lambda: (loader_of(NoisyData()),)),
    "a subset of data whose transform owns generators": Case(data=lambda: (loader_of(subset()),)),
    "a collate_fn that owns generators": Case(data=noisily_collated),
    "layers that thaw between epochs": Case(
        callbacks=lambda path: [Unfreeze()], lca={"track_parameters": True}
    ),
    "another LCACallback": Case(
        Everything, callbacks=lambda path: [LCACallback(every_n_steps=2, probe_mode="eval")]
    ),
    "stochastic weight averaging": Case(
        lambda: Classifier(rich_net()),
        callbacks=lambda path: [plc.StochasticWeightAveraging(0.05, swa_epoch_start=1)],
        trainer={"max_epochs": 3, "max_steps": -1},
    ),
}
OPTIONS = {
    "mode no_dropout": Case(Everything, lca={"probe_mode": "no_dropout"}),
    "mode eval": Case(Everything, lca={"probe_mode": "eval"}),
    "mode train": Case(Everything, lca={"probe_mode": "train"}),
    "mode eval on a transformer": Case(lambda: Awkward(transformer()), lca={"probe_mode": "eval"}),
    "the validation data": Case(Validated, both, trainer=validating, lca={"probe": "val"}),
    "validation data not loaded yet": Case(
        LoadsItself, tuple, trainer={"check_val_every_n_epoch": 2}, lca={"probe": "val"}
    ),
    "several probes": Case(
        Validated, both, trainer=validating, lca={"probe": {"fit": "train", "test": "val"}}
    ),
    "a probe that is the training loader": Case(
        Everything, lambda: (loader_of(NoisyData()),), lca=lambda loader: {"probe": loader}
    ),
    "every third step": Case(Everything, lca={"every_n_steps": 3}),
    "a budget, of every step or of a chord": Case(
        Everything,
        callbacks=lambda path: [LCACallback(max_overhead=50.0, probe_mode="eval")],
        lca={"max_overhead": 0.01},
    ),
    "a tolerance": Case(Everything, lca={"tolerance": 1e-4}),
    "tracked parameters": Case(Everything, lca={"track_parameters": True}),
    "the midpoint rule": Case(Everything, lca={"quadrature": "midpoint"}),
    "the gauss2 rule": Case(Everything, lca={"quadrature": "gauss2", "group_by": "neuron"}),
    "every dashboard": Case(
        Everything,
        trainer={"max_steps": 12},
        lca={"neurons": True, "track_parameters": True},
    ),
    "a loss_fn": Case(
        Everything, lca={"loss_fn": lambda m, batch: {"a": m.training_step(batch, 0)}}
    ),
}


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # fork, Python >= 3.12
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=i, marks=[pytest.mark.figures] if i == "every dashboard" else [])
        for i, c in (MODELS | SETTINGS | OPTIONS).items()
    ],
)
def test_training_is_bitwise_the_same_with(case, tmp_path, capsys):
    plain, measured, lca = twins(case, tmp_path, capsys)
    assert_same(plain, measured)
    weights = [seen["weights and buffers"] for seen in plain["seen"]]
    assert list(differences(weights[0], weights[-1])), "The case trains nothing."
    assert lca.history.steps[-1] == plain["done"][0] >= 2, "The case measures nothing."
    assert np.isfinite(lca.history.allocated).all()


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need")
@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch")
def test_resuming_is_bitwise_the_same(tmp_path, capsys):
    saves = plc.ModelCheckpoint(str(tmp_path), "first", every_n_train_steps=4)
    first = Case(Everything, callbacks=lambda path: [saves], trainer={"enable_checkpointing": True})
    fit(first, tmp_path / "first")
    plain, measured, lca = twins(Case(Everything, resume=tmp_path / "first.ckpt"), tmp_path, capsys)
    assert_same(plain, measured)
    assert lca.history.steps.tolist() == [5, 6, 7]


# -- errors ---------------------------------------------------------------------------------------


class Fails:
    """A loss_fn that at its n-th call changes all that it can reach, and raises."""

    def __init__(self, n):
        self.calls, self.n = 0, n

    def __call__(self, module, batch):
        self.calls += 1
        loss = module.training_step(batch, 0)
        if self.calls == self.n:
            self.failed_at = module.global_step
            module.eval()
            module.apply(lambda m: vars(m).update(left_behind=True))
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data.zero_()
            raise BoomError
        return loss


class StopsAt(pl.Callback):
    """Raises where the measurement of a step raised; step 0 is the start of training."""

    def __init__(self, step):
        self.step = step

    def on_train_start(self, trainer, pl_module):
        if self.step == 0:
            raise BoomError

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise BoomError


@pytest.mark.parametrize("mode", ["no_dropout", "train", "eval"])
@pytest.mark.parametrize(
    "call", [1, 2, 3, 5, 6, 11]
)  # Of two batches: checks, starts, middles, ends.
def test_an_error_in_the_probe_leaves_training_as_it_was(call, mode, tmp_path, capsys):
    fails, lca = Fails(call), []
    options = {"loss_fn": fails, "probe_mode": mode}
    measured = fit(Case(Everything, lca=options), tmp_path / "measured", lca=lca)
    printed = capsys.readouterr().out
    plain = fit(Case(Everything), tmp_path / "plain", StopsAt(fails.failed_at))
    assert fails.calls == call
    assert_same(plain | {"printed": capsys.readouterr().out}, measured | {"printed": printed})
