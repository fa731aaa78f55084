"""Which layers pay for sparsity, and when? Cross-entropy plus a ratio-of-norms penalty per layer.

    python examples/compressibility.py
    python examples/compressibility.py --strength 0.01 --seeds 5

The penalty of a layer is the ratio of norms of its weights, ‖w‖₁ / ‖w‖₂: from √n, where all n
weights are equally large, down to 1, where a single one is left. The loss is the cross-entropy plus
``--strength`` times the sum over layers, and the callback splits every credit by term of that loss:

1. A row per layer: the credit of either term over the run, in units of the loss (negative lowered
   it); the credit of the cross-entropy in a run of the same seed without the penalty, and *paid*,
   the difference: what the layer's learning lost to sparsity. Then the ratio of norms in units of
   √n at the start and the end (0.80 is that of normal weights), and the share of weights below a
   hundredth of the layer's largest. Mean over seeds ± spread (standard deviation).
2. Loss and accuracy on held-out data, with and without the penalty.
3. A picture of when, in ``--out``.

The data are Fashion-MNIST where ``fashion_mnist.py`` finds it, else scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from fashion_mnist import PLACES
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from observations import MLP, load
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lca import LCACallback
from lightning_lca.figures import style

LAYERS = ("fc1", "fc2", "fc3")
TERMS = ("cross_entropy", "sparsity")
HELD_OUT = 0.2  # Of the samples: not trained on.


def ratio(weight: Tensor) -> Tensor:
    """‖w‖₁ / ‖w‖₂ of a weight [*shape], from 1 to √n."""
    return weight.abs().sum() / weight.norm()


class Learner(pl.LightningModule):
    def __init__(self, net: nn.Module, strength: float) -> None:
        super().__init__()
        self.net, self.strength = net, strength

    def terms(self, batch: list[Tensor]) -> dict[str, Tensor]:
        ratios = [ratio(self.net.get_submodule(name).weight) for name in LAYERS]
        return {
            "cross_entropy": F.cross_entropy(self.net(batch[0]), batch[1]),
            "sparsity": self.strength * torch.stack(ratios).sum(),
        }

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return sum(self.terms(batch).values())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.001)


class Seen(NamedTuple):
    """What one run shows.

    ``credit``: of every term over steps [steps, layers, terms]; ``ratios``: ‖w‖₁ / (‖w‖₂ √n) over
    steps [steps + 1, layers]; ``small``: share of weights below a hundredth of the largest, at the
    end [layers]; ``loss``, ``accuracy``: on held-out data.
    """

    credit: np.ndarray
    ratios: np.ndarray
    small: np.ndarray
    loss: float
    accuracy: float


class Ratios(pl.Callback):
    """Notes the ratio of norms of every layer, in units of √n, before training and each step."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def note(self, module: Learner) -> None:
        with torch.no_grad():
            weights = [module.net.get_submodule(name).weight for name in LAYERS]
            self.seen.append([float(ratio(w)) / w.numel() ** 0.5 for w in weights])

    def on_train_start(self, trainer: pl.Trainer, module: Learner) -> None:
        self.note(module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Learner, *_: object) -> None:
        self.note(module)


def spread(values: np.ndarray | list[float], form: str = "+.3f") -> str:
    return f"{np.mean(values):{form}} ± {np.std(values, ddof=len(values) > 1):{form.lstrip('+')}}"


def observe(
    train: TensorDataset, held: TensorDataset, strength: float, seed: int, args: argparse.Namespace
) -> Seen:
    pl.seed_everything(seed, verbose=False)
    learner = Learner(MLP(train.tensors[0].shape[-1], 0), strength)
    lca = LCACallback(
        loss_fn=lambda module, batch: module.terms(batch),
        breakdown="term",
        probe_batches=args.probe_batches,
        seed=seed,
        figures=False,
    )
    quiet = {f"enable_{x}": False for x in ("checkpointing", "model_summary", "progress_bar")}
    trainer = pl.Trainer(
        max_steps=args.steps,
        callbacks=[lca, ratios := Ratios()],
        logger=False,
        accelerator="cpu",
        **quiet,
    )
    trainer.fit(learner, DataLoader(train, args.batch, shuffle=True))
    split = lca.history.breakdowns["term"]
    rows = [lca.history.groups.index(f"net.{name}") for name in LAYERS]
    with torch.no_grad():
        logits = learner.net(held.tensors[0])
        weights = [learner.net.get_submodule(name).weight.abs() for name in LAYERS]
    return Seen(
        credit=split.allocated[:, rows][:, :, [split.names.index(term) for term in TERMS]],
        ratios=np.array(ratios.seen),
        small=np.array([float((w < 0.01 * w.max()).float().mean()) for w in weights]),
        loss=F.cross_entropy(logits, held.tensors[1]).item(),
        accuracy=(logits.argmax(1) == held.tensors[1]).float().mean().item(),
    )


def draw(sparse: list[Seen], plain: list[Seen], title: str, path: Path) -> None:
    """Draws a column per layer over steps: credit by term, what was paid, how sparse it became."""
    figure = Figure(figsize=(9, 6), dpi=80, layout="constrained")
    panels = figure.subplots(3, len(LAYERS), sharex=True, sharey="row", height_ratios=[1.5, 1, 1])
    credits, without = (np.array([s.credit for s in runs]).cumsum(1) for runs in (sparse, plain))
    sizes, before = (np.array([s.ratios for s in runs]) for runs in (sparse, plain))
    for i, (name, (top, middle, bottom)) in enumerate(zip(LAYERS, panels.T, strict=True)):
        line(top, without[..., i, 0], "cross-entropy, no penalty", style.HELPS, "--")
        line(top, credits[..., i, 0], "cross-entropy", style.HELPS)
        line(top, credits[..., i, 1], "sparsity", "#c2831a")
        paid = credits[..., i, 0] - without[..., i, 0]
        line(middle, paid, "paid", style.HURTS)
        line(bottom, before[..., i], "no penalty", "0.3", "--")
        line(bottom, sizes[..., i], "with penalty", "0.3")
        top.set_title(f"{name}: paid {paid[:, -1].mean():+.3f}".replace("-", "−"), fontsize=11)
        bottom.set_xlabel("optimizer step")
        bottom.set_ylim(0, 1)
        for axes in (top, middle):
            axes.axhline(0, color="0.6", linewidth=0.8)
    panels[0, 0].set_ylabel("cumulative LCA (loss)\n− helped, + hurt")
    panels[1, 0].set_ylabel("paid so far\n(cross-entropy)")
    panels[2, 0].set_ylabel("‖w‖₁ / ‖w‖₂, share\nof √n; low is sparse")
    for axes in panels[::2, 0]:
        axes.legend(frameon=False, fontsize=9)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}\nlines: mean over seeds; bands: all", x=0.01, ha="left", fontsize=11)
    figure.savefig(path)


def line(axes: Axes, values: np.ndarray, label: str, colour: str, dashes: str = "-") -> None:
    """Draws the mean over seeds of values [seeds, steps], in a band from least to most."""
    x = np.arange(values.shape[1])
    axes.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
    axes.plot(x, values.mean(0), color=colour, linestyle=dashes, linewidth=1.4, label=label)


def main() -> None:
    parser = argparse.ArgumentParser(description="LCA by term: which layers pay for sparsity?")
    parser.add_argument("--strength", type=float, default=0.005, help="of the penalty")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=480)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--probe-batches", type=int, default=4)
    parser.add_argument("--data", type=Path, nargs="+", default=PLACES, help="of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Path("compressibility.png"), help="the picture")
    parser.add_argument("--quick", action="store_true", help="two seeds, 60 steps")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.steps = 2, 60
    for hint in ("does not have many workers", "GPU available", "treespec", "smaller than the log"):
        warnings.filterwarnings("ignore", f".*{hint}")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)

    data, what = load(args.data)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    cut = round(HELD_OUT * len(data))
    held, train = (TensorDataset(*data[part]) for part in (order[:cut], order[cut:]))
    seeds = range(args.seeds)
    sparse = [observe(train, held, args.strength, seed, args) for seed in seeds]
    plain = [observe(train, held, 0.0, seed, args) for seed in seeds]

    print(
        f"{what}: {args.seeds} seeds, {args.steps} steps of {args.batch}, strength {args.strength}"
    )
    heads = ("cross-entropy", "sparsity", "no penalty", "paid in quarter", "paid", "‖w‖₁/‖w‖₂√n")
    print(f"{'layer':<5} " + " ".join(f"{h:>15}" for h in heads) + f" {'below 1/100':>14}")
    early, late = args.steps // 4 - 1, -1
    with_it, without = (np.array([s.credit for s in r]).cumsum(1) for r in (sparse, plain))
    paid = with_it[..., 0] - without[..., 0]  # [seeds, steps, layers]
    for i, name in enumerate(LAYERS):
        columns = (
            *with_it[:, late, i].T,
            without[:, late, i, 0],
            paid[:, early, i],
            paid[:, late, i],
        )
        row = " ".join(f"{spread(column):>15}" for column in columns)
        first, last = ([s.ratios[at, i] for s in sparse] for at in (0, -1))
        ratios = f"{np.mean(first):.2f} to {np.mean(last):.2f}"
        small = spread([100 * s.small[i] for s in sparse], ".1f")
        print(f"{name:<5} {row} {ratios:>15} {small + ' %':>14}")
    for label, runs in (("with penalty", sparse), ("no penalty", plain)):
        print(
            f"held-out, {label:<13} cross-entropy {spread([s.loss for s in runs], '.3f')}, "
            f"accuracy {spread([100 * s.accuracy for s in runs], '.1f')} %"
        )
    most = int(np.argmax(paid[:, late].mean(0)))
    title = f"{what}: {LAYERS[most]} pays most for sparsity, {spread(paid[:, late, most])}"
    draw(sparse, plain, title, args.out)
    print(f"The picture is {args.out}.")


if __name__ == "__main__":
    main()
