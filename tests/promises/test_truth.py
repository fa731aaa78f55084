"""What the callback credits, against mathematics done elsewhere: NumPy, by hand, in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from support.assertions import assert_ledger_closes
from support.marks import matrix
from support.models import Classifier, mlp, pl, toy_loader
from support.training import fit, make_trainer
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.data import DataLoader, TensorDataset

from lightning_lca import LCACallback

# -- the twin: a network of two layers, its loss and gradient by hand -----------------------------


def twin_loss_and_gradient(weights, x, y):
    """Cross-entropy of softmax(W2 tanh(W1 x + b1) + b2) and its gradient, in NumPy."""
    w1, b1, w2, b2 = weights
    hidden = np.tanh(x @ w1.T + b1)
    logits = hidden @ w2.T + b2
    logits = logits - logits.max(1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    rows = np.arange(len(y))
    error = np.exp(log_p)
    error[rows, y] -= 1
    error /= len(y)
    back = (error @ w2) * (1 - hidden**2)
    gradient = (back.T @ x, back.sum(0), error.T @ hidden, error.sum(0))
    return -log_p[rows, y].mean(), gradient


def twin_credits(start, stop, x, y):
    """Simpson's rule on the path integral, weight by weight."""
    middle = [(a + b) / 2 for a, b in zip(start, stop)]
    (before, g0), (_, g1), (after, g2) = (
        twin_loss_and_gradient(w, x, y) for w in (start, middle, stop)
    )
    credits = [(b - a) * (p + 4 * q + r) / 6 for a, b, p, q, r in zip(start, stop, g0, g1, g2)]
    return before, after, credits


class Recorder(pl.Callback):
    """Notes something at the end of every batch."""

    def __init__(self, note):
        self.note, self.notes = note, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.notes.append(self.note(pl_module))


def digits():
    x, y = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(x[:600] / 16), torch.tensor(y[:600]))


OPTIMIZERS = {
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_weights_credit_is_that_of_an_independent_implementation(tmp_path, optimizer):
    data = digits()
    probe = [data[:300]]

    def run(*callbacks):
        pl.seed_everything(5)
        net = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))
        model = Classifier(net, optimizer).double()
        weights = [p.detach().numpy().copy() for p in model.parameters()]
        trainer = make_trainer(tmp_path, *callbacks, max_steps=50, precision="64-true")
        trainer.fit(model, DataLoader(data, batch_size=50, shuffle=True))
        return weights

    # The path comes from a run without the callback; the credits from a second run with it.
    path = Recorder(lambda m: [p.detach().numpy().copy() for p in m.parameters()])
    weights = [run(path), *path.notes]
    lca = LCACallback(probe=probe, track_parameters=True)
    credits = Recorder(
        lambda m: [lca.last.values[n].numpy().copy() for n, _ in m.named_parameters()]
    )
    run(lca, credits)

    assert len(credits.notes) == 50
    x, y = (t.numpy() for t in probe[0])
    totals = [np.zeros_like(w) for w in weights[0]]
    for step in range(50):
        before, after, expected = twin_credits(weights[step], weights[step + 1], x, y)
        largest = max(np.abs(e).max() for e in expected)
        for got, want, sum_ in zip(credits.notes[step], expected, totals):
            assert np.abs(got - want).max() <= 1e-9 * largest
            sum_ += want
        assert lca.history.loss_before[step] == pytest.approx(before, rel=1e-12)
        assert lca.history.loss_after[step] == pytest.approx(after, rel=1e-12)
        explained = sum(e.sum() for e in expected)
        assert lca.history.residual[step] == pytest.approx(after - before - explained, abs=1e-13)
        layers = [expected[0].sum() + expected[1].sum(), expected[2].sum() + expected[3].sum()]
        assert lca.history.allocated[step] == pytest.approx(layers, abs=1e-13)
        helped = [(expected[0] < 0).sum() + (expected[1] < 0).sum()]
        assert lca.history.helping[step, 0] == pytest.approx(
            helped[0] / lca.history.sizes[0], abs=2e-3
        )
    for (name, total), want in zip(lca.totals.items(), totals):
        assert np.abs(total.numpy() - want).max() <= 1e-9 * max(np.abs(t).max() for t in totals), (
            name
        )
    assert lca.history.loss_after[-1] < 0.5 * lca.history.loss_before[0], "nothing was learned"


# -- the ledger, on every kind of model -----------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(12, 12), nn.Linear(12, 12)
        self.outer.weight = self.inner.weight
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.outer(torch.tanh(self.inner(x)))))


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8, sparse=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.embed((x.abs() * 20).long().clamp(max=49)).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 8, num_layers=2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.lstm(x.view(len(x), 4, 3))[0][:, -1])


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(4, 2, 16, dropout=0.2, batch_first=True)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.block(x.view(len(x), 3, 4)).mean(1))


def normed():
    return nn.Sequential(
        nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4)
    )


def frozen():
    net = mlp()
    net[0].requires_grad_(False)
    return net


NETS = {
    "mlp": mlp,
    "batchnorm and dropout": normed,
    "frozen layer": frozen,
    "tied weights": Tied,
    "sparse embedding": Sparse,
    "weight norm": lambda: nn.Sequential(
        weight_norm(nn.Linear(12, 16)), nn.Tanh(), nn.Linear(16, 4)
    ),
    "spectral norm": lambda: nn.Sequential(
        spectral_norm(nn.Linear(12, 16)), nn.Tanh(), nn.Linear(16, 4)
    ),
    "lstm": Recurrent,
    "transformer": Attentive,
}
RUNS = {
    "plain": {},
    "eval mode": {"probe_mode": "eval"},
    "dropout on": {"probe_mode": "train"},
    "chords": {"every_n_steps": 5},
    "midpoint": {"quadrature": "midpoint"},
    "closed": {"quadrature": "closed_trapezoid", "breakdown": True},
    "adaptive": {"quadrature": "adaptive", "oscillation": True},
    "refined": {"tolerance": 1e-3},
    "neurons": {"group_by": "neuron"},
    "modules": {"group_by": "module:1"},
    "a function": {"group_by": lambda name, parameter: f"of {parameter.dim()} dimensions"},
    "shares": {"breakdown": True, "oscillation": True},
    "chords and shares": {"every_n_steps": 5, "breakdown": "order", "oscillation": True},
    "biases left out": {"exclude": "*.bias*"},
}


def train(path, net, *callbacks, dtype=torch.float32, steps=14, loader=None, **arguments):
    def model():
        momentum = 0.0 if net is Sparse else 0.9
        return Classifier(net(), lambda p: torch.optim.SGD(p, lr=0.1, momentum=momentum)).to(dtype)

    return fit(
        path,
        *callbacks,
        model=model,
        data=toy_loader(dtype=dtype) if loader is None else loader,
        steps=steps,
        run_seed=2,
        trainer={"precision": "64-true" if dtype == torch.float64 else "32-true"},
        **arguments,
    )


@pytest.mark.parametrize("run", matrix(RUNS, ["plain", "refined"]))
@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
@pytest.mark.parametrize(
    ("dtype", "relative"),
    [
        pytest.param(torch.float64, 1e-9, marks=pytest.mark.slow),
        (torch.float32, 1e-5),
    ],
)
def test_the_ledger_closes_and_the_residual_is_small(tmp_path, net, run, dtype, relative):
    lca, *_ = train(tmp_path, net, dtype=dtype, **run)
    history = lca.history
    assert_ledger_closes(history, relative)
    assert len(history) == (3 if "every_n_steps" in run else 14)
    assert history.steps[-1] == 14, "the last partial chord is measured"
    moved = np.abs(history.loss_after - history.loss_before).sum() + np.abs(history.drift).sum()
    # Credits must explain what is booked, not the residual: chords and kinks leave a little.
    assert np.abs(history.residual).sum() < 0.05 * moved
    if run.get("quadrature") == "closed_trapezoid":
        assert np.abs(history.residual).max() < relative * np.abs(history.allocated).sum(1).max()
        assert np.abs(history.raw_residual).max() > 1e3 * np.abs(history.residual).max()
    if "tolerance" in run:
        assert (np.abs(history.residual) <= 1e-3 * (1 + 1e-4))[history.converged].all()
        assert history.converged.any()
    assert (history.oscillation is not None) == ("oscillation" in run)
    assert bool(history.breakdowns) == ("breakdown" in run)
    size = np.abs(history.allocated).max()
    for breakdown in history.breakdowns.values():
        rest = breakdown.allocated.sum(2) - history.allocated
        assert np.abs(rest).max() <= 1e-12 * size
    if "part" in history.breakdowns:
        other = history.breakdowns["part"].allocated[:, :, -1]
        # Nobody but the optimizer moves these weights: what is left is the rounding of its step.
        assert np.abs(other).max() <= 100 * relative * size


@pytest.mark.parametrize("net", [frozen, Tied], ids=["frozen", "tied"])
def test_credits_of_frozen_weights_are_zero_and_tied_ones_count_once(tmp_path, net):
    lca, model, _ = train(tmp_path, net)
    sizes = dict(zip(lca.history.groups, lca.history.sizes))
    assert sum(sizes.values()) == sum(p.numel() for p in model.parameters())
    if net is frozen:
        assert (lca.history.allocated[:, 0] == 0).all()
        assert (lca.history.helping[:, 0] + lca.history.hurting[:, 0] == 0).all()
        assert (lca.history.trained == sum(p.numel() for p in model.net[2:].parameters())).all()


def test_weights_unfrozen_in_mid_training_join_and_the_ledger_closes(tmp_path):
    class Unfreeze(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 6:
                pl_module.net[0].requires_grad_(True)
                trainer.optimizers[0].add_param_group(
                    {"params": list(pl_module.net[0].parameters())}
                )

    lca, *_ = train(tmp_path, frozen, Unfreeze(), dtype=torch.float64)
    history = lca.history
    assert_ledger_closes(history, 1e-9)
    assert (history.allocated[:6, 0] == 0).all()
    assert (history.allocated[6:, 0] != 0).all()
    assert (history.drift == 0).all()


def test_without_dropout_the_probe_is_the_deterministic_loss(tmp_path):
    """In mode no_dropout L is the train-mode loss with every kind of dropout off."""
    for net in (normed, Recurrent, Attentive):
        batch = next(iter(toy_loader(shuffle=False)))
        lca, model, _ = train(tmp_path, net, probe=[batch])
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(module, nn.LSTM | nn.MultiheadAttention):
                module.dropout = 0.0
        with torch.no_grad():
            expected = F.cross_entropy(model.net(batch[0]), batch[1])
        assert lca.history.loss_after[-1] == pytest.approx(expected.item(), rel=1e-5)


def test_the_probe_loss_is_the_mean_over_samples_also_with_a_ragged_last_batch(tmp_path):
    loader = toy_loader(batch_size=36, shuffle=False)  # 36 + 36 + 24 samples.
    lca, model, _ = train(tmp_path, mlp, probe=loader, dtype=torch.float32)
    x, y = loader.dataset.tensors
    expected = F.cross_entropy(model.net(x), y).item()
    assert lca.history.loss_after[-1] == pytest.approx(expected, rel=1e-6)


def test_chords_measure_a_fifth_as_often_and_sum_to_the_same(tmp_path):
    every, *_ = train(tmp_path, mlp, dtype=torch.float64, steps=23)
    chords, *_ = train(tmp_path, mlp, dtype=torch.float64, steps=23, every_n_steps=5)
    a, b = every.history, chords.history
    assert b.steps.tolist() == [5, 10, 15, 20, 23]
    assert b.loss_before[0] == a.loss_before[0]
    assert b.loss_after.tolist() == a.loss_after[[4, 9, 14, 19, 22]].tolist()
    slack = np.abs(a.residual).sum() + np.abs(b.residual).sum()
    assert abs(a.allocated.sum() - b.allocated.sum()) <= slack + 1e-12
    assert (b.drift == 0).all()
