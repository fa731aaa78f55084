"""Credit on single batches of the probe, against gradients on each of them by hand."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.assertions import assert_same
from support.harmless import Awkward, Case, twins
from support.models import Classifier, Resumable, mlp, pl, toy_data, toy_loader
from support.training import Trail, fit

from lightning_lca import History
from lightning_lca.probe.probe import Probe
from lightning_lca.runtime.lightnings import MisconfigurationException
from lightning_lca.training.meter import Meter


def batches_of(*sizes, dtype=torch.float64):
    data = toy_data(sum(sizes), dtype=dtype).tensors
    ends = np.cumsum((0, *sizes))
    return [[t[a:b] for t in data] for a, b in pairwise(ends)]


def by_hand(points, batch, nodes):
    """Credit of every step and layer on one batch, by a rule {s: weight}: [steps, layers]."""
    net = mlp().double()
    rows = []
    for start, stop in pairwise(points):
        motion = {n: stop[n] - w for n, w in start.items()}
        credit = np.zeros(3)
        for s, weight in nodes.items():
            for n, p in net.named_parameters():
                p.data = start[f"net.{n}"] + s * motion[f"net.{n}"]
            loss = F.cross_entropy(net(batch[0]), batch[1])
            gradients = torch.autograd.grad(loss, list(net.parameters()))
            for i, (g, d) in enumerate(zip(gradients, motion.values(), strict=True)):
                credit[i // 2] += weight * float((g * d).sum())
        rows.append(credit)
    return np.array(rows)


SIMPSON = {0.0: 1 / 6, 0.5: 4 / 6, 1.0: 1 / 6}
WAYS = {
    "simpson": ({}, {0.5: 1.0}),
    "by the user's code": ({"loss_fn": "code"}, {0.5: 1.0}),
    "gauss2": (
        {"quadrature": "gauss2"},
        {0.5 - 12**-0.5: 0.5, 0.5 + 12**-0.5: 0.5},
    ),
    "tolerance": ({"tolerance": 1e-8}, {0.5: 1.0}),
    "with all else": ({"breakdown": True, "oscillation": True, "group_by": "layer"}, {0.5: 1.0}),
}


def code(module, batch):
    """The loss by way of a shape that follows from the weights: it cannot be recorded."""
    weight = module.net[0].weight
    return F.cross_entropy(module.net(batch[0]), batch[1]) + 0 * weight[weight != 0].sum()


def measured(path, batches, **options):
    """Trains in double precision with all batches as the probe; gives the callback and the path."""
    trail = Trail()
    run = fit(
        path,
        trail,
        model=lambda: Classifier(mlp().double()),
        data=toy_loader(dtype=torch.float64),
        probe=batches,
        probe_batches=len(batches),
        figures=False,
        **options,
    )
    return run.lca, trail.points


@pytest.mark.parametrize("way", WAYS)
def test_every_batch_has_the_credit_of_its_own_gradients(tmp_path, way):
    options, nodes = WAYS[way]
    if "loss_fn" in options:
        options = options | {"loss_fn": code}
    sizes = (40, 24, 8)
    batches = batches_of(*sizes)
    lca, points = measured(tmp_path, batches, **options)
    history = lca.history
    assert (history.settings["evaluated"] == "recorded") == ("loss_fn" not in options)
    by_batch = history.by_batch
    assert by_batch.names == ("0", "1", "2")
    assert by_batch.allocated.shape == (12, 3, 3)
    shares = np.array(sizes) / sum(sizes)
    inner = np.stack([by_hand(points, batch, nodes) for batch in batches], 2)
    expected = inner + (history.allocated - inner @ shares)[:, :, None]
    size = np.abs(expected).max()
    np.testing.assert_allclose(by_batch.allocated, expected, rtol=1e-10, atol=1e-12 * size)
    np.testing.assert_allclose(by_batch.allocated @ shares, history.allocated, rtol=1e-10)
    # What the middle leaves out is next to nothing beside how far batches lie apart.
    whole = np.stack([by_hand(points, batch, SIMPSON) for batch in batches], 2)
    assert np.abs(by_batch.allocated - whole).max() < 0.02 * by_batch.allocated.std(2).mean()
    np.testing.assert_allclose(
        history.sampling_error, by_batch.allocated.std(2, ddof=1) / 3**0.5, rtol=1e-12
    )
    loaded = History.load(lca.log_dir)
    np.testing.assert_allclose(loaded.by_batch.allocated, by_batch.allocated, rtol=1e-6, atol=1e-9)
    assert "batch" not in history.breakdowns


def test_many_batches_are_taken_together(tmp_path):
    batches = batches_of(*[4] * 20)
    lca, points = measured(tmp_path, batches, steps=3)
    history = lca.history
    by_batch = history.by_batch.allocated
    assert by_batch.shape == (3, 3, 16)
    inner = np.stack([by_hand(points, batch, {0.5: 1.0}) for batch in batches], 2)
    rest = history.allocated - inner.mean(2)
    groups = [[j for j in range(20) if j * 16 // 20 == k] for k in range(16)]
    expected = np.stack([inner[:, :, g].mean(2) + rest for g in groups], 2)
    np.testing.assert_allclose(by_batch, expected, rtol=1e-10, atol=1e-14)


def test_it_takes_no_further_gradient_and_leaves_training_alone(tmp_path, capsys, monkeypatch):
    case = Case(model=Awkward, lca={"probe_batches": 3})
    plain, measured, lca = twins(case, tmp_path, capsys)
    assert_same(plain, measured)
    assert len(lca.history.by_batch.names) == 3
    calls = []
    evaluate = Probe.__call__
    monkeypatch.setattr(Probe, "__call__", lambda *a, **k: calls.append(1) or evaluate(*a, **k))
    mine = fit(tmp_path / "mine", probe_batches=3, figures=False).lca
    with_batches = len(calls)
    monkeypatch.setattr(Meter, "_field", lambda self, at: self.probe(at))
    bare = fit(tmp_path / "bare", probe_batches=3, figures=False).lca
    assert with_batches == len(calls) - with_batches
    np.testing.assert_array_equal(mine.history.allocated, bare.history.allocated)


def test_one_batch_tells_nothing_of_others(tmp_path):
    history = fit(tmp_path, figures=False).lca.history
    assert history.by_batch is None
    assert history.sampling_error is None


def test_a_resumed_training_goes_on_with_its_batches(tmp_path):
    options = {"figures": False, "data": Resumable, "probe_batches": 3}
    whole = fit(tmp_path / "whole", steps=12, **options).lca.history
    saver = pl.callbacks.ModelCheckpoint(tmp_path / "saved", every_n_train_steps=5, save_top_k=-1)
    saves = {"enable_checkpointing": True}
    fit(tmp_path / "first", saver, steps=7, trainer=saves, **options)
    (saved,) = (tmp_path / "saved").glob("*step=5*.ckpt")
    again = fit(tmp_path / "again", saver, steps=12, resume=saved, trainer=saves, **options).lca
    for history in (again.history, History.load(again.log_dir)):
        np.testing.assert_allclose(
            history.by_batch.allocated, whole.by_batch.allocated, rtol=1e-5, atol=1e-9
        )


def test_one_line_says_how_many_examples_signs_take(tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit(tmp_path / "four", probe_batches=4, steps=30, figures=False)
        fit(tmp_path / "one", steps=30, figures=False)
    told = [r.message for r in caplog.records if "tell the sign" in r.message]
    assert len(told) == 1
    assert told[0].startswith("LCA: the 64 examples of the probe tell the sign of a layer's credit")


def test_probes_may_have_other_numbers_of_batches(tmp_path):
    batches = batches_of(16, 16, 16, 48, dtype=torch.float32)
    lca = fit(
        tmp_path,
        probe={"train": batches[:3], "val": batches[3:]},
        breakdown=True,
        figures=False,
    ).lca
    for name, count in (("train", 3), ("val", None)):
        for history in (lca.histories[name], History.load(lca.log_dir, name)):
            assert len(history) == 12
            assert history.lost == 0
            assert set(history.breakdowns) == {"part", "order"}
            by_batch = history.by_batch
            assert (by_batch and len(by_batch.names)) == count


def test_probes_with_other_terms_are_refused(tmp_path):
    def uneven(module, batch):
        loss = F.cross_entropy(module.net(batch[0]), batch[1])
        return {"a": loss} if len(batch[1]) > 20 else {"b": loss, "c": 0.0}

    one, other = batches_of(40, 10, dtype=torch.float32)
    with pytest.raises(MisconfigurationException, match="other terms on one probe"):
        fit(tmp_path, loss_fn=uneven, breakdown="term", probe={"x": [one], "y": [other]})
