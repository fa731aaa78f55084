"""When an end gradient may serve as the next start, and what is booked when it may not."""

import itertools
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from support.assertions import assert_ledger_closes
from support.marks import matrix
from support.models import Classifier, mlp, pl, toy_loader, unrecorded
from support.training import fit
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from lightning_lca import History, LCACallback
from lightning_lca.measure.allocation import Buffer, Sample
from lightning_lca.measure.quadrature import as_quadrature
from lightning_lca.probe.probe import Probe
from lightning_lca.runtime.processes import Ranks
from lightning_lca.training.meter import Meter
from lightning_lca.training.reuse import AUDIT_EVERY
from lightning_lca.training.snapshots import Snapshots


def gradients_of(lca):
    """Calls of autograd for measuring: without the check before training and the audits."""
    (meter,) = lca._training.meters.values()
    return meter.gradients


NO_MORE = "finer panels explained no more of the loss change"

# Gradients of the first segment, and of every later one.
COSTS = {
    "simpson": (3, 2),
    "midpoint": (1, 1),
    "trapezoid": (2, 1),
    "closed_trapezoid": (2, 1),
    "euler": (2, 1),
    "boole": (5, 4),
    "gauss2": (2, 2),
}


@pytest.mark.parametrize(
    ("rule", "first", "then"),
    matrix({rule: (rule, *costs) for rule, costs in COSTS.items()}, quick=["simpson", "midpoint"]),
)
def test_a_measured_step_costs_the_gradients_it_promises(tmp_path, monkeypatch, rule, first, then):
    calls = []
    take = Probe._differentiate
    monkeypatch.setattr(Probe, "_differentiate", lambda *a: calls.append(1) or take(*a))
    lca = fit(tmp_path, quadrature=rule, steps=120).lca
    assert gradients_of(lca) == first + 119 * then
    (meter,) = lca._training.meters.values()
    epochs = 120 // 6 - 1
    assert epochs + 2 <= meter.audits <= epochs + 2 + 120 // AUDIT_EVERY
    assert len(calls) == 3 + meter.audits, "a look, a recording, a comparison; then audits alone"
    assert (lca.history.drift == 0).all()


def test_the_adaptive_rule_costs_a_second_gradient_where_it_takes_the_middle(tmp_path):
    lca = fit(tmp_path, quadrature="adaptive", steps=120).lca
    history = lca.history
    middles = history.raw_residual == history.residual
    assert middles[0], "of the first step nothing is known to compare with"
    assert 1 < middles.sum() < 60
    assert gradients_of(lca) == 2 + 119 + middles.sum()
    simpson = fit(tmp_path, quadrature="simpson", steps=120).lca.history
    ours, theirs = (h.allocated[middles] for h in (history, simpson))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)
    assert np.array_equal(history.loss_after, simpson.loss_after)
    assert np.abs(history.residual[~middles]).max() < 1e-6
    assert np.abs(history.raw_residual[~middles]).max() > 1e-5
    read = History.load(lca.log_dir)
    assert np.array_equal(read.raw_residual, history.raw_residual)
    assert read.closes
    assert f"{middles.sum()} of 120 steps took the gradient in the middle, too." in lca.summary()


@pytest.mark.parametrize("rule", ["simpson", "midpoint"])
def test_a_loss_that_cannot_be_recorded_costs_the_same_gradients(tmp_path, monkeypatch, rule):
    calls = []
    take = Probe._differentiate
    monkeypatch.setattr(Probe, "_differentiate", lambda *a: calls.append(1) or take(*a))
    lca = fit(tmp_path, model=Unrecorded, quadrature=rule, steps=120).lca
    first, then = COSTS[rule]
    assert gradients_of(lca) == first + 119 * then
    (meter,) = lca._training.meters.values()
    assert meter.audits == 1 + 118 // AUDIT_EVERY
    audited = meter.audits if as_quadrature(rule).first_is_start else 0
    looks = 2  # To look, and to try to record.
    assert len(calls) == looks + first + 119 * then + audited
    assert (lca.history.drift == 0).all()


class Unrecorded(Classifier):
    def training_step(self, batch, batch_idx):
        return unrecorded(super().training_step(batch, batch_idx))


def test_batchnorm_costs_no_more_on_batch_statistics_and_one_more_on_running_ones(tmp_path):
    def model():
        return Classifier(nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)))

    assert gradients_of(fit(tmp_path, model=model).lca) == 3 + 11 * 2
    lca = fit(tmp_path, model=model, probe_mode="eval").lca
    assert gradients_of(lca) == 12 * 3
    assert (lca.history.drift[1:] != 0).all(), "running statistics move the loss between segments"
    assert_ledger_closes(lca.history, 1e-5)


class Clamped(Classifier):
    """Clips its weights after every step, as a critic does."""

    def on_train_batch_end(self, *args):
        with torch.no_grad():
            for p in self.parameters():
                p.clamp_(-0.2, 0.2)


class ClampedThroughData(Classifier):
    """The same behind the back of version counters."""

    def on_train_batch_end(self, *args):
        for p in self.parameters():
            p.data.clamp_(-0.2, 0.2)


class Reset(pl.Callback):
    """Starts the last layer again at step 6."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 6:
            pl_module.net[-1].reset_parameters()


class Replace(pl.Callback):
    """Puts a new parameter object in place of an old one."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 6:
            old = pl_module.net[-1].weight
            new = nn.Parameter(old.detach() * 1.5)
            pl_module.net[-1].weight = new
            group = trainer.optimizers[0].param_groups[0]
            group["params"] = [new if p is old else p for p in group["params"]]


@pytest.mark.parametrize(
    ("model", "callbacks", "drifting"),
    [
        (Clamped, (), None),
        (ClampedThroughData, (), None),
        (Classifier, (Reset(),), [6]),
        (Classifier, (Replace(),), [6]),
    ],
    ids=["clamped", "clamped through .data", "re-initialised", "replaced"],
)
def test_weights_changed_by_other_code_are_seen_and_booked_as_drift(
    tmp_path, model, callbacks, drifting
):
    lca = fit(tmp_path, *callbacks, model=model).lca
    history = lca.history
    assert_ledger_closes(history, 1e-5)
    if drifting is not None:
        assert np.flatnonzero(history.drift).tolist() == drifting
        assert gradients_of(lca) == 3 + 11 * 2 + len(drifting)
    else:
        assert np.count_nonzero(history.drift) >= 8
    plain = fit(tmp_path).lca.history
    assert np.abs(history.residual).max() < 3 * np.abs(plain.residual).max(), "residuals stay small"


class Codebook(Classifier):
    """Reads a buffer that moves with every training batch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.zeros(12))

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.shift += 0.05 * x.mean(0)
        return F.cross_entropy(self.net(x + self.shift), y)


class Teacher(Classifier):
    """Reads a frozen copy that follows the student, written through .data after every step."""

    def __init__(self):
        super().__init__()
        self.teacher = mlp().requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        return F.cross_entropy(logits, y) + F.mse_loss(logits, self.teacher(x))

    def on_train_batch_end(self, *args):
        for t, s in zip(self.teacher.parameters(), self.net.parameters()):
            t.data.mul_(0.9).add_(0.1 * s.data)


class Spectral(Classifier):
    def __init__(self):
        super().__init__(
            nn.Sequential(spectral_norm(nn.Linear(12, 16)), nn.Tanh(), nn.Linear(16, 4))
        )


class Gate(nn.Module):
    """Behaves differently in training, without a tensor that would show it."""

    def forward(self, x):
        return x * 1.5 if self.training else x


class Gated(Classifier):
    """Puts its gate in eval mode from step 6 on: another loss, with no tensor changed."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(12, 8), Gate(), nn.Tanh(), nn.Linear(8, 4)))

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step >= 6:
            self.net[1].eval()


@pytest.mark.parametrize("model", [Codebook, Teacher, Spectral, Gated])
def test_whatever_else_the_loss_reads_is_watched(tmp_path, model):
    lca = fit(tmp_path, model=model).lca
    history = lca.history
    assert_ledger_closes(history, 1e-5)
    (meter,) = lca._training.meters.values()
    assert meter._reuse.on, "seen by looking, not by the audit"
    changes = 1 if model is Gated else 11
    assert np.count_nonzero(history.drift) >= min(changes, 10)
    assert gradients_of(lca) == 3 + 11 * 2 + changes
    assert np.abs(history.residual).sum() < 0.01 * np.abs(history.allocated).sum()


class Annealed(Classifier):
    """Weighs its loss by the step number, which no look at the module can show."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + 0.01 * self.global_step)


class SlowNoise(Classifier):
    """Gives the same loss but another gradient, depending on the step number."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        extra = self.net[0].bias.sum() * 1e-2 * self.global_step
        return loss + extra - extra.detach()


@pytest.mark.parametrize("model", [Annealed, SlowNoise])
def test_a_loss_that_depends_on_the_step_number_is_caught_by_the_audit(tmp_path, model):
    with pytest.warns(
        UserWarning, match="depends on something else, such as the step number"
    ) as seen:
        lca = fit(tmp_path, model=model, steps=20).lca
    assert sum("step number" in str(w.message) for w in seen) == 1
    (meter,) = lca._training.meters.values()
    assert not meter._reuse.on
    assert_ledger_closes(lca.history, 1e-5)
    if model is Annealed:
        assert (lca.history.drift[1:] != 0).all()
        assert np.abs(lca.history.residual).sum() < 0.01 * np.abs(lca.history.allocated).sum()


class Noisy(Classifier):
    """Draws from every stream there is."""

    def __init__(self):
        super().__init__(
            nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))
        )
        self.generator = torch.Generator().manual_seed(0)
        self.numpy_rng = np.random.default_rng(0)

    def training_step(self, batch, batch_idx):
        x, y = batch
        noise = torch.randn(x.shape, generator=self.generator) * 0.3
        gain = 1 + 0.2 * self.numpy_rng.normal() + 0.2 * np.random.normal() + 0.1 * torch.rand(())
        return F.cross_entropy(self.net(x * gain + noise), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("mode", ["train", "no_dropout"])
def test_the_probe_loss_at_unchanged_weights_is_one_number_for_the_whole_run(tmp_path, mode):
    lca = fit(tmp_path, model=Noisy, probe_mode=mode, probe_batches=3, steps=60).lca
    history = lca.history
    assert len(set(history.loss_before) | set(history.loss_after)) == 1
    assert (history.allocated == 0).all()
    assert gradients_of(lca) == 3 + 59 * 2, "audits agree: it is one surface"


def test_three_copies_of_the_weights_are_kept_between_steps(tmp_path):
    held = []

    class Weigh(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen = {}
            stack = [lca._training.snapshots, *lca._training.meters.values()]
            while stack:
                value = stack.pop()
                if isinstance(value, torch.Tensor):
                    seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
                elif isinstance(value, dict):
                    stack += value.values()
                elif isinstance(value, list | tuple):
                    stack += value
                elif isinstance(value, Snapshots | Meter | Sample | Buffer):
                    stack += vars(value).values()
            weights = sum(p.numel() * p.element_size() for p in pl_module.parameters())
            held.append(sum(seen.values()) / weights)

    pl.seed_everything(0)
    lca = LCACallback()
    model = Classifier(mlp(hidden=256))
    fit(tmp_path, lca, Weigh(), model=model, steps=5)
    assert held[-1] == pytest.approx(3, abs=0.05)


def test_several_probes_share_the_path_and_keep_their_own_books(tmp_path):
    lca = fit(tmp_path, probe={"a": "train", "b": [next(iter(toy_loader(shuffle=False)))]}).lca
    a, b = lca.histories["a"], lca.histories["b"]
    assert lca.history is a
    alone = fit(tmp_path).lca.history
    assert np.array_equal(a.allocated, alone.allocated)
    assert not np.array_equal(a.allocated, b.allocated)
    for history in (a, b):
        assert_ledger_closes(history, 1e-5)


class HalfDetached(Classifier):
    """Squares its loss, and hides one of the factors from autograd."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * loss.detach()


def test_a_tolerance_is_advised_only_where_finer_panels_leave_less_over(tmp_path):
    told = {}
    for model in (Classifier, HalfDetached):
        settled = model is HalfDetached
        with pytest.warns(UserWarning, match=NO_MORE) if settled else nullcontext():
            lca = fit(
                tmp_path, model=model, steps=20, trainer={"logger": TensorBoardLogger(tmp_path)}
            ).lca
        assert (lca.history.splits == 2).sum() == 3 * settled, "three in vain, and none after"
        loaded = History.load(lca.log_dir)
        assert loaded.settings["halving"] == lca.history.settings["halving"]
        assert len(loaded) == 20, "what is found out later belongs to the same session"
        told[model] = lca.history.settings["halving"], lca.summary(), loaded.summary()
    smooth, half = told[Classifier], told[HalfDetached]
    assert smooth[0] < 0.1
    assert half[0] > 0.9
    for text in half[1:]:
        assert "Finer panels would not make it smaller: the gradient is not the derivative" in text
    assert "tolerance" not in half[1].rpartition("residual is large")[2]


def normalised(width=64, depth=12):
    """A network whose first steps under AdamW bend the path more than Simpson's rule can follow."""
    sizes = [12] + [width] * depth
    layers = [
        layer
        for a, b in itertools.pairwise(sizes)
        for layer in (nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU())
    ]
    net = nn.Sequential(*layers, nn.Linear(width, 4))
    return Classifier(net, lambda p: torch.optim.AdamW(p, 1e-2))


def test_a_first_step_that_leaves_more_than_it_explains_is_measured_in_two_halves(tmp_path, caplog):
    with caplog.at_level("INFO"):
        run = fit(tmp_path / "a", model=normalised, run_seed=1, steps=6)
    history = run.lca.history
    assert history.splits.tolist() == [2, 1, 1, 1, 1, 1]
    twice = fit(
        tmp_path / "b",
        model=normalised,
        run_seed=1,
        steps=1,
        quadrature=as_quadrature("simpson").composite(2),
    ).lca.history
    one = fit(tmp_path / "c", model=normalised, run_seed=1, steps=1, tolerance=1e9).lca.history
    np.testing.assert_allclose(history.allocated[0], twice.allocated[0], rtol=2e-4, atol=1e-6)
    assert abs(one.residual[0]) > np.abs(one.allocated[0]).sum(), "else it would not be halved"
    assert abs(history.residual[0]) < abs(one.residual[0]) / 4
    assert_ledger_closes(history, relative=1e-5)
    assert caplog.text.count("it is measured in two halves") == 1
    assert "1 of 6 steps were measured in two halves" in run.lca.summary()
    plain = fit(tmp_path / "d", model=normalised, run_seed=1, steps=6, measured=False)
    for a, b in zip(run.module.parameters(), plain.module.parameters(), strict=True):
        assert torch.equal(a, b)


class StraightThrough(Classifier):
    """Its gradient is not the derivative of its loss."""

    def training_step(self, batch, batch_idx):
        hidden = self.net[1](self.net[0](batch[0]))
        loss = F.cross_entropy(self.net[2](hidden + (hidden.sign() - hidden).detach()), batch[1])
        self.log("train_loss", loss)
        return loss


def test_panels_that_gain_nothing_are_given_up_and_the_reason_is_said(tmp_path):
    with pytest.warns(UserWarning, match=NO_MORE) as told:
        lca = fit(tmp_path, model=StraightThrough, steps=60, tolerance=1e-4).lca
    assert sum("explained no more" in str(w.message) for w in told) == 1
    splits = lca.history.splits
    assert (splits[:3] > 1).all()
    assert splits[20:].mean() < 2
    assert not lca.history.converged.all()
    assert "the gradient is not the derivative of the loss" in lca.summary()


class LostOnce(Classifier):
    """Has no loss on the probe when its second start is audited."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if self.lost and len(batch[0]) == 7 and self.global_step == 2 else loss


@pytest.mark.parametrize("lost", [False, True])
def test_ranks_ask_one_another_equally_often_whatever_one_of_them_finds(
    tmp_path, monkeypatch, lost
):
    asked = []
    ask = Ranks.all
    monkeypatch.setattr(Ranks, "all", lambda *a: asked.append(len(a[1])) or ask(*a))
    LostOnce.lost = lost
    x, y = next(iter(toy_loader(shuffle=False)))
    lca = fit(tmp_path, model=LostOnce, probe=[[x[:7], y[:7]]], steps=4).lca
    (meter,) = lca._training.meters.values()
    assert meter.audits == 1
    assert len(lca.history) == 4
    # At the start of a step, and where it is looked at whether it is to be halved; at an audit.
    begun = asked.index(6)
    assert asked[begun:] == [6, 1, 6, 2, 1, 6, 1, 6, 1], "others would wait for ever"


@pytest.mark.parametrize("flag", [4, 5], ids=["it is due there", "it has seen a change"])
def test_an_audit_that_one_rank_has_reason_for_is_made_by_all(tmp_path, monkeypatch, flag):
    starts = []
    ask = Ranks.all

    def another_wants(ranks, flags, device):
        if len(flags) == 6:
            starts.append(flags)
            if len(starts) == 4:
                flags[flag] = False
        return ask(ranks, flags, device)

    monkeypatch.setattr(Ranks, "all", another_wants)
    (meter,) = fit(tmp_path, steps=6).lca._training.meters.values()
    assert meter.audits == 2, "at the second start, and where another asks for it"
