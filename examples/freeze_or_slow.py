"""What to do about the layer that hurts most: freeze it, slow it, less momentum, or LCAFreeze?

    python examples/freeze_or_slow.py            ten seeds, ten minutes
    python examples/freeze_or_slow.py --quick    two short seeds

A small convolutional net on scikit-learn's digits, trained by SGD with so much momentum that some
layer hurts in most runs. A first run of every seed tells which layer helped least, or hurt; the
others treat that layer, or, as a control, the layer that helped most. Loss and accuracy at the end
are means over seeds with their standard errors, on the training and the validation data;
``against the baseline`` is the mean difference of the validation losses of the same seeds, with a
95 % interval (Student's t over seeds). Where that interval holds 0, nothing was shown to be better.
A picture of these differences, a dot per seed, is in ``--out``.
"""

from __future__ import annotations

import argparse
import logging
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lca import LCACallback, LCAFreeze
from lightning_lca.figures import style
from lightning_lca.record.statistics import quantile

LAYERS = ("conv1", "conv2", "hidden", "output")


class Net(pl.LightningModule):
    def __init__(self, momentum: float, rate: Callable[[str], float]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 2 * 2, 64)
        self.output = nn.Linear(64, 10)
        self.momentum, self.rate = momentum, rate

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.output(F.relu(self.hidden(x.flatten(1))))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [
            {"params": list(self.get_submodule(name).parameters()), "lr": 0.1 * self.rate(name)}
            for name in LAYERS
            if self.rate(name)
        ]
        for name in LAYERS:
            self.get_submodule(name).requires_grad_(bool(self.rate(name)))
        return torch.optim.SGD(groups, lr=0.1, momentum=self.momentum)


def data() -> tuple[TensorDataset, TensorDataset]:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, val = order[:1400], order[1400:]
    return TensorDataset(x[train], y[train]), TensorDataset(x[val], y[val])


def train(
    seed: int,
    epochs: int,
    momentum: float = 0.95,
    rate: Callable[[str], float] = lambda name: 1.0,
    callbacks: Sequence[pl.Callback] = (),
) -> list[float]:
    """Trains once; returns loss and accuracy on the training data, then on the validation data."""
    pl.seed_everything(seed, verbose=False)
    train_set, val_set = data()
    module = Net(momentum, rate)
    with tempfile.TemporaryDirectory() as path:
        trainer = pl.Trainer(
            max_epochs=epochs,
            callbacks=list(callbacks),
            default_root_dir=path,
            logger=False,
            accelerator="cpu",
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, DataLoader(train_set, batch_size=64, shuffle=True))
    results = []
    with torch.no_grad():
        for part in (train_set, val_set):
            logits = module(part.tensors[0])
            results.append(F.cross_entropy(logits, part.tensors[1]).item())
            results.append((logits.argmax(1) == part.tensors[1]).float().mean().item())
    return results


def measure() -> LCACallback:
    return LCACallback(probe_batches=4, figures=False)


def interval(apart: np.ndarray) -> tuple[float, float]:
    """Tells the mean of values of seeds [seeds], and half of its 95 % interval."""
    half = quantile(0.975, len(apart) - 1) * apart.std(ddof=1) / math.sqrt(len(apart))
    return float(apart.mean()), float(half)


def against_control(apart: dict[str, np.ndarray]) -> str:
    """Says whether it matters which layer is slowed."""
    mean, half = interval(apart["10x smaller rate"] - apart["10x smaller, best layer"])
    verdict = "which does not tell them apart" if abs(mean) <= half else "which tells them apart"
    return f"Slowing the worst layer against the best: {mean:+.3f} ± {half:.3f}, {verdict}"


def draw(apart: dict[str, np.ndarray], path: Path) -> None:
    """Draws what every way changed against the baseline, seed by seed [seeds]."""
    figure = Figure(figsize=(7.2, 3.4), dpi=90, layout="constrained")
    axes = figure.subplots()
    for y, values in enumerate(apart.values()):
        mean, half = interval(values)
        colour = style.HELPS if mean + half < 0 else style.HURTS if mean - half > 0 else "0.45"
        axes.scatter(values, np.full(len(values), y - 0.18), s=16, color=colour, alpha=0.6)
        axes.errorbar(mean, y, xerr=half, color=colour, fmt="o", markersize=6, capsize=4)
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set_yticks(range(len(apart)), list(apart))
    axes.set_ylim(len(apart) - 0.5, -0.6)
    axes.set_xlabel(
        "validation loss minus the baseline's; left is better\n"
        "dots: seeds; bars: their mean and its 95 % interval"
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params("y", length=0)
    better = sum(sum(interval(values)) < 0 for values in apart.values())
    found = f"{better} of {len(apart)} ways end with a lower validation loss than the baseline"
    figure.suptitle(f"{found}\n{against_control(apart)}", x=0.01, ha="left", fontsize=11)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="What to do about the layer that hurts most.")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("freeze_or_slow.png"), help="the picture")
    parser.add_argument("--quick", action="store_true", help="two short seeds")
    args = parser.parse_args()
    seeds, epochs = (2, 4) if args.quick else (args.seeds, args.epochs)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)

    rows: dict[str, list[list[float]]] = {}
    worst: Counter[str] = Counter()
    hurting = 0
    acted: Counter[str] = Counter()
    for seed in range(seeds):
        lca, freeze = measure(), LCAFreeze(window=50)
        # Measuring changes nothing, so that the runs without it can be compared.
        results = train(seed, epochs, callbacks=[lca])
        credit = dict(zip(lca.history.groups, lca.history.allocated.sum(0), strict=True))
        layer, best = (f(credit, key=credit.__getitem__) for f in (max, min))
        worst[layer] += 1
        hurting += credit[layer] > 0
        ways = {
            "baseline": results,
            "frozen from the start": train(seed, epochs, rate=lambda n, x=layer: float(n != x)),
            "10x smaller rate": train(seed, epochs, rate=lambda n, x=layer: 0.1 if n == x else 1.0),
            "10x smaller, best layer": train(
                seed, epochs, rate=lambda n, x=best: 0.1 if n == x else 1.0
            ),
            "momentum 0.8": train(seed, epochs, momentum=0.8),
            "LCAFreeze": train(seed, epochs, callbacks=[measure(), freeze]),
        }
        acted.update(freeze.acted.keys())
        for name, way in ways.items():
            rows.setdefault(name, []).append(way)

    told = ", ".join(f"{name} ({count})" for name, count in worst.most_common())
    print(f"The layer that helped least, in {seeds} runs: {told}; it hurt in {hurting}.")
    told = ", ".join(f"{name} ({count})" for name, count in acted.most_common()) or "none"
    print(f"LCAFreeze froze: {told}.\n")
    print(f"{'':24}{'train loss':>17}{'val loss':>17}{'val accuracy':>17}   against the baseline")
    base, apart = np.array(rows["baseline"]), {}
    for name, values in rows.items():
        table = np.array(values)
        mean, error = table.mean(0), table.std(0, ddof=1) / math.sqrt(seeds)
        cells = "".join(f"{mean[i]:>9.3f} ± {error[i]:.3f}" for i in (0, 2, 3))
        verdict = ""
        if name != "baseline":
            apart[name] = (table - base)[:, 2]
            verdict = "   {:+.3f} ± {:.3f}".format(*interval(apart[name]))
        print(f"{name:24}{cells}{verdict}")
    print(f"\n{against_control(apart)}.")
    draw(apart, args.out)
    print(f"The picture is {args.out}.")


if __name__ == "__main__":
    main()
