"""Parts of models: what is left out is neither credited nor held, and the ledger closes."""

import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from promises.test_cost import Held
from support.assertions import assert_same_history
from support.models import Classifier, Resumable, mlp, pl, toy_loader, unrecorded
from support.training import Trail, fit
from torch import nn
from torch.func import functional_call

from lightning_lca import History
from lightning_lca.record.description import Description, DescriptionError

MisconfigurationException = pl.utilities.exceptions.MisconfigurationException
DOUBLE = {"trainer": {"precision": "64-true"}, "data": lambda: toy_loader(dtype=torch.float64)}
BATCH = next(iter(toy_loader(48, shuffle=False, dtype=torch.float64)))


def by_code(module, batch):
    return unrecorded(F.cross_entropy(module.net(batch[0]), batch[1]))


def by_hand(module, start, stop, measured):
    """Credits one step by Simpson's rule, the weights that are left out where they are at its end.

    Gives {name: credit} of whole parameters, and the losses at both ends.
    """
    total, losses = dict.fromkeys(measured, 0.0), []
    for s, weight in ((0.0, 1 / 6), (0.5, 4 / 6), (1.0, 1 / 6)):
        at = {n: w.clone() for n, w in stop.items()}
        for n in measured:
            at[n] = (start[n] + s * (stop[n] - start[n])).requires_grad_()
        inner = {n.removeprefix("net."): w for n, w in at.items()}
        loss = F.cross_entropy(functional_call(module.net, inner, (BATCH[0],)), BATCH[1])
        loss.backward()
        losses.append(loss.item())
        for n in measured:
            motion = (stop[n] - start[n]).numpy()
            total[n] += weight * float((at[n].grad.numpy() * motion).sum())
    return total, losses[0], losses[-1]


@pytest.mark.parametrize("loss_fn", [None, by_code], ids=["recorded", "by code"])
@pytest.mark.parametrize(
    "asked",
    [
        {"exclude": "net.2"},
        {"include": ["net.0", "*.bias"]},
        {"include": "net", "exclude": "*.4.*"},
    ],
    ids=str,
)
def test_credit_is_that_of_a_loss_whose_other_weights_are_constants(tmp_path, asked, loss_fn):
    trail = Trail()
    run = fit(
        tmp_path,
        trail,
        **DOUBLE,
        **asked,
        probe=[BATCH],
        loss_fn=loss_fn,
        group_by="parameter",
        figures=False,
    )
    history = run.lca.history
    assert history.settings["evaluated"] == "recorded" if loss_fn is None else "code"
    measured = list(history.groups)
    assert 0 < len(measured) < 6
    after = None
    for t in range(12):
        credit, first, last = by_hand(run.module, *trail.points[t : t + 2], measured)
        assert np.allclose(history.allocated[t], [*credit.values()], rtol=1e-10, atol=1e-15)
        assert history.loss_before[t] == pytest.approx(first, rel=1e-12)
        assert history.loss_after[t] == pytest.approx(last, rel=1e-12)
        # Weights that are left out moved from the last stop to this one: that is the drift.
        expected = 0.0 if after is None else first - after
        assert history.drift[t] == pytest.approx(expected, abs=1e-12)
        assert t == 0 or abs(expected) > 1e-5
        after = last
    booked = history.allocated.sum() + history.residual.sum() + history.drift.sum()
    assert booked == pytest.approx(history.loss_after[-1] - history.loss_before[0], abs=1e-12)
    assert "changes by weights left out" in history.summary()


def test_each_start_is_evaluated_afresh_where_left_out_weights_move_and_only_there(tmp_path):
    def spent(**asked):
        meter = next(iter(fit(tmp_path, figures=False, **asked).lca._training.meters.values()))
        return meter.gradients

    assert spent() == 25
    assert spent(exclude="net.2") == 36

    def frozen():
        model = Classifier()
        model.net[2].requires_grad_(False)
        return model

    assert spent(exclude="net.2", model=frozen) == 25


def test_training_is_bitwise_the_same(tmp_path):
    plain = fit(tmp_path / "plain", measured=False).module
    measured = fit(tmp_path / "lca", exclude=["net.2.weight", "net.4"], neurons=True).module
    for a, b in zip(plain.parameters(), measured.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"include": "nett.*"}, "include='nett.*' matches no parameter. Did you mean 'net"),
        (
            {"exclude": "*"},
            "exclude=['*'] leaves no trained weight to measure: nothing is left of 6",
        ),
        ({"include": "net.2"}, "the 2 parameters that are left have requires_grad=False"),
    ],
)
def test_patterns_that_leave_nothing_to_measure_are_refused_at_the_start(tmp_path, asked, message):
    model = Classifier()
    model.net[2].requires_grad_(False)
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        fit(tmp_path, model=model, **asked)


class Thaw(pl.Callback):
    """Freezes a layer in steps 4 to 7."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        module.net[0].requires_grad_(not 4 <= trainer.global_step < 8)


def test_steps_in_which_nothing_measured_trains_are_drift(tmp_path):
    def model():
        return Classifier(optimizer=lambda p: torch.optim.SGD(p, lr=0.1))

    history = fit(tmp_path, Thaw(), model=model, include="net.0", figures=False).lca.history
    assert history.steps.tolist() == [1, 2, 3, 4, 9, 10, 11, 12]
    booked = history.allocated.sum() + history.residual.sum() + history.drift.sum()
    assert booked == pytest.approx(history.loss_after[-1] - history.loss_before[0], abs=1e-6)


def size(name, parameter):
    return "biases" if parameter.dim() == 1 else "matrices"


@pytest.mark.parametrize("group_by", ["module:1", "head", size], ids=["module", "head", "function"])
def test_the_record_of_every_grouping_reads_back(tmp_path, group_by):
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(12, 4)

        def forward(self, x):
            x = x.reshape(-1, 3, 4)
            return self.head(self.attn(x, x, x, need_weights=False)[0].flatten(1))

    trainer = {"logger": pl.loggers.TensorBoardLogger(tmp_path)}
    lca = fit(
        tmp_path,
        model=lambda: Classifier(Attends()),
        trainer=trainer,
        group_by=group_by,
        neurons=True,
    ).lca
    read = History.load(lca.log_dir)
    assert read.group_by == ("custom" if callable(group_by) else group_by)
    assert read.groups == lca.history.groups
    assert read.layers == lca.history.layers
    assert np.allclose(read.allocated, lca.history.allocated, atol=1e-7)
    assert read.groups[-1] in lca.summary()
    if group_by == "head":
        assert read.groups[:2] == ("net.attn/q/head 0", "net.attn/q/head 1")
        assert read.shown.names == read.groups, "heads are rows of their own"


class Adapted(nn.Module):
    """A frozen layer and two small matrices beside it, by the names that PEFT gives them."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        down, up = (
            nn.Linear(base.in_features, rank, False),
            nn.Linear(rank, base.out_features, False),
        )
        self.lora_A = nn.ModuleDict({"default": down})
        self.lora_B = nn.ModuleDict({"default": up})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def adapted(width=1500):
    inner = nn.Sequential(
        Adapted(nn.Linear(12, width)),
        nn.ReLU(),
        Adapted(nn.Linear(width, width)),
        nn.ReLU(),
        Adapted(nn.Linear(width, 4)),
    )
    base_model = nn.Module()
    base_model.model = inner
    base_model.forward = inner.forward
    return nn.Sequential(nn.ModuleDict({"base_model": base_model})), inner


class Tuned(Classifier):
    def __init__(self):
        wrapped, _ = adapted()
        super().__init__(wrapped[0])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net["base_model"].model(batch[0]), batch[1])


def held_between_steps(path, **arguments):
    """Gives the bytes held, the groups, and the bytes of frozen and trained weights."""
    watch = Held()
    run = fit(path, watch, model=Tuned, steps=4, **arguments)
    sizes = [sum(p.nbytes for p in run.module.parameters() if p.requires_grad == t) for t in (0, 1)]
    return watch.bytes, run.lca and run.lca.history, sizes


def test_memory_follows_the_adapters_of_a_large_frozen_model(tmp_path):
    plain, _, _ = held_between_steps(tmp_path / "plain", measured=False)
    held, history, (frozen, trained) = held_between_steps(tmp_path / "lca", figures=False)
    assert history.settings["evaluated"] == "recorded"
    assert history.groups[:2] == ("net.0", "net.0.lora")
    assert history.sizes[1] == 2 * (12 + 1500), "both matrices are one group"
    assert frozen > 100 * trained
    assert held - plain < 3 * trained + 0.01 * frozen, "three copies of the adapters, the batch"


def test_a_grouping_that_a_later_version_knows_is_read_as_rows_of_their_own():
    said = {"probes": [None], "groups": ["a/0", "b/0"], "sizes": [1, 2], "first_step": 0}
    read = Description.parse(json.dumps(said | {"group_by": "expert"}).encode())
    assert read.group_by == "expert"
    assert History(read.groups, read.sizes, read.group_by).shown.names == ("a/0", "b/0")
    for odd in (["layer"], 3, "", "x" * 101):
        with pytest.raises(DescriptionError, match="group_by is"):
            Description.parse(json.dumps(said | {"group_by": odd}).encode())


@pytest.mark.parametrize("asked", [{"exclude": "net.2"}, {"include": "*.bias"}], ids=str)
def test_a_resumed_training_goes_on_with_the_same_part(tmp_path, asked):
    options = {"figures": False, "data": Resumable, "every_n_steps": 2} | asked
    whole = fit(tmp_path / "whole", steps=12, **options).lca
    saver = pl.callbacks.ModelCheckpoint(tmp_path / "saved", every_n_train_steps=5, save_top_k=-1)
    saves = {"enable_checkpointing": True}
    fit(tmp_path / "first", saver, steps=7, trainer=saves, **options)
    (saved,) = (tmp_path / "saved").glob("*step=5*.ckpt")
    again = fit(tmp_path / "again", saver, steps=12, resume=saved, trainer=saves, **options).lca
    assert again.history.groups == whole.history.groups
    read = [History.load(lca.log_dir) for lca in (again, whole)]
    assert_same_history(*read, rows_alone=True)


class TwoSteps(Classifier):
    """Two optimizers take a step each in every batch, and each leads to a point."""

    def __init__(self):
        super().__init__(mlp().double())
        self.automatic_optimization, self.points = False, []

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), 0.2) for layer in (self.net[0], self.net[4])]

    def note(self):
        self.points.append({n: w.detach().clone() for n, w in self.named_parameters()})

    def training_step(self, batch, batch_idx):
        if not self.points:
            self.note()
        for optimizer in self.optimizers():
            self.zero_grad()
            self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
            optimizer.step()
            self.note()


def test_single_steps_of_a_part_are_those_by_hand(tmp_path):
    def loss(module, batch):
        return F.cross_entropy(module.net(batch[0]), batch[1])

    run = fit(
        tmp_path,
        model=TwoSteps,
        data=lambda: toy_loader(dtype=torch.float64),
        probe=[BATCH],
        loss_fn=loss,
        segments="step",
        include="net.0",
        figures=False,
    )
    history, points = run.lca.history, run.module.points
    assert history.groups == ("net.0",)
    assert len(history) == 12
    measured = ["net.0.weight", "net.0.bias"]
    twin = Classifier(mlp().double())
    for t, (start, stop) in enumerate(pairwise(points)):
        # Steps are measured at the end of their batch, and what is left out lies there.
        ends = points[t // 2 * 2 + 2]
        stop = {n: stop[n] if n in measured else w for n, w in ends.items()}
        credit, before, after = by_hand(twin, start, stop, measured)
        assert history.allocated[t, 0] == pytest.approx(sum(credit.values()), rel=1e-9, abs=1e-15)
        assert history.loss_before[t] == pytest.approx(before, rel=1e-12)
        assert history.loss_after[t] == pytest.approx(after, rel=1e-12)
    assert (history.allocated[1::2] == 0).all(), "the other optimizer moves what is left out"
    assert np.abs(history.drift[2::2]).min() > 0


@pytest.mark.filterwarnings("ignore:LCA. measuring takes")  # Where the machine is shared.
def test_a_budget_chooses_chords_of_a_part_and_leaves_training_alone(tmp_path):
    budget = {"max_overhead": 0.5, "exclude": ["net.2", "*.bias"], "figures": False}
    run = fit(tmp_path / "lca", steps=120, **budget)
    plain = fit(tmp_path / "plain", steps=120, measured=False)
    mine, theirs = (r.module.state_dict() for r in (run, plain))
    assert all(torch.equal(mine[n], w) for n, w in theirs.items())
    history = run.lca.history
    assert history.groups == ("net.0", "net.4")
    assert run.lca.every_n_steps >= 1
    assert history.steps[-1] == 120
    booked = history.allocated.sum() + history.residual.sum() + history.drift.sum()
    assert booked == pytest.approx(history.loss_after[-1] - history.loss_before[0], rel=1e-9)
