"""Trains in fewer dimensions: prunes or freezes weights meanwhile; which carry the learning left?

    python examples/pruning.py

A small net learns scikit-learn's digits (nothing is downloaded). After each of the first three
epochs the smallest weights stop learning, until a tenth is left: *pruned* to zero by Lightning's
ModelPruning (torch.nn.utils.prune), or *frozen* where they are. What appears:

1. A row per epoch, mean over seeds; of the accuracy on held-out data also the spread (standard
   deviation). ``left`` is the share of weights that learn in it. LCA, in units of the loss
   (negative lowered it), is split in hindsight: ``kept`` is the credit of weights that learn to the
   end, ``stopped later`` of those that are still to stop, ``stopped`` of those that have: zero.
2. The ledger of the run: true change = allocated + residual + drift. What pruning itself does to
   the loss is no optimizer step, so it is booked as drift; freezing moves nothing and has none.
3. A picture of the same, in ``--out``.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections import OrderedDict
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pytorch_lightning.callbacks import ModelPruning
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_lca import LCACallback

LEFT = (0.5, 0.2, 0.1)  # Share of the weights that learn after epochs 1, 2 and 3.
LAYERS = ("first", "second", "output")


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        layers = {"first": nn.Linear(64, 100), "relu1": nn.ReLU(), "second": nn.Linear(100, 50)}
        layers |= {"relu2": nn.ReLU(), "output": nn.Linear(50, 10)}
        self.net = nn.Sequential(OrderedDict(layers))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def kernels(self) -> list[tuple[nn.Module, str]]:
        return [(getattr(self.net, name), "weight") for name in LAYERS]


class Freezing(pl.Callback):
    """Freezes weights of smallest magnitude where they are."""

    def __init__(self) -> None:
        self.masks: list[Tensor] = []

    def on_fit_start(self, trainer: pl.Trainer, module: Net) -> None:
        self.weights = [getattr(layer, name) for layer, name in module.kernels()]
        self.masks = [torch.ones_like(weight) for weight in self.weights]
        for i, weight in enumerate(self.weights):
            weight.register_hook(lambda grad, i=i: grad * self.masks[i])

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Net) -> None:
        if trainer.current_epoch >= len(LEFT):
            return
        # As pruning counts: frozen weights would come back if they were large by now.
        sizes = [w.detach().abs() * mask for w, mask in zip(self.weights, self.masks, strict=True)]
        every = torch.cat([size.flatten() for size in sizes])
        limit = every.kthvalue(round((1 - LEFT[trainer.current_epoch]) * len(every))).values
        self.masks = [(size > limit).float() for size in sizes]
        for weight, mask in zip(self.weights, self.masks, strict=True):
            # Momentum would move a weight on without a gradient.
            trainer.optimizers[0].state[weight]["momentum_buffer"] *= mask


class Books(pl.Callback):
    """Keeps every epoch's credit per weight, and which weights learned in it."""

    def __init__(self, lca: LCACallback, freezing: Freezing | None) -> None:
        self.lca, self.freezing = lca, freezing
        self.credit: list[Tensor] = []
        self.learned: list[Tensor] = []
        self.accuracy: list[float] = []

    def on_fit_start(self, trainer: pl.Trainer, module: Net) -> None:
        if self.freezing is None:
            for layer, name in module.kernels():
                prune.identity(layer, name)  # So that a weight has one name throughout.

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Net) -> None:
        totals = [v for n, v in self.lca.totals.items() if "weight" in n]
        flat = torch.cat([v.flatten() for v in totals]).double()
        self.credit.append(flat - sum(self.credit, torch.zeros_like(flat)))
        if self.freezing is not None:
            masks = self.freezing.masks
        else:
            masks = [
                getattr(layer, "weight_mask", torch.ones_like(layer.weight))
                for layer, _ in module.kernels()
            ]
        self.learned.append(torch.cat([mask.flatten() for mask in masks]) > 0)
        self.accuracy.append(float(trainer.callback_metrics["accuracy"]))


def train(how: str, epochs: int, seed: int) -> tuple[LCACallback, Books]:
    pl.seed_everything(seed, verbose=False)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32) / 16
    parts = random_split(TensorDataset(x, torch.tensor(labels)), [0.8, 0.2])
    model = Net()
    lca = LCACallback(probe_batches=8, track_parameters=True, figures=False)
    if how == "frozen":
        freezing = Freezing()
        callbacks = [lca, books := Books(lca, freezing), freezing]
    else:
        pruning = ModelPruning(
            "l1_unstructured",
            parameters_to_prune=model.kernels(),
            use_global_unstructured=True,
            # Of the weights that are left then.
            amount=lambda epoch: (
                1 - LEFT[epoch] / ((1.0, *LEFT)[epoch]) if epoch < len(LEFT) else 0.0
            ),
            make_pruning_permanent=False,
        )
        callbacks = [lca, books := Books(lca, None), pruning]
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
    loaders = DataLoader(parts[0], 64, shuffle=True), DataLoader(parts[1], 64)
    trainer.fit(model, *loaders)
    return lca, books


def split(books: Books) -> Tensor:
    """Credit per epoch of weights that are kept, that stop later, and that have stopped [E, 3]."""
    kept, rows = books.learned[-1], []
    for credit, learned in zip(books.credit, books.learned, strict=True):
        parts = (credit[kept], credit[learned & ~kept], credit[~learned])
        rows.append([float(part.sum()) for part in parts])
        assert not credit[~learned].any(), "A weight that has stopped has credit."
    return torch.tensor(rows)


def draw(found: dict[str, list[Books]], path: Path) -> None:
    """Draws the credit of every epoch, mean over seeds."""
    figure = Figure(figsize=(7.2, 3.8), dpi=90, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    first = []
    for axes, (how, runs) in zip(panels, found.items(), strict=True):
        kept, later, _ = torch.stack([split(books) for books in runs]).mean(0).T.numpy()
        epochs = range(1, len(kept) + 1)
        axes.bar(epochs, kept, color="#174f92", label="kept to the end")
        axes.bar(epochs, later, bottom=kept, color="#a9c4e4", label=f"{how} later")
        axes.axhline(0, color="0.3", linewidth=0.8)
        learned = runs[0].learned
        share = [f"{e}\n{m.float().mean():.0%}" for e, m in zip(epochs, learned, strict=True)]
        axes.set_xticks(list(epochs), share, fontsize=8)
        accuracy = spread([100 * books.accuracy[-1] for books in runs])
        axes.set_title(f"{how}: accuracy {accuracy} %", loc="left", fontsize=10)
        axes.set_xlabel("epoch, and weights that learn in it")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right")
        first.append(kept[0] / (kept[0] + later[0]))
    panels[0].set_ylabel("LCA in the epoch (loss)\ndown is learning")
    title = f"The {LEFT[-1]:.0%} of weights that are kept did {min(first):.0%} to {max(first):.0%}"
    figure.suptitle(f"{title} of the learning in epoch 1 already", x=0.01, ha="left", fontsize=11)
    figure.savefig(path)


def spread(values: list[float]) -> str:
    tensor = torch.tensor(values)
    return f"{tensor.mean():.1f} ± {tensor.std(correction=int(len(values) > 1)):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="LCA while weights are pruned or frozen.")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("pruning.png"), help="the picture")
    parser.add_argument("--quick", action="store_true", help="fewer epochs, two seeds")
    args = parser.parse_args()
    if args.quick:
        args.epochs, args.seeds = 5, 2
    for hint in ("does not have many workers", "GPU available", "treespec", "smaller than the log"):
        warnings.filterwarnings("ignore", f".*{hint}")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)

    print(f"scikit-learn's digits: {args.seeds} seeds, {args.epochs} epochs")
    found = {}
    for how in ("pruned", "frozen"):
        runs = [train(how, args.epochs, seed) for seed in range(args.seeds)]
        found[how] = [books for _, books in runs]
        heads = f"{'left':>6} {'kept':>9} {'stopped later':>14} {'stopped':>8} {'accuracy':>14}"
        print(f"{how:<7} {heads}")
        means = torch.stack([split(books) for books in found[how]]).mean(0).tolist()
        for e, (kept, later, stopped) in enumerate(means):
            left = found[how][0].learned[e].float().mean()
            accuracy = spread([100 * books.accuracy[e] for books in found[how]])
            credits = f"{kept:+9.4f} {later:+14.4f} {stopped:8.4f}"
            print(f"epoch {e + 1} {left:6.0%} {credits} {accuracy + ' %':>14}")
        ledger = torch.tensor([ledger_of(lca) for lca, _ in runs]).mean(0).tolist()
        print(
            "true loss change {:+.4f} = allocated {:+.4f} {:+.4f} residual {:+.4f} drift\n".format(
                *ledger
            )
        )
    draw(found, args.out)
    print(f"The picture is {args.out}.")


def ledger_of(lca: LCACallback) -> list[float]:
    h = lca.history
    change = h.loss_after[-1] - h.loss_before[0]
    return [float(part.sum()) for part in (change, h.allocated, h.residual, h.drift)]


if __name__ == "__main__":
    main()
