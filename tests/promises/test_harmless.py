"""Harmless: training with and without the callback is the same, bit for bit.

Every case is trained twice from one seed, without and with LCACallback, and everything that a user
could see of the two runs is compared.
"""

from __future__ import annotations

import functools
import random
from collections import OrderedDict
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.assertions import assert_same, differences
from support.harmless import (
    Awkward,
    BoomError,
    Case,
    Everything,
    GlobalRandomness,
    Loud,
    Metered,
    Nesting,
    OwnGenerators,
    Remembers,
    Validated,
    both,
    fit,
    rich_net,
    twins,
    validating,
)
from support.marks import matrix
from support.models import ByFunction, Classifier, mlp, pl, toy_data, toy_loader
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, random_split

from lightning_lca import LCACallback

plc = pl.callbacks

# -- awkward models -------------------------------------------------------------------------------


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


def lstm():
    cell = nn.LSTM(3, 8, num_layers=2, dropout=0.3, batch_first=True)
    return ByFunction(
        lambda m, x: m.head(m.cell(x.view(-1, 4, 3))[0][:, -1]), cell=cell, head=mlp(8)
    )


def transformer():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True)
    attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)

    def forward(m, x):
        x = m.layer(x.view(-1, 3, 4))
        return m.head((x + m.attention(x, x, x)[0]).flatten(1))

    return ByFunction(forward, layer=layer, attention=attention, head=mlp())


def tied():
    net = ByFunction(
        lambda m, x: m.c(m.b(m.a(x).tanh())), a=nn.Linear(12, 12), b=nn.Linear(12, 12), c=mlp()
    )
    net.b.weight = net.a.weight
    return net


def embedding(**options):
    words = nn.Embedding(10, 4, **options)
    return ByFunction(lambda m, x: m.words((3 * x).long().clamp(-5, 4) + 5).mean(1), words=words)


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

    return ByFunction(
        forward, first=nn.Linear(12, 12), middle=nn.Linear(12, 12), last=nn.Linear(12, 4)
    )


def sparse_buffer():
    net = ByFunction(lambda m, x: m.net((m.graph @ x.T).T), net=mlp())
    net.register_buffer("graph", torch.eye(12).to_sparse())
    return net


def overlapping_buffer():
    net = mlp()
    net.register_buffer("scale", torch.ones(1).expand(4))
    return nn.Sequential(net, ByFunction(lambda m, x: x))


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
    "a budget of a chord": Case(Everything, lca={"max_overhead": 0.01}),
    "a budget of few steps, or all": Case(Everything, lca={"max_overhead": 1.0}),
    "a tolerance": Case(Everything, lca={"tolerance": 1e-4}),
    "tracked parameters": Case(Everything, lca={"track_parameters": True}),
    "the midpoint rule": Case(Everything, lca={"quadrature": "midpoint"}),
    "the closed trapezoid": Case(
        Everything, lca={"quadrature": "closed_trapezoid", "breakdown": True}
    ),
    "the adaptive rule": Case(Everything, lca={"quadrature": "adaptive", "oscillation": True}),
    "the gauss2 rule": Case(Everything, lca={"quadrature": "gauss2", "group_by": "neuron"}),
    "a loss_fn": Case(
        Everything, lca={"loss_fn": lambda m, batch: {"a": m.training_step(batch, 0)}}
    ),
}


# All at once, and what differs most among the options: the others single out the cause.
QUICK = {
    "everything at once",
    "mode eval",
    "the validation data",
    "every third step",
    "a tolerance",
    "tracked parameters",
    "the closed trapezoid",
    "the adaptive rule",
    "the gauss2 rule",
    "a loss_fn",
}
EVERY_DASHBOARD = pytest.param(
    Case(
        Everything,
        trainer={"max_steps": 12},
        lca={"neurons": True, "track_parameters": True},
    ),
    id="every dashboard",
    marks=[pytest.mark.figures, pytest.mark.slow],
)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # fork, Python >= 3.12
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.filterwarnings("ignore:LCA. the probe loss changed")  # Some count their own calls.
@pytest.mark.parametrize(
    "case",
    [*matrix(MODELS | SETTINGS | OPTIONS, QUICK), EVERY_DASHBOARD],
)
def test_training_is_bitwise_the_same_with(case, tmp_path, capsys):
    plain, measured, lca = twins(case, tmp_path, capsys)
    assert_same(plain, measured)
    weights = [seen["weights and buffers"] for seen in plain["seen"]]
    assert list(differences(weights[0], weights[-1])), "The case trains nothing."
    assert lca.history.steps[-1] == plain["done"][0] >= 2, "The case measures nothing."
    assert np.isfinite(lca.history.allocated).all()


EVERY_ARGUMENT = {
    "shares and turns": {"breakdown": True, "oscillation": True},
    "a part, and one gradient": {
        "exclude": "*bias*",
        "group_by": "module:1",
        "quadrature": "adaptive",
        "breakdown": "order",
        "oscillation": True,
    },
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.filterwarnings("ignore:LCA. the probe loss changed")
@pytest.mark.parametrize("arguments", EVERY_ARGUMENT.values(), ids=EVERY_ARGUMENT)
@pytest.mark.parametrize("case", matrix(MODELS | SETTINGS))
def test_so_it_is_with_every_argument(case, arguments, tmp_path, capsys):
    own = case.lca if callable(case.lca) else (lambda *data, given=case.lca: given)
    arguments = dict(arguments)
    if not any("bias" in name for name, _ in case.model().named_parameters()):
        arguments.pop("exclude", None)
    if not callable(case.lca) and case.lca.get("segments") == "step":
        arguments["breakdown"] = "order"  # The parts of single steps are refused.
    case = replace(case, lca=lambda *data: {**own(*data), **arguments})
    plain, measured, lca = twins(case, tmp_path, capsys)
    assert_same(plain, measured)
    history = lca.history
    assert history.steps[-1] == plain["done"][0], "The case measures nothing."
    assert np.isfinite(history.allocated).all()
    for breakdown in history.breakdowns.values():
        rest = breakdown.allocated.sum(2) - history.allocated
        assert np.abs(rest).max() <= 1e-12 * np.abs(breakdown.allocated).max()
    assert history.oscillation is not None


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


@pytest.mark.parametrize(
    "mode", matrix({mode: mode for mode in ("no_dropout", "train", "eval")}, ["train"])
)
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
