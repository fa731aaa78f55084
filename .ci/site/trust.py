"""What the page on trust says in numbers, and its pictures: probes, chords, seeds and others.

    python .ci/site/trust.py             all of them, some minutes
    python .ci/site/trust.py chords      the ones named

All on the net and data of ``examples/digits.py`` or ``examples/freeze_or_slow.py``, on one thread.
Truth is what is meant by it each time: all training data, sixteen-point Gauss-Legendre, every step.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from runs import example, fit, quiet, save
from torch.utils.data import DataLoader

from lightning_lca import LCACallback, Quadrature
from lightning_lca.figures import style

EPOCHS = 10


def trained(*lca: LCACallback, seed: int = 0, more: Any = (), **changed: Any) -> pl.LightningModule:
    """Trains the digits of the example; ``changed`` are methods of its module."""
    module = example("digits")
    torch.manual_seed(seed)
    loaders = module.loaders()
    net = type("Net", (module.DigitsNet,), changed)()
    fit(None, net, loaders, [*lca, *more], EPOCHS)
    return net


def measure(**options: Any) -> LCACallback:
    return LCACallback(**{"probe_batches": 4, "figures": False} | options)


def apart(found: np.ndarray, true: np.ndarray) -> float:
    """The relative L1 distance."""
    return float(np.abs(found - true).sum() / np.abs(true).sum())


# -- probes ---------------------------------------------------------------------------------------


def probe_size() -> Any:
    """How far credit on some images lies from that on all that there are."""
    torch.manual_seed(0)
    train, _ = example("digits").loaders()
    draw = torch.Generator().manual_seed(0)
    everything = DataLoader(train.dataset, 128, shuffle=True, drop_last=True, generator=draw)
    lca = measure(probe=list(everything))
    trained(lca)
    batches = lca.history.by_batch.allocated  # [T, G, K]
    count = batches.shape[2]
    whole = batches.mean(2)
    sizes, steps, totals, signs = [], [], [], []
    for size in (1, 2, 4):
        parts = [batches[:, :, k : k + size].mean(2) for k in range(0, count - size + 1, size)]
        sizes.append(128 * size)
        steps.append([apart(part, whole) for part in parts])
        totals.append([apart(part.sum(0), whole.sum(0)) for part in parts])
        signs.append([float((np.sign(part) == np.sign(whole)).mean()) for part in parts])
    print(f"truth: {128 * count} images, {len(whole)} steps, {whole.shape[1]} layers")
    for size, step, total, sign in zip(sizes, steps, totals, signs, strict=True):
        print(
            f"{size} images: a layer's credit in a step off by {np.mean(step):.0%}, its sign right "
            f"in {np.mean(sign):.0%}; over the run off by {np.mean(total):.1%}"
        )
    with style.page() as figure:
        axes = figure.subplots()
        for values, colour, label in (
            (steps, style.HURTS, "in a step"),
            (totals, style.HELPS, "over the run"),
        ):
            for size, each in zip(sizes, values, strict=True):
                axes.scatter(
                    [size] * len(each), 100 * np.array(each), s=14, color=colour, alpha=0.5
                )
            axes.plot(sizes, [100 * np.mean(each) for each in values], color=colour, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_yticks([3, 10, 30, 100], ["3%", "10%", "30%", "100%"])
        axes.set_xlabel("images of the probe")
        axes.set_ylabel("credit of layers off by")
        axes.margins(x=0.1)
        axes.legend()
        style.headline(figure, "A larger probe is closer, by the root of its size")
    return figure


# -- rules, chords --------------------------------------------------------------------------------


def sixteen() -> Quadrature:
    nodes, weights = np.polynomial.legendre.leggauss(16)
    middle = tuple(float(s) for s in (nodes + 1) / 2)
    return Quadrature("gauss16", middle, tuple(float(w) for w in weights / 2), degree=31)


def rules() -> Any:
    """How far each rule lies from the integral, step by step."""
    names = ("euler", "trapezoid", "midpoint", "simpson", "gauss2", "gauss3", "boole")
    all_ = [measure(quadrature=rule, probe_batches=2) for rule in (*names, sixteen())]
    trained(*all_)
    *found, truth = [lca.history for lca in all_]
    wide = []
    for name, history in zip(names, found, strict=True):
        error = apart(history.allocated, truth.allocated)
        late = apart(history.allocated[20:], truth.allocated[20:])
        left = np.abs(history.residual).sum() / np.abs(history.allocated).sum()
        signs = (np.sign(history.allocated) == np.sign(truth.allocated)).mean()
        wide.append((name, error, left, signs))
        print(
            f"{name}: credit of a layer in a step off by {error:.2%} ({late:.2%} from step 20 on), "
            f"residual {left:.2%}, signs right {signs:.1%}"
        )
    return None


def chords() -> Any:
    """How far the credit of a chord lies from that of its steps, and what its residual shows."""
    lengths = (1, 2, 5, 10, 25, 50)
    all_ = [measure(every_n_steps=n) for n in lengths]
    trained(*all_)
    each = all_[0].history
    rows = []
    for n, lca in zip(lengths, all_, strict=True):
        history = lca.history
        ends = np.searchsorted(each.steps, history.steps, side="right")
        sums = np.stack([each.allocated[a:b].sum(0) for a, b in itertools.pairwise([0, *ends])])
        error = apart(history.allocated, sums)
        left = np.abs(history.residual).sum() / np.abs(history.allocated).sum()
        rows.append((n, error, left))
        print(f"chords of {n}: layers off by {error:.1%}, residual {left:.1%} of the credit")
    with style.page() as figure:
        axes = figure.subplots()
        n, error, left = (np.array(column) for column in zip(*rows[1:], strict=True))
        axes.plot(n, 100 * error, "o-", color=style.HURTS, label="credit of layers off by")
        axes.plot(n, 100 * left, "s--", color="0.35", label="residual, of the credit")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(n, [str(k) for k in n])
        axes.set_yticks([1, 10, 100], ["1%", "10%", "100%"])
        axes.minorticks_off()
        axes.margins(x=0.06)
        axes.set_xlabel("steps in a chord")
        axes.legend()
        style.headline(figure, "A chord is not the path", "digits, SGD with momentum, 230 steps")
    return figure


# -- seeds, rates, optimizers ---------------------------------------------------------------------


def seeds() -> Any:
    """How far runs lie apart that differ in nothing but the seed."""
    shares, layers = [], ()
    for seed in range(5):
        lca = measure()
        trained(lca, seed=seed)
        layers = lca.history.groups
        credit = lca.history.allocated.sum(0)
        shares.append(100 * credit / credit.sum())
    values = np.array(shares)
    for layer, mean, spread in zip(layers, values.mean(0), values.std(0, ddof=1), strict=True):
        print(f"{layer}: {mean:.1f} ± {spread:.1f} % (sd over {len(values)} seeds)")
    with style.page() as figure:
        axes = figure.subplots()
        rows = np.arange(len(layers))
        axes.barh(rows, values.mean(0), 0.7, color=style.HELPS, alpha=0.45)
        for each in values:
            axes.scatter(each, rows, color="black", s=14, zorder=3)
        style.label_rows(axes, layers, figure.get_figheight())
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.axvline(0, color="0.3", linewidth=0.8)
        axes.set_xlim(0, 1.05 * values.max())
        axes.set_xlabel("share of the loss change (%); dots: seeds")
        style.headline(figure, "Another seed moves shares by some points")
    return figure


def settings() -> Any:
    """What of two runs can be compared: rates and optimizers."""

    def by(make: Callable[..., Any], **options: Any) -> Any:
        return lambda self: make(self.parameters(), **options)

    sgd, adam = torch.optim.SGD, torch.optim.Adam
    for name, optimizer in {
        "SGD 0.05, momentum 0.9": by(sgd, lr=0.05, momentum=0.9),
        "SGD 0.005, momentum 0.9": by(sgd, lr=0.005, momentum=0.9),
        "SGD 0.05": by(sgd, lr=0.05),
        "Adam 0.003": by(adam, lr=0.003),
        "Adam 0.0003": by(adam, lr=0.0003),
    }.items():
        lca = measure()
        trained(lca, configure_optimizers=optimizer)
        history = lca.history
        credit = history.allocated
        helped = history.rows.helping.sum() / (history.rows.helping + history.rows.hurting).sum()
        shares = credit.sum(0) / credit.sum()
        told = ", ".join(
            f"{g} {s:.0%}" for g, s in zip(history.groups, shares, strict=True) if s > 0.05
        )
        print(
            f"{name}: loss {history.loss_before[0]:.2f} to {history.loss_after[-1]:.3f}, net "
            f"{credit.sum():+.2f}, gross {np.abs(credit).sum():.2f}, helping {helped:.1%}; {told}"
        )
    return None


# -- other measures -------------------------------------------------------------------------------


class Norms(pl.Callback):
    """Adds up, per layer, the norms of the gradient and of the motion, and keeps both ends."""

    def __init__(self) -> None:
        self.gradient: dict[str, float] = {}
        self.motion: dict[str, float] = {}

    def _layers(self, module: pl.LightningModule) -> Iterator[tuple[str, list[Any]]]:
        for name, layer in module.named_children():
            if parameters := list(layer.parameters()):
                yield name, parameters

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.before = {}
        for name, parameters in self._layers(module):
            norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters))
            self.gradient[name] = self.gradient.get(name, 0.0) + norm
            self.before[name] = [p.detach().clone() for p in parameters]

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        for name, parameters in self._layers(module):
            moved = zip(parameters, self.before[name], strict=True)
            norm = math.sqrt(sum(float((p - q).square().sum()) for p, q in moved))
            self.motion[name] = self.motion.get(name, 0.0) + norm


def elsewhere() -> Any:
    """Credit of layers beside norms of their gradients and motions, and saliency at the end."""
    module = example("freeze_or_slow")
    pl.seed_everything(0, verbose=False)
    train, _ = module.data()
    net, lca, norms = module.Net(0.95, lambda layer: 1.0), measure(), Norms()
    fit(None, net, [DataLoader(train, batch_size=64, shuffle=True)], [lca, norms], EPOCHS)
    loss = F.cross_entropy(net(train.tensors[0]), train.tensors[1])
    names, weights = zip(*net.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, weights)
    layers = lca.history.groups
    saliency = dict.fromkeys(layers, 0.0)
    for name, weight, gradient in zip(names, weights, gradients, strict=True):
        saliency[name.partition(".")[0]] += float((weight * gradient).abs().sum())
    credit = dict(zip(layers, lca.history.allocated.sum(0), strict=True))
    columns = {
        "credit": credit,
        "norm of the gradient": norms.gradient,
        "norm of the motion": norms.motion,
        "saliency at the end": saliency,
    }
    for title, values in columns.items():
        print(f"{title}: " + ", ".join(f"{layer} {values[layer]:+.3g}" for layer in layers))
    with style.page() as figure:
        panels = figure.subplots(1, len(columns), sharey=True)
        rows = np.arange(len(layers))
        for axes, (title, values) in zip(panels, columns.items(), strict=True):
            each = np.array([values[layer] for layer in layers])
            colours = style.signed(each) if title == "credit" else "0.5"
            axes.barh(rows, each, 0.7, color=colours)
            axes.axvline(0, color="0.3", linewidth=0.8)
            axes.locator_params("x", nbins=2)
            axes.set_title(title.replace(" of ", "\nof ").replace(" at ", "\nat "), fontsize=11)
        style.label_rows(panels[0], layers, figure.get_figheight())
        panels[0].set_ylim(len(layers) - 0.5, -0.5)
        worst = max(credit, key=credit.__getitem__)
        style.headline(figure, f"Only credit says that {worst} hurt")
    return figure


class Shapley(pl.Callback):
    """What each layer's motion changes the loss by, in the mean over all orders of layers."""

    def __init__(self, batch: list[torch.Tensor], steps: int) -> None:
        self.batch, self.steps = batch, steps
        self.values: list[list[float]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self.before = {n: p.detach().clone() for n, p in module.named_parameters()}

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if len(self.values) == self.steps:
            return
        after = {n: p.detach() for n, p in module.named_parameters()}
        layers = list(dict.fromkeys(n.partition(".")[0] for n in after))
        loss = {}
        with torch.no_grad():
            for moved in itertools.product((0, 1), repeat=len(layers)):
                there = dict(zip(layers, moved, strict=True))
                at = {n: after[n] if there[n.partition(".")[0]] else self.before[n] for n in after}
                scores = torch.func.functional_call(module, at, (self.batch[0],))
                loss[moved] = float(F.cross_entropy(scores.double(), self.batch[1]))
        orders = list(itertools.permutations(range(len(layers))))
        value = [0.0] * len(layers)
        for order in orders:
            moved = [0] * len(layers)
            for layer in order:
                before = loss[tuple(moved)]
                moved[layer] = 1
                value[layer] += (loss[tuple(moved)] - before) / len(orders)
        self.values.append(value)


def shapley() -> Any:
    """Credit of layers beside their Shapley values, step by step."""
    module = example("freeze_or_slow")
    for momentum in (0.0, 0.95):
        pl.seed_everything(0, verbose=False)
        train, _ = module.data()
        batch = [part[:256] for part in train.tensors]
        others = Shapley(batch, 60)
        lca = measure(probe=[batch], tolerance=1e-4)
        net = module.Net(momentum, lambda layer: 1.0)
        loader = DataLoader(train, batch_size=64, shuffle=True)
        fit(None, net, [loader], [others, lca], 4)
        true, found = np.array(others.values), lca.history.allocated[:60]
        agree = (np.sign(found) == np.sign(true)).mean()
        print(
            f"momentum {momentum}: 60 steps, credit and Shapley value of layers differ by "
            f"{apart(found, true):.1%}; signs agree in {agree:.1%}"
        )
    return None


PICTURES: dict[str, Callable[[], Any]] = {
    "probe_size": probe_size,
    "chords": chords,
    "seeds": seeds,
    "elsewhere": elsewhere,
}
NUMBERS: dict[str, Callable[[], Any]] = {"rules": rules, "settings": settings, "shapley": shapley}


if __name__ == "__main__":
    quiet()
    for name in sys.argv[1:] or PICTURES | NUMBERS:
        print(f"-- {name}")
        figure = (PICTURES | NUMBERS)[name]()
        if figure is not None:
            save(figure, name)
