"""segments="step": in manual optimization, a segment and a row for every step of a batch."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.models import Classifier, Gan, mlp, pl, toy_loader, unrecorded
from support.training import fit, make_trainer
from torch import nn

from lightning_lca import LCACallback
from lightning_lca.training.snapshots import Snapshots

BATCHES = 6
POINTS = []  # Of the weights, before and after every step; global, since probes put back modules.
SIMPSON = {0.0: 1 / 6, 0.5: 4 / 6, 1.0: 1 / 6}
TRAPEZOID = {0.0: 0.5, 1.0: 0.5}


class Turns(Classifier):
    """Steps its second layer once in every batch, and its first one twice, around it."""

    def __init__(self, how, net=None):
        super().__init__(net or nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)))
        self.automatic_optimization = False
        self.how = how

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer in (first, second, first):
            if not POINTS:
                self.note()
            if self.how == "toggled":
                self.toggle_optimizer(optimizer)
            self.step(optimizer, batch)
            if self.how == "toggled":
                self.untoggle_optimizer(optimizer)
            self.note()

    def step(self, optimizer, batch):
        def closure():
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(self, batch))

        if self.how == "closure":
            optimizer.step(closure)
        else:
            closure()
            (optimizer.optimizer if self.how == "bare" else optimizer).step()

    def note(self):
        POINTS.append([p.detach().clone() for p in self.parameters()])

    def configure_optimizers(self):
        first, *others = [m for m in self.net if list(m.parameters())]
        others = [p for m in others for p in m.parameters()]
        return [
            torch.optim.Adam(first.parameters(), 0.01),
            torch.optim.SGD(others, 0.1, momentum=0.9),
        ]


def cross_entropy(module, batch):
    return F.cross_entropy(module.net(batch[0]), batch[1])


def train(path, model, *others, batches=BATCHES, dtype=torch.float64, **arguments):
    """Trains for an epoch of so many batches; without arguments nothing measures."""
    POINTS.clear()
    precision = "64-true" if dtype == torch.float64 else "32-true"
    return fit(
        path,
        *others,
        model=model,
        data=toy_loader(samples=16 * batches, shuffle=False, dtype=dtype),
        run_seed=2,
        measured=bool(arguments),
        trainer={"max_epochs": 1, "max_steps": -1, "precision": precision},
        **arguments,
    )


def loss_and_gradient(weights, x, y):
    """The same network by hand, in NumPy."""
    w1, b1, w2, b2 = weights
    h = np.tanh(x @ w1.T + b1)
    z = h @ w2.T + b2
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    loss = -np.log(p[np.arange(len(y)), y]).mean()
    dz = (p - np.eye(4)[y]) / len(y)
    da = (dz @ w2) * (1 - h**2)
    return loss, [da.T @ x, da.sum(0), dz.T @ h, dz.sum(0)]


@pytest.mark.parametrize(("rule", "nodes"), [("simpson", SIMPSON), ("trapezoid", TRAPEZOID)])
@pytest.mark.parametrize("how", ["plain", "toggled", "closure", "bare"])
def test_every_step_has_the_credit_that_numpy_gives_it(tmp_path, how, rule, nodes):
    probe = list(toy_loader(samples=32, batch_size=32, shuffle=False, dtype=torch.float64))
    options = {"loss_fn": cross_entropy, "probe": probe, "quadrature": rule}
    lca, *_ = train(tmp_path, lambda: Turns(how), segments="step", **options)
    x, y = (part.numpy() for part in probe[0])
    points = [[p.numpy() for p in point] for point in POINTS]
    history = lca.history
    assert history.steps.tolist() == list(range(1, 3 * BATCHES + 1))
    for t, (start, stop) in enumerate(pairwise(points)):
        moved = [b - a for a, b in zip(start, stop)]
        at = {s: [a + s * m for a, m in zip(start, moved)] for s in nodes}
        gradients = {s: loss_and_gradient(at[s], x, y)[1] for s in nodes}
        credits = [
            m * sum(w * gradients[s][i] for s, w in nodes.items()) for i, m in enumerate(moved)
        ]
        layers = [np.concatenate([c.ravel() for c in credits[i : i + 2]]) for i in (0, 2)]
        assert history.loss_before[t] == pytest.approx(loss_and_gradient(start, x, y)[0], rel=1e-12)
        assert history.loss_after[t] == pytest.approx(loss_and_gradient(stop, x, y)[0], rel=1e-12)
        assert history.allocated[t] == pytest.approx([c.sum() for c in layers], abs=1e-14)
        helped = [(c < 0).sum() / c.size for c in layers]
        assert history.helping[t] == pytest.approx(helped)
        idle = 0 if t % 3 == 1 else 1
        assert history.allocated[t, idle] == 0, "The other layer rests."
        assert history.allocated[t, 1 - idle] != 0
    assert (history.drift == 0).all()
    assert len(lca._training.snapshots._marks) == 2, (
        "One more copy for every further step of a batch."
    )


def test_a_mark_is_made_once_for_every_number_of_steps():
    """A step that is not counted, as after one that was skipped, joins the next."""
    weight = torch.zeros(1)
    path = Snapshots()
    path.open({"w": weight})
    for value, step in ((1, 1), (2, 1), (3, 2)):
        path.mark({"w": weight.fill_(value)}, step)
    whole = path.close({"w": weight.fill_(4)})
    pieces = [(p.start["w"].item(), p.stop["w"].item(), s) for p, s in path.pieces(whole, 3)]
    assert pieces == [(0, 1, 1), (1, 3, 2), (3, 4, 3)]


def normed():
    return nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))


@pytest.mark.parametrize("mode", ["no_dropout", "eval"])
@pytest.mark.parametrize("how", ["plain", "bare"])
def test_the_steps_of_a_batch_add_up_to_the_batch_to_the_bit(tmp_path, how, mode):
    options = {"loss_fn": cross_entropy, "probe_mode": mode, "quadrature": "simpson"}
    runs = {}
    for segments in ("batch", "step"):
        model = lambda: Turns(how, normed())  # noqa: E731
        runs[segments], module, _ = train(tmp_path / segments, model, segments=segments, **options)
    _, plain, _ = train(tmp_path / "plain", model)
    for mine, theirs in zip(module.state_dict().values(), plain.state_dict().values()):
        assert torch.equal(mine, theirs)
    whole, pieces = runs["batch"].history, runs["step"].history
    assert pieces.steps[2::3].tolist() == whole.steps.tolist()
    assert np.array_equal(pieces.loss_before[::3], whole.loss_before)
    assert np.array_equal(pieces.loss_after[2::3], whole.loss_after)
    assert np.array_equal(pieces.drift[::3], whole.drift)
    if mode == "eval":
        assert np.abs(whole.drift[1:]).min() > 0, "Running statistics have moved in between."
    within = np.arange(len(pieces)) % 3 > 0
    assert (pieces.drift[within] == 0).all(), "but within a batch the surface is one."
    assert np.array_equal(pieces.loss_before[within], pieces.loss_after[:-1][within[1:]])
    change = (pieces.loss_after - pieces.loss_before).reshape(-1, 3).sum(1)
    assert change == pytest.approx(whole.loss_after - whole.loss_before, abs=1e-15)


@pytest.mark.parametrize("bare_critic", [False, True])
def test_a_gan_shows_who_moved(tmp_path, bare_critic):
    def loss(module, batch):
        return module.critic_loss(batch[0])

    single = {"dtype": torch.float32}
    _, plain, _ = train(tmp_path / "plain", lambda: Gan(bare_critic), **single)
    options = {"loss_fn": loss, "segments": "step", "probe_batches": 2}
    lca, module, _ = train(tmp_path / "lca", lambda: Gan(bare_critic), **single, **options)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), plain.parameters()))
    history = lca.history
    assert history.steps.tolist() == list(range(1, 2 * BATCHES + 1))
    critic = np.array([g.startswith("critic") for g in history.groups])
    assert (history.allocated[::2, critic] == 0).all()
    assert (history.allocated[1::2, ~critic] == 0).all()
    assert (history.allocated[1::2, critic] != 0).all()


class Fails:
    """Raises at its n-th call, from within a segment."""

    def __init__(self, n):
        self.calls, self.n = 0, n

    def __call__(self, module, batch):
        self.calls += 1
        if self.calls == self.n:
            raise KeyError("mine")
        return unrecorded(cross_entropy(module, batch))


class Keeps(pl.Callback):
    def on_exception(self, trainer, module, exception):
        self.weights = [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("call", range(2, 11))
def test_an_error_between_the_steps_leaves_the_live_weights_and_where_it_stopped(tmp_path, call):
    keeps, fails = Keeps(), Fails(call)
    lca = LCACallback(loss_fn=fails, segments="step", figures=False)
    POINTS.clear()
    with pytest.raises(KeyError, match="mine"):
        make_trainer(tmp_path, lca, keeps).fit(Turns("plain"), toy_loader(shuffle=False))
    assert fails.calls == call
    for live, last in zip(keeps.weights, POINTS[-1]):
        assert torch.equal(live, last)
    measured = len(lca.history)
    opened = lca.state_dict()["open"]
    assert opened["at"] == measured
    for kept, point in zip(opened["weights"].values(), POINTS[measured]):
        assert torch.equal(kept, point), "A checkpoint saved now goes on at the first unmeasured."


@pytest.mark.parametrize(
    "optimizer", [lambda p: torch.optim.SGD(p, 0.1), lambda p: torch.optim.LBFGS(p, 0.1, 3)]
)
def test_automatic_optimization_has_one_step_in_a_batch_as_ever(tmp_path, optimizer):
    runs = []
    for segments in ("batch", "step"):
        lca, module, _ = train(
            tmp_path / segments, lambda: Classifier(mlp(), optimizer), segments=segments
        )
        runs.append((lca.history.rows, list(module.parameters())))
    (a, mine), (b, theirs) = runs
    assert all(torch.equal(p, q) for p, q in zip(mine, theirs))
    for column in set(vars(a)) - {"seconds"}:
        assert np.array_equal(getattr(a, column), getattr(b, column)), column


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 4}, 'segments="step" measures every .* got every_n_steps=4 and'),
        ({"max_overhead": 0.1}, 'Chords need segments="batch"'),
        ({"segments": "epoch"}, "segments must be one of 'batch', 'step'; got 'epoch'"),
    ],
)
def test_chords_of_single_steps_are_refused_when_typed(arguments, message):
    with pytest.raises(ValueError, match=message):
        LCACallback(**({"segments": "step"} | arguments))
