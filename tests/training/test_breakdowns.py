"""Shares of credit in real trainings, against a twin that replays every step by itself."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.assertions import assert_same, assert_same_history
from support.harmless import Awkward, Case, twins
from support.models import Classifier, Resumable, mlp, pl, toy_data, toy_loader
from support.training import fit, make_trainer
from torch import nn

from lightning_lca import History, LCACallback
from lightning_lca.measure.stretches import Stretch
from lightning_lca.runtime.lightnings import MisconfigurationException
from lightning_lca.training.meter import Meter

PART = ("signal", "momentum", "weight_decay", "noise", "other")


def double(optimizer):
    return lambda: Classifier(mlp().double(), optimizer)


def batch_of(samples, begin=0):
    return [t[begin : begin + samples] for t in toy_data(96, dtype=torch.float64).tensors]


def single(batch):
    return [t.float() if t.is_floating_point() else t for t in batch]


class Replays(pl.Callback):
    """Replays each step from copies, with the gradient of the probe, and adds up by layer."""

    def __init__(self, batch):
        self.batch, self.rows = batch, []

    def on_train_start(self, trainer, module):
        self.net = copy.deepcopy(module.net)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.before = [p.detach().clone() for p in module.net.parameters()]
        self.kept = copy.deepcopy(optimizer.state_dict())
        self.kind, self.where = type(optimizer), optimizer
        self.groups = optimizer.param_groups

    def gradient(self, weights):
        with torch.no_grad():
            for p, w in zip(self.net.parameters(), weights, strict=True):
                p.copy_(w)
        loss = F.cross_entropy(self.net(self.batch[0]), self.batch[1])
        return torch.autograd.grad(loss, list(self.net.parameters()))

    def imagined(self, module, gradients):
        """Where a step from the same state would have led with other gradients."""
        live = list(module.net.parameters())
        twins = [nn.Parameter(w.clone()) for w in self.before]
        place = {id(p): t for p, t in zip(live, twins, strict=True)}
        groups = [{"params": [place[id(p)] for p in g["params"]]} for g in self.groups]
        other = self.kind(groups, lr=1.0)
        other.load_state_dict(copy.deepcopy(self.kept))
        for twin, gradient in zip(twins, gradients, strict=True):
            twin.grad = gradient.clone()
        other.step()
        return [t.detach() - w for t, w in zip(twins, self.before, strict=True)]

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == len(self.rows):
            return  # Gradients are accumulated.
        after = [p.detach().clone() for p in module.net.parameters()]
        g0 = self.gradient(self.before)
        g1 = self.gradient([(a + b) / 2 for a, b in zip(self.before, after, strict=True)])
        g2 = self.gradient(after)
        mean = [(a + 4 * b + c) / 6 for a, b, c in zip(g0, g1, g2, strict=True)]
        motion = [b - a for a, b in zip(self.before, after, strict=True)]
        by_probe = self.imagined(module, g0)
        rows = zip(mean, motion, by_probe, g0, strict=True)
        tensors = [
            [float((m * d).sum()), float((m * p).sum()), float((g * d).sum())]
            for m, d, p, g in rows
        ]
        layers = np.array(tensors).reshape(-1, 2, 3).sum(1)  # Weight and bias.
        self.rows.append(layers)


class Turns(Replays):
    """Counts by layer, by hand, how many weights turn round, and the cosines."""

    before = None

    def on_train_batch_end(self, trainer, module, *args):
        after = [p.detach().clone() for p in module.net.parameters()]
        g0, g2 = self.gradient(self.before), self.gradient(after)
        motion = [b - a for a, b in zip(self.before, after, strict=True)]
        layers = []
        for i in range(0, len(motion), 2):
            d, a, b = (torch.cat([t.flatten() for t in x[i : i + 2]]) for x in (motion, g0, g2))
            last = self.last[len(layers)] if self.rows else torch.zeros_like(d)
            both = (d * last) != 0
            steep = (a * b) != 0
            layers.append(
                [
                    ((d * last)[both] < 0).double().mean(),
                    ((a * b)[steep] < 0).double().mean(),
                    -F.cosine_similarity(d, a, dim=0),
                    -F.cosine_similarity(d, b, dim=0),
                ]
            )
        self.last = [
            torch.cat([t.flatten() for t in motion[i : i + 2]]) for i in range(0, len(motion), 2)
        ]
        self.rows.append(np.array(layers, float))


@pytest.mark.parametrize("breakdown", [False, True])
def test_turns_and_cosines_are_those_counted_by_hand(tmp_path, breakdown):
    batch = batch_of(48)
    twin = Turns(batch)
    lca = LCACallback(probe=[batch], oscillation=True, breakdown=breakdown, figures=False)
    sgd = double(lambda p: torch.optim.SGD(p, 1.5, momentum=0.5))
    fit(tmp_path, lca, twin, model=sgd, data=toy_loader(dtype=torch.float64), steps=10)
    turns = lca.history.oscillation
    assert turns.names == ("reversed", "flipped", "cosine_start", "cosine_end")
    np.testing.assert_allclose(turns.allocated, np.array(twin.rows), rtol=1e-9, atol=1e-12)
    assert np.isnan(turns.allocated[0, :, 0]).all(), "nothing moved before"
    assert 0.1 < np.nanmean(turns.allocated[:, :, 0]) < 0.9
    assert set(lca.history.breakdowns) == ({"part", "order"} if breakdown else set())
    loaded = History.load(lca.log_dir)
    np.testing.assert_allclose(loaded.oscillation.allocated, turns.allocated, rtol=1e-6)
    credit = lca.history.allocated
    np.testing.assert_allclose(
        lca.history.efficiency, np.abs(credit.sum(0)) / np.abs(credit).sum(0), rtol=1e-12
    )


def test_a_layer_that_oscillates_is_found_and_a_sham_is_not(tmp_path):
    """Along one direction: at 1.9 over the curvature every step overshoots, at 0.1 none does."""

    class Bowl(pl.LightningModule):
        def __init__(self, rate):
            super().__init__()
            self.rate, self.w = rate, nn.Parameter(torch.full((50,), 2.0))

        def training_step(self, batch, batch_idx):
            return self.w.square().sum() / 2

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.rate)

    def turns(rate):
        lca = fit(tmp_path / str(rate), model=lambda: Bowl(rate), oscillation=True, figures=False)
        return lca.lca.history.oscillation.allocated[1:, 0]

    np.testing.assert_allclose(turns(1.9), np.tile([1.0, 1.0, 1.0, -1.0], (11, 1)), atol=1e-6)
    np.testing.assert_allclose(turns(0.1), np.tile([0.0, 0.0, 1.0, 1.0], (11, 1)), atol=1e-6)


def groups_of_two(parameters):
    *kernels, last = parameters
    groups = [{"params": kernels, "weight_decay": 0.2}, {"params": [last], "lr": 0.002}]
    return torch.optim.AdamW(groups, lr=0.01, amsgrad=True)


def scheduled(parameters):
    sgd = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.7)
    return {"optimizer": sgd, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


CASES = {
    "SGD, clipped by norm": (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.2, weight_decay=0.02),
        {"gradient_clip_val": 0.3},
    ),
    "nesterov, a schedule, accumulation": (scheduled, {"accumulate_grad_batches": 2}),
    "nesterov over many tensors, no decay": (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, foreach=True),
        {},
    ),
    "two groups, amsgrad, clipped by value": (
        groups_of_two,
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ),
    "Adam, fused": (lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, fused=True), {}),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5), {}),
}


def replayed(path, twin, model, trainer=None, **arguments):
    """Trains ten steps beside a twin; gives the history, and the twin's rows."""
    lca = LCACallback(probe=[twin.batch], breakdown=True, figures=False, **arguments)
    data = toy_loader(dtype=torch.float64)
    fit(path, lca, twin, model=model, data=data, steps=10, trainer=trainer)
    return lca.history, np.array(twin.rows)


class Turned(nn.Module):
    """The gradients of its kernels come transposed: their elements lie in another order."""

    def __init__(self):
        super().__init__()
        self.first, self.bias = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.zeros(8))
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        hidden = F.linear(x, self.first.t().contiguous(), self.bias)
        return self.last(hidden.tanh())


def test_gradients_may_lie_in_another_order_than_weights(tmp_path):
    batch = batch_of(48)
    model = lambda: Classifier(Turned().double(), lambda p: torch.optim.Adam(p, 0.02))  # noqa: E731
    history, rows = replayed(tmp_path, Replays(batch), model)
    size = np.abs(history.allocated).max()
    tight = {"rtol": 1e-10, "atol": 1e-12 * size}
    assert history.groups == ("net", "net.last")
    part, order = history.breakdowns["part"], history.breakdowns["order"]
    np.testing.assert_allclose(history.allocated, rows[:, :, 0], **tight)
    np.testing.assert_allclose(part.allocated[:, :, :3].sum(2), rows[:, :, 1], **tight)
    np.testing.assert_allclose(order.allocated[:, :, 0], rows[:, :, 2], **tight)
    assert np.abs(part.allocated[:, :, 4]).max() < 1e-12 * size


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kept", [True, False], ids=["a kept start", "none kept"])
def test_shares_are_those_of_the_replayed_step(tmp_path, name, kept, monkeypatch):
    optimizer, trainer = CASES[name]
    batch = batch_of(48)
    if not kept:
        monkeypatch.setattr("lightning_lca.training.reuse.Reuse.keep", lambda *_: None)
    history, rows = replayed(tmp_path, Replays(batch), double(optimizer), trainer=trainer)
    part, order = history.breakdowns["part"], history.breakdowns["order"]
    assert (part.names, order.names) == (PART, ("first_order", "curvature"))
    assert len(history) == len(rows) == 10
    size = np.abs(history.allocated).max()
    tight = {"rtol": 1e-10, "atol": 1e-12 * size}
    np.testing.assert_allclose(history.allocated, rows[:, :, 0], **tight)
    np.testing.assert_allclose(part.allocated[:, :, :3].sum(2), rows[:, :, 1], **tight)
    np.testing.assert_allclose(part.allocated[:, :, 3], rows[:, :, 0] - rows[:, :, 1], **tight)
    np.testing.assert_allclose(order.allocated[:, :, 0], rows[:, :, 2], **tight)
    assert np.abs(part.allocated[:, :, 4]).max() < 1e-12 * size, "what no part explains"
    for breakdown in (part, order):
        np.testing.assert_allclose(breakdown.allocated.sum(2), history.allocated, **tight)
    (events,) = tmp_path.rglob("*tfevents*")
    loaded = History.load(events.parent)
    for name, breakdown in loaded.breakdowns.items():
        mine = history.breakdowns[name]
        assert breakdown.names == mine.names
        np.testing.assert_allclose(breakdown.allocated, mine.allocated, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("by", ["parameter", "neuron", "head", "module:1"])
def test_finer_groups_have_the_same_shares(tmp_path, by, monkeypatch):
    class Transposed(nn.Module):
        """Output channels lie along the second dimension of a transposed convolution."""

        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose1d(4, 6, 3, groups=2)
            self.attention = nn.MultiheadAttention(6, 3, batch_first=True)
            self.down = nn.Linear(30, 4)

        def forward(self, x):
            x = self.up(x.view(-1, 4, 3)).transpose(1, 2)
            return self.down((x + self.attention(x, x, x)[0]).flatten(1))

    adam = lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1)  # noqa: E731
    sums = []
    for group_by in ("layer", by):
        torch.manual_seed(0)
        run = fit(
            tmp_path / group_by,
            model=lambda: Classifier(Transposed().double(), adam),
            data=toy_loader(dtype=torch.float64),
            breakdown=True,
            group_by=group_by,
            figures=False,
        )
        history = run.lca.history
        # Credit goes to groups by another way, so that a wrong one would leave motion over.
        other = history.breakdowns["part"].allocated[:, :, 4]
        assert np.abs(other).max() < 1e-12 * np.abs(history.allocated).max()
        sums.append([b.allocated.sum(1) for b in history.breakdowns.values()])
    assert len(history.groups) != 4 or by == "module:1"
    for mine, theirs in zip(*sums, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("how", ["tolerance", "halved", "large tensors in pieces"])
def test_no_motion_is_left_over_however_a_step_is_measured(tmp_path, how, monkeypatch):
    if how == "halved":
        monkeypatch.setattr(Meter, "_misses_all", lambda *_: True)
    if how == "large tensors in pieces":
        monkeypatch.setattr("lightning_lca.measure.stretches.CHUNK", 256)
        net = nn.Sequential(nn.Linear(12, 100), nn.Tanh(), nn.Linear(100, 4))
    run = fit(
        tmp_path,
        model=lambda: Classifier(
            (net if how == "large tensors in pieces" else mlp()).double(),
            lambda p: torch.optim.AdamW(p, 0.05),
        ),
        data=toy_loader(dtype=torch.float64),
        breakdown=True,
        figures=False,
        tolerance=1e-7 if how == "tolerance" else None,
    )
    history = run.lca.history
    if how != "large tensors in pieces":
        assert history.splits.max() > 1
    part, order = history.breakdowns["part"], history.breakdowns["order"]
    size = np.abs(history.allocated).max()
    assert np.abs(part.allocated[:, :, 4]).max() < 1e-12 * size
    assert np.abs(part.allocated[:, :, :4]).max() > 0.1 * size
    np.testing.assert_allclose(order.allocated.sum(2), history.allocated, rtol=1e-10)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
        lambda p: torch.optim.AdamW(p, 0.01),
        lambda p: torch.optim.NAdam(p, 0.01),
        lambda p: torch.optim.RAdam(p, 0.01),
        lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
        lambda p: torch.optim.Adagrad(p, 0.01),
    ],
    ids=["SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad"],
)
def test_the_state_of_an_optimizer_is_read_where_it_lies_and_stays(
    tmp_path, optimizer, monkeypatch
):
    """Large tensors come in pieces, and these are not copied."""
    shown, look = [], Stretch._where_it_lies
    monkeypatch.setattr(Stretch, "_where_it_lies", lambda *a: shown.append(look(*a)) or shown[-1])

    def trained(measured):
        net = nn.Sequential(nn.Linear(12, 512), nn.Tanh(), nn.Linear(512, 300))
        run = fit(
            tmp_path / str(measured),
            model=Classifier(net, optimizer),
            steps=6,
            measured=measured,
            **({"breakdown": True, "figures": False} if measured else {}),
        )
        return run.module.state_dict(), run.trainer.optimizers[0].state_dict()

    torch.manual_seed(0)
    plain = trained(False)
    assert not shown
    torch.manual_seed(0)
    assert_same(plain, trained(True))
    assert any(piece is not None for piece in shown)


def test_an_optimizer_without_a_form_has_one_part_and_a_line_says_so(tmp_path, capsys, caplog):
    def two(parameters):
        return torch.optim.Adadelta(parameters, lr=1.0)

    with caplog.at_level("INFO"):
        run = fit(tmp_path, model=lambda: Classifier(None, two), breakdown="part", figures=False)
    part = run.lca.history.breakdowns["part"]
    assert part.names == ("signal", "momentum", "weight_decay", "noise", "step", "other")
    np.testing.assert_allclose(part.allocated[:, :, 4], run.lca.history.allocated, rtol=1e-4)
    assert (part.allocated[:, :, :4] == 0).all()
    told = [r.message for r in caplog.records if "Adadelta" in r.message]
    assert len(told) == 1
    assert 'one part, "step"' in told[0]


@pytest.mark.parametrize("probe", ["train", {"a": "train", "b": [batch_of(16)]}], ids=str)
def test_training_is_the_same_and_takes_no_further_gradient(tmp_path, capsys, probe):
    if isinstance(probe, dict):
        probe = {
            "a": "train",
            "b": [[t.float() if t.is_floating_point() else t for t in batch_of(16)]],
        }
    case = Case(model=Awkward, lca={"breakdown": True, "oscillation": True, "probe": probe})
    plain, measured, lca = twins(case, tmp_path, capsys)
    assert_same(plain, measured)
    for history in lca.histories.values():
        assert set(history.breakdowns) == {"part", "order"}
    runs = [fit(tmp_path / str(b), breakdown=b, figures=False).lca for b in (False, True)]
    bare, split = (run.history for run in runs)
    assert_same_history(bare, without_shares(split), rows_alone=True)


def without_shares(history):
    other = History(history.groups, history.sizes, history.group_by, history.layers)
    other.append(history.rows)
    return other


def test_a_resumed_training_goes_on_with_its_shares(tmp_path):
    options = {"breakdown": True, "oscillation": True, "figures": False, "data": Resumable}
    whole = fit(tmp_path / "whole", steps=12, **options).lca.history
    saver = pl.callbacks.ModelCheckpoint(tmp_path / "saved", every_n_train_steps=5, save_top_k=-1)
    fit(tmp_path / "first", saver, steps=7, trainer={"enable_checkpointing": True}, **options)
    (saved,) = (tmp_path / "saved").glob("*step=5*.ckpt")
    saves = {"enable_checkpointing": True}
    again = fit(tmp_path / "again", saver, steps=12, resume=saved, trainer=saves, **options)
    again = again.lca.history
    for name, breakdown in whole.breakdowns.items():
        np.testing.assert_allclose(
            again.breakdowns[name].allocated, breakdown.allocated, rtol=1e-5, atol=1e-9
        )
    turns = (h.oscillation.allocated for h in (again, whole))
    np.testing.assert_allclose(*turns, rtol=1e-4, atol=1e-5)
    bare = fit(
        tmp_path / "bare", saver, resume=saved, trainer=saves, figures=False, data=Resumable
    ).lca
    assert bare.history.breakdowns == {}
    assert len(bare.history) == 12


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"breakdown": "parts"}, ValueError, "breakdown must be one of 'part', 'order'"),
        ({"breakdown": 3}, TypeError, "breakdown must be True, False or a list of names, got int"),
        ({"breakdown": True, "quadrature": "midpoint"}, ValueError, "gradient at the start"),
        ({"breakdown": True, "max_overhead": 0.1}, ValueError, r'breakdown=\["order"\] goes with'),
        ({"breakdown": "part", "max_overhead": 0.1}, ValueError, "how long a chord is"),
        ({"breakdown": "part", "segments": "step"}, ValueError, "segments='step'"),
        (
            {"breakdown": "term", "loss_fn": print, "quadrature": "closed_trapezoid"},
            ValueError,
            "of the change of the whole loss, not of its terms",
        ),
        ({"oscillation": 1}, TypeError, "oscillation must be True or False"),
        ({"oscillation": True, "quadrature": "gauss2"}, ValueError, "gradient at the start"),
    ],
)
def test_what_cannot_be_split_is_refused(arguments, error, says):
    with pytest.raises(error, match=says):
        LCACallback(**arguments)


class ReplaysChords(Replays):
    """Replays the steps of chords with the gradient of the probe where each chord began."""

    def __init__(self, batch, every, last):
        super().__init__(batch)
        self.every, self.last, self.seen = every, last, 0

    def on_before_optimizer_step(self, trainer, module, optimizer):
        super().on_before_optimizer_step(trainer, module, optimizer)
        if self.seen % self.every == 0:
            self.began = self.before
            self.g0 = self.gradient(self.began)
            self.by_probe = [torch.zeros_like(w) for w in self.began]
            self.decay = [torch.zeros_like(w) for w in self.began]
        for decay, w in zip(self.decay, self.before, strict=True):
            decay -= optimizer.param_groups[0]["lr"] * 0.1 * w

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == self.seen:
            return  # Gradients are accumulated.
        self.seen += 1
        by_probe = self.imagined(module, self.g0)
        for total, p in zip(self.by_probe, by_probe, strict=True):
            total += p
        if self.seen % self.every and self.seen != self.last:
            return
        after = [p.detach().clone() for p in module.net.parameters()]
        ends = list(zip(self.began, after, strict=True))
        g1, g2 = self.gradient([(a + b) / 2 for a, b in ends]), self.gradient(after)
        mean = [(a + 4 * b + c) / 6 for a, b, c in zip(self.g0, g1, g2, strict=True)]
        motion = [b - a for a, b in ends]
        columns = [motion, self.by_probe, self.decay]
        tensors = [
            [float((m * c).sum()) for c in moved] for m, *moved in zip(mean, *columns, strict=True)
        ]
        self.rows.append(np.array(tensors).reshape(-1, 2, 3).sum(1))  # Weight and bias.


CHORDS = {
    "AdamW": (lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.1), {}),
    "nesterov, a schedule, accumulation": (scheduled, {"accumulate_grad_batches": 2}),
    "two groups, amsgrad, clipped": (groups_of_two, {"gradient_clip_val": 0.3}),
}


@pytest.mark.parametrize("name", CHORDS)
@pytest.mark.parametrize("kept", [True, False], ids=["a kept start", "none kept"])
def test_parts_of_the_steps_of_a_chord_add_up(tmp_path, name, kept, monkeypatch):
    optimizer, trainer = CHORDS[name]
    batch = batch_of(48)
    if not kept:
        monkeypatch.setattr("lightning_lca.training.reuse.Reuse.keep", lambda *_: None)
    twin = ReplaysChords(batch, 4, 10)
    history, rows = replayed(tmp_path, twin, double(optimizer), trainer=trainer, every_n_steps=4)
    part = history.breakdowns["part"].allocated
    assert len(history) == len(rows) == 3
    size = np.abs(history.allocated).max()
    tight = {"rtol": 1e-10, "atol": 1e-12 * size}
    np.testing.assert_allclose(history.allocated, rows[:, :, 0], **tight)
    np.testing.assert_allclose(part[:, :, :3].sum(2), rows[:, :, 1], **tight)
    np.testing.assert_allclose(part[:, :, 3], rows[:, :, 0] - rows[:, :, 1], **tight)
    if name == "AdamW":
        np.testing.assert_allclose(part[:, :, 2], rows[:, :, 2], **tight)
    assert np.abs(part[:, :, 4]).max() < 1e-12 * size, "what no part explains"
    assert np.abs(part[:, :, 0]).min() > 1e-3 * size
    order = history.breakdowns["order"].allocated
    np.testing.assert_allclose(order.sum(2), history.allocated, **tight)


def test_a_chord_that_a_checkpoint_cuts_goes_on_with_its_parts(tmp_path):
    options = {
        "breakdown": True,
        "every_n_steps": 4,
        "figures": False,
        "data": Resumable,
        "model": lambda: Classifier(None, lambda p: torch.optim.AdamW(p, 0.02)),
    }
    whole = fit(tmp_path / "whole", steps=12, **options).lca.history
    saver = pl.callbacks.ModelCheckpoint(tmp_path / "saved", every_n_train_steps=6, save_top_k=-1)
    saves = {"enable_checkpointing": True}
    fit(tmp_path / "first", saver, steps=7, trainer=saves, **options)
    (saved,) = (tmp_path / "saved").glob("*step=6*.ckpt")
    again = fit(tmp_path / "again", saver, steps=12, resume=saved, trainer=saves, **options)
    again = again.lca.history
    assert list(again.steps) == list(whole.steps) == [4, 8, 12]
    for name, breakdown in whole.breakdowns.items():
        np.testing.assert_allclose(
            again.breakdowns[name].allocated, breakdown.allocated, rtol=1e-4, atol=1e-8
        )


def test_a_step_taken_before_a_resume_is_not_split_by_another(tmp_path):
    """A checkpoint saved after a step and before it was measured: what it was made of is lost."""

    class Doubles(Resumable):
        def __init__(self):
            super().__init__()
            self.batches = [[x.double(), y] for x, y in self.batches]

    class First(pl.Callback):
        """Comes before LCACallback."""

        def on_train_batch_end(self, trainer, module, *args):
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    def model():
        return Classifier(mlp().double(), lambda p: torch.optim.AdamW(p, 0.02))

    options = {"model": model, "data": Doubles}
    trainer = {"enable_checkpointing": True}
    first = LCACallback(breakdown="part", figures=False)
    fit(tmp_path, First(), first, steps=6, trainer=trainer, **options)
    again = LCACallback(breakdown="part", figures=False)
    fit(tmp_path, again, steps=8, resume=tmp_path / "saved.ckpt", trainer=trainer, **options)
    part = again.history.breakdowns["part"].allocated
    credit = again.history.allocated
    size = np.abs(credit).max()
    at = list(again.history.steps)
    assert at == list(range(1, 9))
    other = np.abs(part[:, :, 4]).max(1) / size
    assert other[4] > 0.01
    np.testing.assert_allclose(part[4, :, 4], credit[4], rtol=1e-12)
    assert np.delete(other, 4).max() < 1e-6, "read back from the record, in single precision"
    assert other[5:].max() < 1e-12


def test_chords_are_split_by_order(tmp_path):
    run = fit(tmp_path, breakdown=["order"], every_n_steps=3, figures=False)
    order = run.lca.history.breakdowns["order"]
    assert order.allocated.shape == (4, 3, 2)
    np.testing.assert_allclose(order.allocated.sum(2), run.lca.history.allocated)


PLANTED = {
    "momentum": (lambda p: torch.optim.SGD(p, 0.3, momentum=0.98), 1),
    "weight_decay": (lambda p: torch.optim.SGD(p, 0.05, weight_decay=2.0), 2),
}


@pytest.mark.parametrize("cause", PLANTED)
def test_planted_causes_are_found_and_a_sham_is_not(tmp_path, cause):
    def hurts(optimizer, name):
        run = fit(
            tmp_path / name,
            model=lambda: Classifier(None, optimizer),
            steps=60,
            probe=[single(batch_of(96))],
            breakdown=True,
            figures=False,
        )
        return run.lca.history.breakdowns["part"].allocated[5:].sum((0, 1))

    optimizer, place = PLANTED[cause]
    planted = hurts(optimizer, "planted")
    sham = hurts(lambda p: torch.optim.SGD(p, 0.05, momentum=0.1, weight_decay=1e-4), "sham")
    assert planted[place] > 0
    assert planted[place] == planted.max()
    assert sham[place] < 0.1 * planted[place]


def test_a_rate_that_is_too_large_hurts_by_curvature(tmp_path):
    def orders(rate):
        run = fit(
            tmp_path / str(rate),
            model=lambda: Classifier(None, lambda p: torch.optim.SGD(p, rate)),
            data=toy_loader(batch_size=96),
            steps=30,
            breakdown="order",
            figures=False,
        )
        return run.lca.history.breakdowns["order"].allocated.sum((0, 1))

    first, curved = orders(6.0)
    assert first < 0 < curved
    assert curved > 0.5 * -first
    first, curved = orders(0.05)
    assert first < 0
    assert curved < 0.1 * -first


def test_weights_that_are_cut_over_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_lca.training.support.any_cut", lambda module: True)
    trainer = make_trainer(tmp_path, LCACallback(breakdown=True))
    with pytest.raises(MisconfigurationException, match="needs whole weights"):
        trainer.fit(Classifier(), toy_loader())


def test_weights_of_two_types_turn_round_too(tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 4).double()

        def forward(self, x):
            return self.second(self.first(x).tanh().double())

    run = fit(
        tmp_path,
        model=lambda: Classifier(Mixed(), lambda p: torch.optim.SGD(p, 1.0)),
        oscillation=True,
        figures=False,
    )
    turned = run.lca.history.oscillation.allocated[:, :, 0]
    assert np.isnan(turned[0]).all()
    assert np.isfinite(turned[1:]).all()
    assert 0 < turned[1:].mean() < 1
