"""Every precision of the Trainer: the probe computes as training does, and credits stay exact."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.plugins import MixedPrecision
from support.models import Classifier, mlp, toy_loader
from support.training import Trail, fit, make_trainer
from torch import nn

from lightning_lca import LCACallback
from lightning_lca.probe.precision import LossScale

STEPS = 8


class Adamant(Classifier):
    """Moves most weights at every step, even in half precision."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02, eps=1e-3)


def probe(dtype):
    return [next(iter(toy_loader(64, shuffle=False, dtype=dtype)))]


def of_the_net(module):
    return dict(module.net.named_parameters())


def train(path, dtype, model=Adamant, measured=True, **trainer):
    trail, data = Trail(of_the_net), toy_loader(dtype=dtype)
    run = {"model": model, "data": data, "steps": STEPS, "run_seed": 5, "trainer": trainer}
    if measured:
        run |= {"probe": probe(dtype), "figures": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lca, module, _ = fit(path, trail, measured=measured, **run)
    return lca, trail.points, module


def low(dtype):
    """Evaluates as autocast to a type does: weights in float32, matrices multiplied in that."""

    def evaluate(weights, x, y):
        weights = {n: w.detach().clone().requires_grad_() for n, w in weights.items()}
        with torch.autocast("cpu", dtype, cache_enabled=False):
            loss = F.cross_entropy(torch.func.functional_call(mlp(), weights, (x,)), y)
        return loss, weights

    return evaluate


def plain(weights, x, y):
    """Evaluates in the type of the weights."""
    weights = {n: w.detach().clone().requires_grad_() for n, w in weights.items()}
    net = mlp().to(x.dtype)
    return F.cross_entropy(torch.func.functional_call(net, weights, (x,)), y), weights


def simpson(points, batch, evaluate, scale=1.0):
    """Credits of every step, in float64, from gradients that are taken in the type trained in."""
    for start, stop in pairwise(points):
        middle = {n: torch.lerp(start[n], stop[n], 0.5) for n in start}
        gradients, losses = [], []
        for weights in (start, middle, stop):
            loss, leaves = evaluate(weights, *batch)
            gradient = torch.autograd.grad(loss.float() * scale, list(leaves.values()))
            gradients.append([g.double() / scale for g in gradient])
            losses.append(loss.item())
        moved = [stop[n].double() - start[n].double() for n in start]
        parts = zip(moved, *gradients, strict=True)
        yield losses, [m * (a + 4 * b + c) / 6 for m, a, b, c in parts]


@pytest.mark.parametrize(
    ("precision", "dtype", "evaluate", "scale"),
    [
        ("64-true", torch.float64, plain, 1),
        ("bf16-mixed", torch.float32, low(torch.bfloat16), 1),
        ("bf16-true", torch.bfloat16, plain, 1),
        ("16-true", torch.float16, plain, 2**14),
    ],
)
def test_credits_are_those_of_a_twin_that_adds_up_in_float64(
    tmp_path, precision, dtype, evaluate, scale
):
    lca, points, _ = train(tmp_path, dtype, precision=precision)
    exact = 1e-13 if dtype == torch.float64 else 1e-6
    for t, (losses, credit) in enumerate(simpson(points, probe(dtype)[0], evaluate, scale)):
        layers = [torch.cat([c.reshape(-1) for c in credit[i : i + 2]]) for i in (0, 2, 4)]
        largest = max(layer.abs().sum().item() for layer in layers)
        expected = [layer.sum().item() for layer in layers]
        assert np.allclose(lca.history.allocated[t], expected, rtol=0, atol=exact * largest)
        assert (lca.history.loss_before[t], lca.history.loss_after[t]) == pytest.approx(
            (losses[0], losses[2]), rel=exact
        )
        helping = [int((layer < 0).sum()) for layer in layers]
        assert (lca.history.helping[t] * lca.history.sizes).round().tolist() == helping


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true", "16-true", "16-mixed"])
def test_training_is_bitwise_the_same_in_every_precision(tmp_path, precision):
    dtype = {"64-true": torch.float64}.get(precision, torch.float32)

    def trainer():
        if precision == "16-mixed":
            return {"plugins": MixedPrecision(precision, "cpu")}
        return {"precision": precision}

    _, plain_path, plain_model = train(tmp_path / "plain", dtype, measured=False, **trainer())
    lca, path, model = train(tmp_path / "measured", dtype, **trainer())
    for a, b in zip(plain_path, path, strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)
    for a, b in zip(plain_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert len(lca.history) == STEPS
    assert np.isfinite(lca.history.residual).all()


class Faint(Classifier):
    """Its gradients are far below what float16 can hold: 6e-8."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * 1e-6

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01, eps=1e-20)


def test_gradients_that_float16_cannot_hold_are_scaled_into_its_range(tmp_path):
    lca, _, _ = train(tmp_path, torch.float32, Faint, plugins=MixedPrecision("16-mixed", "cpu"))
    exact, _, _ = train(tmp_path / "exact", torch.float32, Faint)
    history = lca.history
    assert (
        np.abs(history.residual).max()
        < 0.05 * np.abs(history.loss_after - history.loss_before).max()
    )
    assert history.allocated.sum() == pytest.approx(exact.history.allocated.sum(), rel=0.05)


def test_a_scale_that_is_too_large_is_lowered_and_grows_again():
    scale = LossScale()
    fine, over = [torch.ones(3)], [torch.ones(3), torch.tensor([1.0, float("inf")])]
    assert not scale.fits(over)
    assert scale.value == 2**14
    assert torch.equal(scale.unscaled(fine)[0], fine[0] / 2**14)
    assert all(scale.fits(fine) for _ in range(2000))
    assert scale.value == 2**15
    while not scale.fits(over):
        assert scale.value >= 1
    assert scale.value == 1, "an overflow without any scale is the loss's own"


def test_steps_that_the_scaler_skips_are_measured_as_no_motion_and_flagged(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    mixed = MixedPrecision("16-mixed", "cpu", scaler)
    lca, points, _ = train(tmp_path, torch.float32, plugins=mixed)
    still = [all(torch.equal(a[n], b[n]) for n in a) for a, b in pairwise(points)]
    assert any(still)
    assert not all(still)
    history = lca.history
    assert history.unmoved.tolist() == still
    assert (history.allocated[still] == 0).all()
    assert (history.residual[still] == 0).all()
    assert history.converged.all()
    assert f"{sum(still)} of {STEPS} steps moved no weight" in lca.summary()


class Half(Classifier):
    """Trains so slowly that most updates of bfloat16 weights round away."""

    def __init__(self):
        super().__init__(mlp(), lambda p: torch.optim.SGD(p, lr=3e-3))


def test_the_share_of_updates_that_round_away_is_told_once(tmp_path):
    pl.seed_everything(5, verbose=False)
    model, path = Half(), Trail(of_the_net)
    trainer = make_trainer(
        tmp_path, LCACallback(figures=False), path, max_steps=4, precision="bf16-true"
    )
    with pytest.warns(UserWarning, match="weights are bfloat16") as caught:
        trainer.fit(model, toy_loader(dtype=torch.bfloat16))
    (told,) = [str(w.message) for w in caught if "bfloat16" in str(w.message)]
    start, stop = path.points[:2]
    a, b = (torch.cat([w.reshape(-1) for w in p.values()]).double() for p in (start, stop))
    moved = int((a != b).sum())
    assert f"{1 - moved / len(a):.1%} of them stayed" in told
    # Half way between two bfloat16 neighbours there is no third.
    bits = torch.cat([w.reshape(-1) for w in start.values()]).view(torch.int16).int()
    after = torch.cat([w.reshape(-1) for w in stop.values()]).view(torch.int16).int()
    stuck = int(((bits - after).abs() == 1).sum())
    assert f"for {stuck / moved:.1%} of the others" in told


def test_weights_in_float32_are_not_warned_of(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="LCA")
        fit(tmp_path, model=lambda: Classifier(nn.Linear(12, 4)), steps=2, figures=False)
