"""Trains a small convolutional net on scikit-learn's handwritten digits: which layers learn?

    python examples/digits.py

The data (1,797 images of 8x8 pixels) ship with scikit-learn; nothing is downloaded. What appears:

1. What measuring costs here, once a few steps are timed.
2. A row per layer. LCA is the loss change that the layer's motion caused: negative helped, positive
   hurt. ``share`` is its part of the whole change; ``helping`` and ``hurting`` are the mean
   fractions of its weights that helped or hurt in a step. The rest was idle.
3. The ledger. The credits must add up to the true loss change; the residual is what they miss.
   ``--tolerance 1e-4`` shrinks it, by more gradients on the steps that need them.
4. The command that shows all this over time in TensorBoard; ``--out FILE`` draws a picture of it.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_lca import LCACallback, figures


class DigitsNet(pl.LightningModule):
    # Nothing here is made for LCA. The callback runs training_step on the probe, with dropout off.
    # BatchNorm normalises by the probe's batch there, but its running statistics never see it.

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(32)
        self.dropout = nn.Dropout(0.25)
        self.hidden = nn.Linear(32 * 2 * 2, 64)
        self.output = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        return self.output(F.relu(self.hidden(self.dropout(x.flatten(1)))))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_accuracy", (logits.argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def loaders() -> tuple[DataLoader, DataLoader]:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    train, val = random_split(TensorDataset(x, torch.tensor(labels)), [0.8, 0.2])
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=64)


def main() -> None:
    parser = argparse.ArgumentParser(description="LCA of a small convolutional net on digits.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--tolerance", type=float, help="largest |residual| of a step, e.g. 1e-4")
    parser.add_argument("--every-n-steps", type=int, default=1, help="10: cheaper, coarser")
    parser.add_argument("--validation", action="store_true", help="measure on validation data too")
    parser.add_argument("--log-dir", default="lightning_logs")
    parser.add_argument("--out", type=Path, help="draws every layer at every step, e.g. digits.png")
    args = parser.parse_args()

    # Not of use here: the data lie in memory, the net is too small for a GPU, and the third is a
    # deprecation between Lightning and torch. All other warnings are shown.
    for hint in ("does not have many workers", "GPU available but not used", "treespec, LeafSpec"):
        warnings.filterwarnings("ignore", f".*{hint}")
    # Of Lightning's mere information (devices, tips on other products) only the line on cost stays.
    rank_zero = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    rank_zero.addFilter(lambda e: e.levelno > logging.INFO or e.getMessage().startswith("LCA"))

    torch.set_num_threads(1)  # So small a net gains nothing from more.
    torch.manual_seed(0)
    train_loader, val_loader = loaders()
    lca = LCACallback(
        probe={"train": "train", "val": "val"} if args.validation else "train",
        probe_batches=4,  # 256 images, the same at every step.
        every_n_steps=args.every_n_steps,
        tolerance=args.tolerance,
        neurons=True,  # So that the dashboard can open a layer.
    )
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        callbacks=[lca],
        logger=TensorBoardLogger(args.log_dir, name=""),
        log_every_n_steps=5,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(DigitsNet(), train_loader, val_loader)

    print(lca.summary())
    if args.out:
        figures.heatmap(lca.history).savefig(args.out)
    print(f"\nValidation accuracy: {trainer.callback_metrics['val_accuracy']:.1%}. Now run:")
    print(f"tensorboard --logdir {shlex.quote(args.log_dir)}")


if __name__ == "__main__":
    main()
