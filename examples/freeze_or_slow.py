"""What to do about the layer that hurts most: freeze it, slow it, less momentum, or LCAFreeze?

    python examples/freeze_or_slow.py            ten seeds, a few minutes
    python examples/freeze_or_slow.py --quick    two short seeds

A small convolutional net on scikit-learn's digits, trained by SGD with so much momentum that some
layer hurts in most runs. A first run of every seed tells which layer helped least, or hurt; the
others treat that layer. Loss and accuracy at the end are means over seeds with their standard
errors, on the training and the validation data; ``against the baseline`` is the mean difference of
the validation losses of the same seeds, with a 95 % interval (Student's t over seeds). Where that
interval holds 0, nothing was shown to be better.
"""

from __future__ import annotations

import argparse
import logging
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lca import LCACallback, LCAFreeze
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
    *others: pl.Callback,
) -> tuple[LCACallback, list[float]]:
    """Trains once; returns the callback, and loss and accuracy on training and validation data."""
    pl.seed_everything(seed, verbose=False)
    train_set, val_set = data()
    lca = LCACallback(probe_batches=4, figures=False)
    module = Net(momentum, rate)
    with tempfile.TemporaryDirectory() as path:
        trainer = pl.Trainer(
            max_epochs=epochs,
            callbacks=[lca, *others],
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
    return lca, results


def main() -> None:
    parser = argparse.ArgumentParser(description="What to do about the layer that hurts most.")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=10)
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
        lca, results = train(seed, epochs)
        credit = dict(zip(lca.history.groups, lca.history.allocated.sum(0), strict=True))
        layer = max(credit, key=credit.__getitem__)
        worst[layer] += 1
        hurting += credit[layer] > 0
        freeze = LCAFreeze(window=50)
        ways = {
            "baseline": results,
            "frozen from the start": train(
                seed, epochs, rate=lambda name, x=layer: float(name != x)
            )[1],
            "10x smaller rate": train(
                seed, epochs, rate=lambda name, x=layer: 0.1 if name == x else 1.0
            )[1],
            "momentum 0.8": train(seed, epochs, 0.8)[1],
            "LCAFreeze": train(seed, epochs, 0.95, lambda name: 1.0, freeze)[1],
        }
        acted.update(freeze.acted.keys())
        for name, way in ways.items():
            rows.setdefault(name, []).append(way)

    told = ", ".join(f"{name} ({count})" for name, count in worst.most_common())
    print(f"The layer that helped least, in {seeds} runs: {told}; it hurt in {hurting}.")
    told = ", ".join(f"{name} ({count})" for name, count in acted.most_common()) or "none"
    print(f"LCAFreeze froze: {told}.\n")
    print(f"{'':24}{'train loss':>17}{'val loss':>17}{'val accuracy':>17}   against the baseline")
    base = np.array(rows["baseline"])
    for name, values in rows.items():
        table = np.array(values)
        mean, error = table.mean(0), table.std(0, ddof=1) / math.sqrt(seeds)
        cells = "".join(f"{mean[i]:>9.3f} ± {error[i]:.3f}" for i in (0, 2, 3))
        apart = (table - base)[:, 2]
        half = quantile(0.975, seeds - 1) * apart.std(ddof=1) / math.sqrt(seeds)
        verdict = "" if name == "baseline" else f"   {apart.mean():+.3f} ± {half:.3f}"
        print(f"{name:24}{cells}{verdict}")


if __name__ == "__main__":
    main()
