"""Losses, gradients and weights that are NaN or infinite are recorded, and training goes on."""

import functools

import numpy as np
import pytest
import torch
from support.models import Classifier, pl
from support.training import fit
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lca import History, LCACallback, figures
from lightning_lca.probe.precision import LossScale
from lightning_lca.tensorboard import views
from lightning_lca.tensorboard.answers import as_json
from lightning_lca.tensorboard.snapshot import Range, Table

STEPS = 14
BAD = range(5, 9)  # Optimizer steps after which the weight is where the loss breaks.
X = torch.randn(32, 3, generator=torch.Generator().manual_seed(1))
Y = X @ torch.tensor([1.0, -2.0, 0.5])

# What breaks: the weight where all is well, where it is not, and the term of the loss.
HAZARDS = {
    "infinite loss": (
        1.0,
        70.0,
        lambda w: (1000 * w).half().float() / 1000,
    ),  # As float16 overflows.
    "nan loss": (1.0, -1.0, torch.sqrt),
    "nan gradient": (1.0, -1.0, lambda w: torch.where(w > 0, torch.sqrt(w), 0 * w)),
    "nan weight": (1.0, float("nan"), lambda w: w),
    "infinite weight": (1.0, float("inf"), lambda w: w * 0.5),
}


class Hazardous(pl.LightningModule):
    """A regression on three weights, and one weight that is moved by plan."""

    def __init__(self, hazard):
        super().__init__()
        self.good, self.bad, self.term = HAZARDS[hazard]
        self.fit = nn.Linear(3, 1, bias=False)
        self.hazard = nn.Module()
        self.hazard.w = nn.Parameter(torch.tensor(self.good))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.fit(x).squeeze(1) - y).square().mean() + self.term(self.hazard.w)

    def configure_optimizers(self):
        return Planned(self)


class Planned(torch.optim.SGD):
    """Steps on finite gradients only, and puts the hazardous weight where the plan wants it."""

    def __init__(self, module):
        super().__init__(module.fit.parameters(), lr=0.05)
        self.module, self.done = module, 0

    def step(self, closure=None):
        loss = closure()
        for p in self.module.fit.parameters():
            p.grad.nan_to_num_(0, 0, 0)
        super().step()
        self.done += 1
        module = self.module
        module.hazard.w.data.fill_(module.bad if self.done in BAD else module.good)
        return loss


def train(path, hazard, *callbacks, **options):
    data = DataLoader(TensorDataset(X, Y), batch_size=8)
    model = functools.partial(Hazardous, hazard)
    run = {"model": model, "data": data, "steps": STEPS, "trainer": options}
    return fit(path, *callbacks, measured=False, **run).module


def expected_loss(fit, w, hazard):
    """The probe loss in float64, by other means."""
    squares = ((X.numpy().astype(float) @ fit - Y.numpy()) ** 2).mean()
    with np.errstate(all="ignore"):
        term = {
            "infinite loss": lambda: np.inf if 1000 * w > 65504 else w,
            "nan loss": lambda: np.sqrt(w),
            "nan gradient": lambda: np.sqrt(w) if w > 0 else 0.0,
            "nan weight": lambda: w,
            "infinite weight": lambda: w / 2,
        }[hazard]()
    return squares + term


class Path(pl.Callback):
    def __init__(self):
        self.at = []

    def on_train_batch_end(self, trainer, module, *args):
        self.at.append((module.fit.weight[0].double().detach().numpy(), module.hazard.w.item()))


@pytest.mark.parametrize("tolerance", [None, 1e-2])
@pytest.mark.parametrize("hazard", HAZARDS)
def test_steps_that_are_not_finite_are_recorded_and_the_later_ones_are_right(
    tmp_path, monkeypatch, hazard, tolerance
):
    monkeypatch.setattr(
        "lightning_lca.training.reuse.AUDIT_EVERY", 1
    )  # Every kept gradient is checked.
    path = Path()
    lca = LCACallback(probe=[[X, Y]], tolerance=tolerance, track_parameters=True, figures=False)
    module = train(tmp_path, hazard, lca, path)
    plain = train(tmp_path, hazard)
    for a, b in zip(module.parameters(), plain.parameters()):
        assert a.detach().numpy().tobytes() == b.detach().numpy().tobytes()

    history = lca.history
    assert history.steps.tolist() == list(range(1, STEPS + 1))
    losses = [expected_loss(*at, hazard) for at in path.at]
    assert np.allclose(history.loss_after, losses, rtol=1e-5, equal_nan=True)
    # A step is broken if it begins or ends at a place that is.
    broken = np.array([s in BAD or s - 1 in BAD for s in history.steps])
    if hazard == "nan gradient":
        assert np.isfinite(history.loss_after).all()
    assert (~np.isfinite(history.allocated).all(1) | ~np.isfinite(history.residual) == broken).all()
    unset = broken | (np.abs(history.residual) > tolerance) if tolerance else broken
    assert (history.converged == ~unset).all()
    assert (history.splits[broken] == 1).all(), "no gradients are spent on what cannot converge"
    # Three weights in a square: Simpson's rule is exact.
    assert np.abs(history.residual[~broken]).max() < 1e-5
    assert lca._training.meters[None].audits >= STEPS - broken.sum() - 2
    for total in lca.totals.values():
        assert torch.isfinite(total).all()
    assert lca.totals["fit.weight"].sum() == pytest.approx(
        history.allocated[~broken, history.groups.index("fit")].sum(), rel=1e-5
    )
    # No window of a parameter, or of single weights, counts such a step either.
    for windows in (history.parameters, history.weights):
        assert windows.measured.sum() == (~broken).sum()
        for group, parameter in (("fit", "fit.weight"), ("hazard", "hazard.w")):
            own = [name.partition("[")[0] == parameter for name in windows.names]
            expected = history.allocated[~broken, history.groups.index(group)].sum()
            found = windows.allocated[:, own].sum()
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-9), parameter


def every_view(history):
    """All that the TensorBoard page may ask for, as JSON, which knows no NaN."""
    table = Table.of(history)
    for asked in (Range(), Range(bins=3), Range(1, 4), Range(6, 8), Range(10, None)):
        yield views.bins(table, asked)
        yield views.helping(table, asked, None)
        yield views.helping(table, asked, table.layers[0])
        yield views.channels(table, asked, table.layers[0])
        yield views.table(table, asked)
        yield views.compare(table, table, asked)
        yield views.synchrony(table, asked, 5)


@pytest.mark.slow
@pytest.mark.parametrize("hazard", ["infinite loss", "nan loss", "diverges"])
def test_every_view_of_a_run_with_numbers_that_are_not_finite_can_be_made(
    tmp_path, hazard, recwarn
):
    lca = LCACallback(probe=[[X, Y]], neurons=True, track_parameters=True)
    logger = pl.loggers.TensorBoardLogger(tmp_path)
    if hazard == "diverges":
        net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
        net = Classifier(net, lambda p: torch.optim.SGD(p, lr=1e30))
        lca = LCACallback(neurons=True, track_parameters=True)
        fit(tmp_path, lca, model=net, trainer={"logger": logger})
        assert np.isnan(lca.history.loss_after[-1])
    else:
        train(tmp_path, hazard, lca, logger=logger)
    history = History.load(lca.log_dir)
    for column in ("allocated", "loss_after", "residual", "drift"):
        mine, read = getattr(lca.history, column), getattr(history, column)
        assert np.allclose(mine, read, rtol=1e-6, equal_nan=True), column
    assert (history.converged == lca.history.converged).all()
    assert not history.converged.all()
    for answer in every_view(history):
        as_json(answer)
    for name, make in figures.available(history).items():
        make(history).savefig(tmp_path / f"{name}.png")
    summary = lca.summary()
    bad = int((~np.isfinite(history.residual)).sum())
    assert f"In {bad} of {len(history)} steps loss or credit was not finite" in summary
    if hazard != "diverges":
        assert "nan" not in summary, summary
    assert not [str(w.message) for w in recwarn if "LCA" in str(w.message)]


def test_the_curves_since_the_start_go_on_after_a_step_that_is_not_finite(tmp_path):
    lca = LCACallback(probe=[[X, Y]], log_every_n_steps=1, figures=False)
    logger = pl.loggers.CSVLogger(tmp_path)
    train(tmp_path, "nan loss", lca, logger=logger)
    rows = [m for m in np.genfromtxt(f"{logger.log_dir}/metrics.csv", delimiter=",", names=True)]
    fine = np.isfinite(lca.history.residual)
    total = np.cumsum(np.where(fine, lca.history.allocated.sum(1), 0))
    assert [r["lcatotal_cum"] for r in rows] == pytest.approx(total, rel=1e-6)
    each = np.where(fine, lca.history.allocated.sum(1), 0)
    assert [r["lcatotal"] for r in rows] == pytest.approx(each, rel=1e-6)
    assert [r["lcanot_finite"] for r in rows] == np.cumsum(~fine).tolist()
    assert lca.history.loss_after[-1] - lca.history.loss_before[-5] == pytest.approx(
        total[-1] - total[-6], abs=1e-5
    )


def test_a_search_for_the_origin_of_nan_is_not_set_off_by_the_probe(tmp_path):
    calls = []

    def loss_fn(module, batch):
        calls.append(None)
        return module.hazard.w.sum() + (torch.sqrt(-module.hazard.w) if len(calls) > 3 else 0)

    lca = LCACallback(probe=[[X, Y]], loss_fn=loss_fn)
    train(tmp_path, "infinite weight", lca, detect_anomaly=True)
    assert np.isnan(lca.history.loss_after[-1])


def test_a_loss_scale_is_not_lowered_for_what_no_scale_makes_finite():
    scale = LossScale()
    while not scale.fits([torch.tensor([1e-3, float("nan")]) * scale.value]):
        pass
    scale.unscaled([torch.tensor([1e-3, float("nan")]) * scale.value])
    assert scale.value == LossScale().value
    while not scale.fits([torch.tensor(60.0).half() * scale.value]):
        pass
    (gradient,) = scale.unscaled([torch.tensor(60.0).half() * scale.value])
    assert 1 < scale.value < LossScale().value, "float16 holds 60 times a smaller one"
    assert gradient == 60
