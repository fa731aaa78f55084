"""A stream that can be read but once: the probe is kept as it passes.

    python examples/recipes/streams.py

``probe="train"`` cannot draw from a stream without taking something away from training. So the
first batches are kept as training sees them, and measuring begins once there are enough.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_lca import LCACallback


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Points of a plane, and on which side of a curve they lie; nobody reads one twice."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(0)
        while True:
            point = torch.randn(2, generator=draw)
            yield point, (point[0] > point[1].square() - 0.5).long()


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 16), nn.Linear(16, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.second(torch.tanh(self.first(x))), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main() -> None:
    pl.seed_everything(0, verbose=False)
    lca = LCACallback(probe="train", probe_batches=4)
    trainer = pl.Trainer(
        max_epochs=-1,
        max_steps=120,
        callbacks=[lca],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Net(), DataLoader(Stream(), batch_size=32))
    history = lca.history
    print(f"measured: steps {history.steps[0]} to {history.steps[-1]}")
    for layer, credit in zip(history.groups, history.allocated.sum(0), strict=True):
        print(f"{layer}: {credit:+.3f}")


if __name__ == "__main__":
    main()
