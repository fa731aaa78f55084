"""Credit split over the terms of a loss, against gradients of each term taken by hand."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.assertions import assert_same
from support.harmless import Awkward, Case, twins
from support.models import Classifier, Resumable, mlp, pl, toy_data, toy_loader
from support.training import fit
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lca import History, LCACallback
from lightning_lca.runtime.lightnings import MisconfigurationException
from lightning_lca.training.meter import Meter

NAMES = ("cross_entropy", "sparsity", "smooth")


def terms(module, batch):
    """Cross-entropy, ‖w‖₁/‖w‖₂ of every kernel, and a term that reaches the last layer alone."""
    x, y = batch
    kernels = [p for p in module.net.parameters() if p.dim() == 2]
    return {
        "cross_entropy": F.cross_entropy(module.net(x), y),
        "sparsity": 0.01 * sum(w.abs().sum() / w.norm() for w in kernels),
        "smooth": 0.1 * kernels[-1].pow(4).sum(),
    }


def out_of_sight(module, batch):
    """The same, by way of a shape that follows from the weights, which no recording can hold."""
    found = terms(module, batch)
    last = [p for p in module.net.parameters() if p.dim() == 2][-1]
    return found | {"smooth": 0.1 * last[last != 0].pow(4).sum()}


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return checkpoint(self.net, x.requires_grad_(), use_reentrant=True)


class Notes(pl.Callback):
    """Keeps the weights before training and after every step."""

    def on_train_start(self, trainer, module):
        self.path = []
        self.note(module)

    def on_train_batch_end(self, trainer, module, *args):
        self.note(module)

    def note(self, module):
        self.path.append([p.detach().clone() for p in module.net.parameters()])


def by_hand(path, net, batches):
    """Credit of every step, layer and term by Simpson's rule: [steps, layers, terms]."""
    holder = nn.Module()
    holder.net = net
    sizes = np.array([len(batch[1]) for batch in batches])
    rows = []
    for start, stop in pairwise(path):
        motion = [b - a for a, b in zip(start, stop, strict=True)]
        credit = np.zeros((len(motion) // 2, len(NAMES)))
        for s, weight in ((0.0, 1 / 6), (0.5, 4 / 6), (1.0, 1 / 6)):
            for p, a, d in zip(net.parameters(), start, motion, strict=True):
                p.data = a + s * d
            for batch, share in zip(batches, sizes / sizes.sum(), strict=True):
                for k, term in enumerate(terms(holder, batch).values()):
                    found = torch.autograd.grad(term, list(net.parameters()), allow_unused=True)
                    for i, (g, d) in enumerate(zip(found, motion, strict=True)):
                        product = 0.0 if g is None else float((g * d).sum())
                        credit[i // 2, k] += share * weight * product
        rows.append(credit)
    return np.array(rows)


def batches_of(*sizes, dtype=torch.float64):
    data = toy_data(96, dtype=dtype).tensors
    ends = np.cumsum((0, *sizes))
    return [[t[a:b] for t in data] for a, b in pairwise(ends)]


CASES = {
    "recorded": {},
    "by the user's code": {"loss_fn": out_of_sight},
    "two batches of unlike size": {"probe": batches_of(40, 24), "probe_batches": 2},
    "two halves": {},
    "chords": {"every_n_steps": 3, "breakdown": "term"},
    "terms alone": {"breakdown": ["term"]},
    "with all else": {"oscillation": True, "neurons": True, "track_parameters": True},
    "checkpointed": {},
    "checkpointed, by the user's code": {"loss_fn": out_of_sight},
}


@pytest.mark.parametrize("name", CASES)
def test_terms_have_the_credit_of_their_own_gradients(tmp_path, name, monkeypatch):
    options = {"loss_fn": terms, "breakdown": True, "probe": batches_of(48)} | CASES[name]
    if name == "two halves":
        monkeypatch.setattr(Meter, "_misses_all", lambda *_: True)
    net = Checkpointed() if name.startswith("checkpointed") else mlp()
    notes = Notes()
    run = fit(
        tmp_path,
        notes,
        model=lambda: Classifier(net.double(), lambda p: torch.optim.Adam(p, 0.03)),
        data=toy_loader(dtype=torch.float64),
        steps=12,
        figures=False,
        **options,
    )
    history = run.lca.history
    path = notes.path[:: options.get("every_n_steps", 1)]
    rows = by_hand(path, mlp().double(), options["probe"])
    term = history.breakdowns["term"]
    assert term.names == NAMES
    size = np.abs(rows).max()
    tight = {"rtol": 1e-10, "atol": 1e-12 * size}
    if name == "two halves":
        middles = [[(a + b) / 2 for a, b in zip(*ends, strict=True)] for ends in pairwise(path)]
        twice = [point for both in zip(path, middles, strict=False) for point in both]
        halves = by_hand([*twice, path[-1]], mlp().double(), options["probe"])
        rows = np.where((history.splits == 2)[:, None, None], halves[::2] + halves[1::2], rows)
    assert (history.splits.max() == 2) == (name == "two halves")
    np.testing.assert_allclose(term.allocated, rows, **tight)
    np.testing.assert_allclose(term.allocated.sum(2), history.allocated, **tight)
    assert (np.abs(rows).sum((0, 1)) > 1e-3 * size).all(), "every term has credit"
    loaded = History.load(run.lca.log_dir).breakdowns["term"]
    assert loaded.names == NAMES
    np.testing.assert_allclose(loaded.allocated, term.allocated, rtol=1e-6, atol=1e-30)
    assert (history.settings["evaluated"] == "recorded") == ("user's code" not in name)


def test_a_tolerance_refines_terms_alike(tmp_path):
    """Terms that are polynomials of the fourth degree are exact on two panels and on more."""
    notes = Notes()
    run = fit(
        tmp_path,
        notes,
        model=lambda: Classifier(mlp().double(), lambda p: torch.optim.SGD(p, 0.5)),
        data=toy_loader(dtype=torch.float64),
        loss_fn=lambda module, batch: {
            "bowl": sum(p.pow(2).sum() for p in module.net.parameters()),
            "steep": F.cross_entropy(module.net(batch[0]), batch[1]),
        },
        breakdown="term",
        tolerance=1e-9,
        figures=False,
        steps=6,
    )
    history = run.lca.history
    assert history.splits.max() >= 4
    bowls = np.array([sum(float(w.pow(2).sum()) for w in point) for point in notes.path])
    term = history.breakdowns["term"].allocated
    np.testing.assert_allclose(term[:, :, 0].sum(1), np.diff(bowls), rtol=1e-10)
    np.testing.assert_allclose(term.sum(2), history.allocated, rtol=1e-10, atol=1e-14)


def test_training_is_the_same_and_takes_no_further_forward(tmp_path, capsys):
    calls = []

    def counted(module, batch):
        calls.append(1)
        return terms(module, batch)

    class Calls(Awkward):
        """Awkward, with kernels that the terms find."""

    case = Case(model=Calls, lca={"breakdown": True, "loss_fn": awkward_terms})
    plain, measured, lca = twins(case, tmp_path, capsys)
    assert_same(plain, measured)
    assert lca.history.breakdowns["term"].names == ("loss", "decay")
    counts = []
    for breakdown in ("order", ["order", "term"]):
        calls.clear()
        fit(tmp_path / str(breakdown), loss_fn=counted, breakdown=breakdown, figures=False)
        counts.append(len(calls))
    assert counts[0] == counts[1]


def awkward_terms(module, batch):
    loss = module.training_step(batch, 0)
    loss = loss["loss"] if isinstance(loss, dict) else loss
    return {"loss": loss, "decay": sum(p.pow(2).sum() for p in module.parameters())}


def test_a_resumed_training_goes_on_with_its_terms(tmp_path):
    options = {"breakdown": True, "figures": False, "data": Resumable, "loss_fn": terms}
    whole = fit(tmp_path / "whole", steps=12, **options).lca.history
    saver = pl.callbacks.ModelCheckpoint(tmp_path / "saved", every_n_train_steps=5, save_top_k=-1)
    fit(tmp_path / "first", saver, steps=7, trainer={"enable_checkpointing": True}, **options)
    (saved,) = (tmp_path / "saved").glob("*step=5*.ckpt")
    saves = {"enable_checkpointing": True}
    again = fit(tmp_path / "again", saver, steps=12, resume=saved, trainer=saves, **options).lca
    for history in (again.history, History.load(again.log_dir)):
        assert list(history.breakdowns) == list(whole.breakdowns)
        for name, breakdown in whole.breakdowns.items():
            assert history.breakdowns[name].names == breakdown.names
            np.testing.assert_allclose(
                history.breakdowns[name].allocated, breakdown.allocated, rtol=1e-5, atol=1e-9
            )


def test_a_term_that_comes_later_is_counted_with_the_last_and_told_of(tmp_path, recwarn):
    def later(module, batch):
        found = terms(module, batch)
        return found | ({"late": 0.1 * found["smooth"]} if module.current_epoch else {})

    def always(module, batch):
        found = terms(module, batch)
        return found | {"smooth": found["smooth"] * (1.1 if module.current_epoch else 1.0)}

    runs = [
        fit(tmp_path / fn.__name__, loss_fn=fn, breakdown="term", figures=False, probe="train")
        for fn in (later, always)
    ]
    mine, theirs = (run.lca.history.breakdowns["term"] for run in runs)
    assert mine.names == NAMES
    np.testing.assert_allclose(mine.allocated, theirs.allocated, rtol=1e-4, atol=1e-8)
    told = [w for w in map(str, (w.message for w in recwarn)) if "did not return at first" in w]
    assert len(told) == 1
    assert "['late']" in told[0]
    assert "'smooth'" in told[0]


def test_a_loss_of_one_number_has_no_terms(tmp_path):
    one = fit(tmp_path, loss_fn=lambda m, b: sum(terms(m, b).values()), breakdown=True)
    assert set(one.lca.history.breakdowns) == {"part", "order"}
    with pytest.raises(MisconfigurationException, match="loss_fn returned a single number"):
        fit(tmp_path, loss_fn=lambda m, b: sum(terms(m, b).values()), breakdown="term")
    with pytest.raises(ValueError, match=r"Pass loss_fn=\(module, batch\) -> \{term: scalar\}"):
        LCACallback(breakdown=["term"])


def test_batches_with_other_terms_are_refused(tmp_path):
    def uneven(module, batch):
        found = terms(module, batch)
        return found if len(batch[1]) > 20 else {"cross_entropy": found["cross_entropy"], "l": 0.0}

    with pytest.raises(MisconfigurationException, match=r"on one batch.*\['cross_entropy', 'l'\]"):
        fit(
            tmp_path,
            loss_fn=uneven,
            breakdown="term",
            probe=batches_of(40, 10, dtype=torch.float32),
            probe_batches=2,
        )
