"""A small real training, so that every view has something to show."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lca.training.callback import LCACallback

STEPS = 300
_BATCH = 64


class SpiralNet(pl.LightningModule):
    """Tells the arms of a spiral apart."""

    def __init__(self) -> None:
        """Makes four layers."""
        super().__init__()
        self.input = nn.Linear(2, 32)
        self.norm = nn.BatchNorm1d(32)
        self.hidden = nn.Linear(32, 32)
        self.output = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Scores the arms: [batch, 2] -> [batch, 3]."""
        x = F.relu(self.norm(self.input(x)))
        scores: Tensor = self.output(F.relu(self.hidden(x)))
        return scores

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Returns the cross-entropy, and logs it."""
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Logs the cross-entropy."""
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        """Chooses Adam."""
        return torch.optim.Adam(self.parameters(), lr=0.01)


def spirals(points: int, seed: int) -> TensorDataset:
    """Draws points of three noisy spirals in the plane: [points, 2] float32, [points] int64."""
    generator = torch.Generator().manual_seed(seed)
    arm = torch.arange(points) % 3
    radius = torch.rand(points, generator=generator).sqrt()
    noise = 0.15 * torch.randn(points, generator=generator)
    angle = 4 * radius + arm * (2 * math.pi / 3) + noise
    return TensorDataset(torch.stack([radius * angle.cos(), radius * angle.sin()], 1), arm)


def train(directory: Path, *, steps: int = STEPS, progress: bool = True) -> LCACallback:
    """Trains `SpiralNet` for some seconds, and measures every step on two probes.

    Args:
        directory: Where the run's log directory, ``version_0`` and so on, is made.
        steps: Optimizer steps.
        progress: Shows Lightning's progress bar.
    """
    points = 8 * _BATCH
    train_loader = DataLoader(spirals(points, seed=0), batch_size=_BATCH, shuffle=True)
    val_loader = DataLoader(spirals(points, seed=1), batch_size=_BATCH)
    lca = LCACallback(
        probe={"train": "train", "val": "val"},
        probe_batches=4,
        track_parameters=True,
        neurons=True,
    )
    with warnings.catch_warnings():
        for hint in ("does not have many workers", "GPU available but not used", "treespec"):
            warnings.filterwarnings("ignore", f".*{hint}")
        level = logging.getLogger("pytorch_lightning").level
        logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        try:
            pl.seed_everything(0, verbose=False)
            trainer = pl.Trainer(
                max_epochs=-1,
                max_steps=steps,
                callbacks=[lca],
                logger=TensorBoardLogger(directory, name=""),
                log_every_n_steps=5,
                accelerator="cpu",
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=progress,
            )
            trainer.fit(SpiralNet(), train_loader, val_loader)
        finally:
            logging.getLogger("pytorch_lightning").setLevel(level)
    return lca
