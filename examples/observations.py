"""Looks for the three observations of the LCA literature in runs of your own, per optimizer.

    python examples/observations.py
    python examples/observations.py --models resnet20 --width 8 --seeds 2

1. *Learning is a narrow majority*: of the weights that move the loss, little more than half help.
2. *Some layers hurt overall*: their motion raised the loss of the training data over the whole run.
3. *Layers learn together*: their moments of learning fall on the same steps more often than chance.

Every optimizer trains every net from several seeds, on Fashion-MNIST where ``fashion_mnist.py``
finds it, else on scikit-learn's digits. Printed are mean and spread (standard deviation) over the
seeds, which differ in weights and batches; saved is a picture in ``--out``. All numbers are of
these runs, which are short: they say what happens here, not what was published.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from fashion_mnist import FILES, PLACES, read
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lca import LCACallback
from lightning_lca.record.synchrony import synchrony

STRONGEST = 20  # Steps of a layer that count as its moments of learning.


class MLP(nn.Sequential):
    def __init__(self, side: int, width: int) -> None:
        super().__init__(nn.Flatten())
        for i, sizes in enumerate(pairwise((side * side, 100, 50, 10)), 1):
            self.add_module(f"fc{i}", nn.Linear(*sizes))
            if i < 3:
                self.add_module(f"relu{i}", nn.ReLU())


class LeNet(nn.Module):
    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5, padding=0 if side == 28 else 2)
        inner = 16 * (5 if side == 28 else side // 4) ** 2
        self.fc1, self.fc2, self.fc3 = (nn.Linear(*s) for s in pairwise((inner, 120, 84, 10)))

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2):
            x = F.max_pool2d(F.relu(conv(x)), 2)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


class Block(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        # The shortcut has no weights: it drops pixels and fills up channels with zeros.
        short = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(short, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1])))


class ResNet20(nn.Module):
    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        widths = [width] * 4 + [2 * width] * 3 + [4 * width] * 3
        self.blocks = nn.Sequential(*(Block(a, b, 1 + (a < b)) for a, b in pairwise(widths)))
        self.fc = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.norm(self.conv(x)))).mean((2, 3)))


NETS = {"mlp": MLP, "lenet": LeNet, "resnet20": ResNet20}
OPTIMIZERS = {
    "sgd": ("SGD, momentum 0.9", lambda p: torch.optim.SGD(p, 0.02, momentum=0.9)),
    "adam": ("Adam", lambda p: torch.optim.Adam(p, 0.001)),
}


class Learner(pl.LightningModule):
    def __init__(self, net: nn.Module, optimizer: str) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer][1](self.parameters())


class Seen(NamedTuple):
    """What one run shows.

    ``helping``: share of moving weights that help, mean over steps; ``layers``: names, ``credit``:
    LCA of each; ``together``: pairs of moments on the same step, as a multiple of chance.
    """

    helping: float
    layers: tuple[str, ...]
    credit: np.ndarray
    together: float
    change: float


def observe(data: TensorDataset, model: str, optimizer: str, seed: int, args: argparse.Namespace):
    pl.seed_everything(seed, verbose=False)
    net = NETS[model](data.tensors[0].shape[-1], args.width)
    lca = LCACallback(probe_batches=args.probe_batches, seed=seed, figures=False)
    quiet = {f"enable_{x}": False for x in ("checkpointing", "model_summary", "progress_bar")}
    trainer = pl.Trainer(
        max_steps=args.steps, callbacks=[lca], logger=False, accelerator="cpu", **quiet
    )
    trainer.fit(Learner(net, optimizer), DataLoader(data, args.batch, shuffle=True))
    rows = lca.history.rows[lca.history.finite]
    helping, hurting = rows.helping.sum(1), rows.hurting.sum(1)
    found = synchrony(rows.allocated, min(STRONGEST, len(rows) // 4), 200)
    return Seen(
        helping=float((helping / np.maximum(helping + hurting, 1)).mean()),
        layers=tuple(name.removeprefix("net.") for name in lca.history.groups),
        credit=rows.allocated.sum(0, dtype=float),
        together=float(found.pairs / max(found.null_pairs.mean(), 1e-9)),
        change=float(rows.loss_after[-1] - rows.loss_before[0]),
    )


def load(places: list[Path]) -> tuple[TensorDataset, str]:
    try:
        x, y = (read(name, places, False) for name in FILES[:2])
        return TensorDataset(x / 255, y.long()), "Fashion-MNIST"
    except (OSError, EOFError, ValueError):
        images, labels = load_digits(return_X_y=True)
        x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        return TensorDataset(x, torch.tensor(labels)), "scikit-learn's digits"


def spread(values: list[float], form: str) -> str:
    return f"{np.mean(values):{form}} ± {np.std(values, ddof=len(values) > 1):{form}}"


def draw(found: dict[tuple[str, str], list[Seen]], what: str, path: Path) -> None:
    models = list(dict.fromkeys(model for model, _ in found))
    figure = Figure(figsize=(8.4, 1.3 + 2.6 * len(models)), dpi=90, layout="constrained")
    grid = figure.subplots(len(models), 3, squeeze=False, width_ratios=[1, 1.6, 1])
    for model, line in zip(models, grid, strict=True):
        runs = {o: seen for (m, o), seen in found.items() if m == model}
        marks = dict(zip(runs, "os", strict=False))
        for x, (_, seen) in enumerate(runs.items()):
            at = x + np.linspace(-0.12, 0.12, len(seen)) if len(seen) > 1 else [x]
            line[0].scatter(at, [100 * s.helping for s in seen], s=18, color="#174f92")
            line[2].scatter(at, [s.together for s in seen], s=18, color="#174f92")
        for i, (optimizer, seen) in enumerate(runs.items()):
            rows = np.arange(len(seen[0].layers)) + 0.3 * (i - (len(runs) - 1) / 2)
            for one in seen:
                colours = ["#ec6a45" if c > 0 else "#174f92" for c in one.credit]
                line[1].scatter(
                    one.credit, rows, s=16, c=colours, marker=marks[optimizer], alpha=0.8
                )
        layers = next(iter(runs.values()))[0].layers
        every = -(-len(layers) // 12)
        line[1].set_yticks(range(0, len(layers), every), layers[::every])
        line[1].invert_yaxis()
        line[1].axvline(0, color="0.4", linewidth=0.8)
        line[0].axhline(50, color="0.4", linewidth=0.8)
        line[2].axhline(1, color="0.4", linewidth=0.8)
        line[2].set_ylim(bottom=0)
        line[0].yaxis.set_major_formatter("{x:g}%")
        line[0].set_title(f"{model}\nmoving weights that help", fontsize=10, loc="left")
        names = ", ".join(f"{'●■'['os'.index(m)]} {o}" for o, m in marks.items())
        line[1].set_title(f"LCA of layers (loss), {names}\nred: hurt overall", fontsize=10)
        line[2].set_title("moments shared,\nas multiple of chance", fontsize=10)
        for axes in (line[0], line[2]):
            axes.set_xticks(range(len(runs)), list(runs))
            axes.set_xlim(-0.5, len(runs) - 0.5)
        for axes in line:
            axes.spines[["top", "right"]].set_visible(False)
    runs = [one for seen in found.values() for one in seen]
    helping, together = [100 * s.helping for s in runs], [s.together for s in runs]
    hurt = np.concatenate([s.credit > 0 for s in runs])
    title = (
        f"On {what}: {min(helping):.0f} to {max(helping):.0f} % of moving weights help; "
        f"{hurt.sum()} of {hurt.size} layers hurt;\nmoments are shared {min(together):.1f} to "
        f"{max(together):.1f} times as often as by chance (a dot is a seed)"
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Three observations on how networks learn.")
    parser.add_argument("--models", nargs="+", choices=NETS, default=["mlp", "lenet"])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--probe-batches", type=int, default=4)
    parser.add_argument("--width", type=int, default=8, help="of resnet20; 16 is the usual one")
    parser.add_argument("--data", type=Path, nargs="+", default=PLACES, help="of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Path("observations.png"), help="the picture")
    parser.add_argument("--quick", action="store_true", help="two seeds, 60 steps, the MLP alone")
    args = parser.parse_args()
    if args.quick:
        args.models, args.seeds, args.steps = args.models[:1], 2, 60
    for hint in ("does not have many workers", "GPU available", "treespec", "smaller than the log"):
        warnings.filterwarnings("ignore", f".*{hint}")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)

    data, what = load(args.data)
    print(f"{what}: {args.seeds} seeds, {args.steps} steps of {args.batch}; mean ± spread")
    print(
        f"{'net':<9} {'optimizer':<18} {'loss change':>17} {'weights helping':>17} "
        f"{'layers that hurt':>17} {'moments / chance':>17}  hurt in most seeds"
    )
    found: dict[tuple[str, str], list[Seen]] = {}
    for model in args.models:
        for optimizer in args.optimizers:
            seen = [observe(data, model, optimizer, seed, args) for seed in range(args.seeds)]
            found[model, optimizer] = seen
            hurt = np.array([s.credit > 0 for s in seen])
            often = [n for n, h in zip(seen[0].layers, hurt.mean(0), strict=True) if h > 0.5]
            print(
                f"{model:<9} {OPTIMIZERS[optimizer][0]:<18} "
                f"{spread([s.change for s in seen], '.3f'):>17} "
                f"{spread([100 * s.helping for s in seen], '.2f') + ' %':>17} "
                f"{spread(hurt.sum(1).tolist(), '.1f') + f' of {hurt.shape[1]}':>17} "
                f"{spread([s.together for s in seen], '.2f'):>17}  "
                f"{', '.join(often[:4]) or '-'}{', …' if len(often) > 4 else ''}",
                flush=True,
            )
    draw(found, what, args.out)
    print(f"The picture is {args.out}.")


if __name__ == "__main__":
    main()
