"""max_overhead: what it chooses, and that the number chosen gives the same run again.

Time is made up: training and the probe move the clock by what they are told to take.
"""

import functools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.assertions import assert_same_history, scalars
from support.models import Classifier, mlp, pl, toy_loader, unrecorded
from support.training import fit
from torch import nn

from lightning_lca import LCACallback
from lightning_lca.record.reader import Reader
from lightning_lca.training.budget import Budget

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need"),
]


class Clock:
    """Moves only when it is moved."""

    def __init__(self):
        self.now, self.reads = 0.0, 0

    def __call__(self):
        self.reads += 1
        return self.now


CLOCK = pytest.lca_clock = Clock()  # Kept at another's module: what this one has is put back.


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    CLOCK.__init__()
    monkeypatch.setattr("lightning_lca.training.budget.clock", CLOCK)
    return CLOCK


class Slow(Classifier):
    """Takes as long for its n-th batch as it is told."""

    def __init__(self, plain, net=None):
        super().__init__(net)
        self.plain = plain

    def training_step(self, batch, batch_idx):
        step = self.trainer.fit_loop.total_batch_idx + 1
        pytest.lca_clock.now += self.plain(step) if callable(self.plain) else self.plain
        return unrecorded(super().training_step(batch, batch_idx))


class Gan(Slow):
    """Steps two optimizers in every batch."""

    def __init__(self, plain):
        super().__init__(plain)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        first, second = self.net[:2].parameters(), self.net[2:].parameters()
        return [torch.optim.Adam(first, 0.01), torch.optim.SGD(second, 0.1, momentum=0.9)]


class Thaw(pl.Callback):
    """Trains the last layer alone at first, and from a step on all."""

    def __init__(self, step):
        self.step = step

    def on_fit_start(self, trainer, module):
        module.net[:4].requires_grad_(trainer.global_step >= self.step)

    def on_train_batch_start(self, trainer, module, *args):
        if trainer.global_step == self.step:
            module.net[:4].requires_grad_(True)


class Clamp(pl.Callback):
    """Changes weights between steps, so that there is drift."""

    def on_train_batch_end(self, trainer, module, *args):
        with torch.no_grad():
            for p in module.parameters():
                p.clamp_(-0.1, 0.1)


def train(path, *others, model=Slow, plain=10, gradient=5, steps=60, trainer=None, **options):
    """Trains with steps of 10 s, and probe gradients of 5 s, two of which make a measured step."""

    def loss(module, batch):
        pytest.lca_clock.now += gradient(module) if callable(gradient) else gradient
        return unrecorded(F.cross_entropy(module.net(batch[0]), batch[1]))

    logger = pl.loggers.TensorBoardLogger(path.parent, name="logs", version=path.name)
    trainer = {"logger": logger, "log_every_n_steps": 8} | (trainer or {})
    own = {"steps": steps, "loss_fn": loss, "figures": False} | options
    made = functools.partial(model, plain)
    return fit(path, *others, model=made, run_seed=5, trainer=trainer, **own)


# -- the choice -----------------------------------------------------------------------------------


def hiccups(step):
    return {1: 1000, 7: 200, 12: 1}.get(step, 10)


def normed(plain):
    return Slow(plain, nn.Sequential(nn.BatchNorm1d(12), mlp()))


SIMPSON, CLOSED = "simpson", "closed_trapezoid"
CASES = {
    "as many steps as pay for one": (10, CLOSED, {"max_overhead": 0.05}),
    "more than are timed": (25, CLOSED, {"max_overhead": 0.02}),
    "every step, if all are cheap": (1, SIMPSON, {"max_overhead": 1.0}),
    "every step by the cheaper rule": (1, CLOSED, {"max_overhead": 0.5}),
    "not fewer than are timed": (5, CLOSED, {"max_overhead": 0.2}),
    "no less than every_n_steps": (30, CLOSED, {"max_overhead": 0.1, "every_n_steps": 30}),
    "no less, though all could be paid for": (
        *(5, SIMPSON),
        {"max_overhead": 1.0, "every_n_steps": 3, "gradient": 1},
    ),
    "whatever single steps took": (10, CLOSED, {"max_overhead": 0.05, "plain": hiccups}),
    "a rule that was asked for": (15, "gauss2", {"max_overhead": 0.1, "quadrature": "gauss2"}),
    "two gradients, where buffers move": (
        *(10, CLOSED),
        {"max_overhead": 0.1, "model": normed, "probe_mode": "eval"},
    ),
    "two gradients, where weights are clamped": (
        *(10, CLOSED),
        {"max_overhead": 0.1, "callback": Clamp()},
    ),
    "steps of several batches": (
        *(5, CLOSED),
        {"max_overhead": 0.05, "steps": 16, "trainer": {"accumulate_grad_batches": 2}},
    ),
    "several steps of a batch": (10, CLOSED, {"max_overhead": 0.05, "model": Gan}),
    "every batch of several steps": (1, SIMPSON, {"max_overhead": 0.5, "model": Gan}),
    "layers that thaw while it is chosen": (
        *(10, CLOSED),
        {"max_overhead": 0.05, "callback": Thaw(7)},
    ),
    "layers that thaw in the rehearsal": (
        *(10, CLOSED),
        {"max_overhead": 0.05, "callback": Thaw(3)},
    ),
    "several probes, and finer sums": (
        *(10, CLOSED),
        {
            "max_overhead": 0.1,
            "probe": {"a": list(toy_loader(shuffle=False))[:1], "b": "train"},
            "track_parameters": True,
            "neurons": True,
        },
    ),
}


@pytest.mark.parametrize(("expected", "rule", "options"), CASES.values(), ids=CASES)
def test_what_is_chosen_repeats_the_run_exactly(tmp_path, expected, rule, options):
    others = [c for c in [options.get("callback")] if c]
    options = {k: v for k, v in options.items() if k != "callback"}
    chosen, module, _ = train(tmp_path / "chosen", *others, **options)
    assert (chosen.every_n_steps, chosen.quadrature) == (expected, rule)
    told = options | {"max_overhead": None, "every_n_steps": expected, "quadrature": rule}
    repeated, twin, _ = train(tmp_path / "told", *others, **told)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), twin.parameters()))
    records = [Reader.of(lca.log_dir) for lca in (chosen, repeated)]
    for name, history in chosen.histories.items():
        assert_same_history(history, repeated.histories[name])
        assert_same_history(*(record.histories[name or ""] for record in records))
        assert history.closes == (rule == CLOSED)
    if options.get("track_parameters"):
        assert all(torch.equal(t, repeated.totals[n]) for n, t in chosen.totals.items())
    said = [record.meta["settings"] for record in records]
    assert [s["every_n_steps"] for s in said] == [expected, expected]
    assert [s["quadrature"] for s in said] == [rule, rule]
    assert [s["max_overhead"] for s in said] == [options["max_overhead"], None]
    assert scalars(chosen.log_dir) == scalars(repeated.log_dir) != {}


@pytest.mark.parametrize(("tolerance", "most"), [(1e-3, 0.1), (1e-5, 0.2)])
def test_with_a_tolerance_the_chord_itself_is_paid_for(tmp_path, tolerance, most):
    options = {"tolerance": tolerance, "steps": 100}
    chosen, *_ = train(tmp_path / "chosen", max_overhead=most, **options)
    every = chosen.every_n_steps
    repeated, *_ = train(tmp_path / "told", every_n_steps=every, **options)
    assert_same_history(chosen.history, repeated.history)
    gradients = 2 * chosen.history.splits[0] + 1
    assert gradients > 5, "It takes more than the single steps that it is guessed from."
    assert gradients * 5 <= most * every * 10
    assert len(chosen.history) > 1


def test_a_training_that_ends_before_the_choice_is_measured_all_the_same(tmp_path, caplog):
    for steps, every, rule, rows in ((3, 1, SIMPSON, [1, 2, 3]), (8, 8, CLOSED, [8])):
        lca, *_ = train(tmp_path / str(steps), steps=steps, max_overhead=0.05)
        assert (lca.every_n_steps, lca.quadrature) == (every, rule)
        told = {"every_n_steps": every, "quadrature": rule}
        told, *_ = train(tmp_path / f"{steps} told", steps=steps, **told)
        assert lca.history.steps.tolist() == rows
        assert lca.state_dict()["every_n_steps"] is None, "Who goes on from here chooses anew."
        assert_same_history(lca.history, told.history)
        assert "training ended before max_overhead=0.05 could choose more" in caplog.text


def test_the_line_tells_number_times_and_limits_once(tmp_path, caplog):
    lines = {}
    for most, steps in ((0.05, 40), (0.2, 200), (0.02, 60), (0.5, 40), (1.0, 40)):
        caplog.clear()
        lca, *_ = train(
            tmp_path / str(most), max_overhead=most, plain=0.01, gradient=0.005, steps=steps
        )
        (lines[most],) = [m for r in caplog.records if "every_n" in (m := r.getMessage())]
        if most == 0.5:
            single = lca.history.allocated[:5]
    told = lines[0.05].split(" The first 5 steps, measured as one chord, were off by ")
    assert told[0] == (
        'LCA: every_n_steps=10, quadrature="closed_trapezoid" repeats this run exactly; chosen for '
        "max_overhead=0.05: measuring a step takes 0.5 times as long as a plain one (5 and 10 ms), "
        "so that training slows down by 5.0%."
    )
    off, told = told[1].split(" %", 1)
    assert told == (
        " of the layers' credit, against Simpson's rule step by step; longer chords are by more. "
        "That a chord's residual is small does not vouch for its layers."
    )
    options = {"plain": 0.01, "gradient": 0.005, "steps": 5}
    simpson, *_ = train(tmp_path / "simpson", **options)
    chord, *_ = train(tmp_path / "chord", every_n_steps=5, quadrature=CLOSED, **options)
    best = simpson.history.allocated
    wrong = np.abs(chord.history.allocated - best.sum(0)).sum() / np.abs(best.sum(0)).sum()
    assert float(off) == pytest.approx(100 * wrong, rel=0.05)
    wrong = np.abs(single - best).sum() / np.abs(best).sum()
    (off,) = re.findall(r"the first 5 steps were off by (\S+) %", lines[0.5])
    assert float(off) == pytest.approx(100 * wrong, rel=0.05)
    assert "every_n_steps=3 would, too, but until step 5 steps were timed." in lines[0.2]
    assert "A chord of 25 steps cuts across the bends of the path" in lines[0.02]
    assert 'every_n_steps=1, quadrature="simpson"' in lines[1.0]
    assert "off by" not in lines[1.0]


def test_a_budget_overdrawn_by_far_is_warned_of_once_and_nothing_is_timed_any_more(tmp_path):
    class Reads(pl.Callback):
        def on_train_batch_end(self, *args):
            seen.append(pytest.lca_clock.reads)

    def gradient(module):
        return 5 if module.trainer.global_step <= 20 else 50

    seen = []
    with pytest.warns(UserWarning, match="beyond max_overhead=0.2: since every_n_steps=5") as said:
        lca, *_ = train(tmp_path / "x", Reads(), max_overhead=0.2, gradient=gradient, steps=90)
    (line,) = [str(w.message) for w in said if "max_overhead" in str(w.message)]
    assert "LCA: measuring takes 100% of training's own time" in line
    assert "every_n_steps=25 would keep to it" in line
    assert lca.every_n_steps == 5
    assert lca.history.steps.tolist() == list(range(5, 91, 5))
    timed = 2 + np.flatnonzero(np.diff(seen))
    assert timed.tolist() == [2, 3, 4, *range(5, 51, 5)], "to see whether it holds: ten chords"


# -- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved_at", "expected", "into"),
    [(3, 10, "new"), (7, 12, "same"), (10, 10, "new"), (14, 10, "same")],
    ids=["in the rehearsal", "while plain steps are timed", "when chosen", "later"],
)
def test_a_resumed_training_keeps_the_choice_or_makes_it(
    tmp_path, saved_at, expected, into, monkeypatch
):
    save = pl.callbacks.ModelCheckpoint(tmp_path / "saved", "x", every_n_train_steps=saved_at)
    trainer = {"enable_checkpointing": True}
    options = {"track_parameters": True, "probe": list(toy_loader(shuffle=False))[:2]}
    options |= {"max_overhead": 0.05, "gradient": 2.5}
    train(tmp_path / "same", save, steps=saved_at + 2, trainer=trainer, **options)
    state = torch.load(tmp_path / "saved" / "x.ckpt", weights_only=True)["callbacks"]
    (mine,) = [v for name, v in state.items() if "LCACallback" in name]
    assert mine["every_n_steps"] == (10 if saved_at >= 10 else None)
    resumes = []
    begin = Budget.begin
    monkeypatch.setattr(Budget, "begin", lambda *a: resumes.append(a) or begin(*a))
    dear = 50 if saved_at >= 10 else 2.5  # What was chosen is not timed again.
    lca, *_ = train(
        tmp_path / into,
        resume=tmp_path / "saved" / "x.ckpt",
        **(options | {"gradient": dear}),
    )
    assert (lca.every_n_steps, lca.quadrature) == (expected, CLOSED)
    assert bool(resumes) == (saved_at < 10)
    rows = list(range(expected, 61, expected))
    assert lca.history.steps.tolist() == rows + [60] * (rows[-1] < 60)
    assert Reader.of(lca.log_dir).meta["settings"]["every_n_steps"] == expected
    change = lca.history.loss_after[-1] - lca.history.loss_before[0]
    parts = [getattr(lca.history, c).sum() for c in ("allocated", "residual", "drift")]
    assert sum(parts) == pytest.approx(change, abs=1e-7), "The ledger closes from the first step."


@pytest.mark.parametrize("most", [1.0, 0.5, 0.05])
def test_a_training_that_goes_on_keeps_what_was_measured_before_it_chooses_anew(tmp_path, most):
    first, _, trainer = train(tmp_path / "x", steps=4, max_overhead=most)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    lca, *_ = train(tmp_path / "x", resume=tmp_path / "x.ckpt", steps=40, max_overhead=most)
    history = lca.history
    assert history.steps.tolist()[: len(first.history)] == first.history.steps.tolist()
    known = history.allocated[: len(first.history)]
    assert np.array_equal(known, first.history.allocated.astype(np.float32))
    read = Reader.of(lca.log_dir).histories[""]
    assert np.array_equal(read.steps, history.steps)
    assert np.array_equal(read.raw_residual, history.raw_residual)
    assert np.array_equal(read.allocated, history.allocated.astype(np.float32))
    parts = [getattr(history, c).sum() for c in ("allocated", "residual", "drift")]
    change = history.loss_after[-1] - history.loss_before[0]
    assert sum(parts) == pytest.approx(change, abs=1e-7)
    assert lca.quadrature == (SIMPSON if most == 1.0 else CLOSED)


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, r"max_overhead must be a positive number, e.g. max_overhead=0.1 for 10 %"),
        (-0.1, ValueError, "got -0.1"),
        (float("nan"), ValueError, "got nan"),
        (float("inf"), ValueError, "got inf"),
        ("10%", TypeError, "max_overhead must be a number, e.g. max_overhead=0.1 for 10 %; got '1"),
        (True, TypeError, "got True"),
    ],
)
def test_a_silly_budget_is_refused_when_typed(value, error, message):
    with pytest.raises(error, match=message):
        LCACallback(max_overhead=value)
