"""Resuming: a training that goes on from a checkpoint has the history of one that never stopped.

    python examples/recipes/resume.py

Results lie in the record; a checkpoint only says where that is. A resumed training with a log
directory of its own repeats the record there, so that each is whole.
"""

from __future__ import annotations

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lca import History, LCACallback


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 32), nn.Linear(32, 4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.second(torch.tanh(self.first(x))), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def train(epochs: int, checkpoint: str | None = None) -> tuple[pl.Trainer, LCACallback]:
    """Trains up to an epoch, from the start or from a checkpoint."""
    pl.seed_everything(0, verbose=False)
    x = torch.randn(256, 12)
    y = (x @ torch.randn(12, 4)).argmax(1)
    lca = LCACallback()
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[lca],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Net(), DataLoader(TensorDataset(x, y), batch_size=32), ckpt_path=checkpoint)
    return trainer, lca


def main() -> None:
    _, unbroken = train(epochs=6)
    trainer, _ = train(epochs=3)
    trainer.save_checkpoint("half.ckpt")
    _, resumed = train(epochs=6, checkpoint="half.ckpt")

    mine, theirs = resumed.history, unbroken.history
    print(f"steps of the resumed training: {mine.steps[0]} to {mine.steps[-1]}")
    # What was measured before the checkpoint comes from the record, which holds float32.
    single = [history.allocated.astype(np.float32) for history in (mine, theirs)]
    print(f"the same credits: {np.array_equal(*single)}")
    print(f"steps in its record: {len(History.load(resumed.log_dir))}")


if __name__ == "__main__":
    main()
