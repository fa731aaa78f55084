"""LightningCLI: every argument of the callback in YAML, or on the command line.

    python examples/recipes/lightning_cli.py fit --config examples/recipes/lightning_cli.yaml

What is typed after that counts more: ``--trainer.callbacks.init_args.every_n_steps 4``.

Needs jsonargparse: ``pip install "jsonargparse[signatures]"``.
"""

from __future__ import annotations

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lca import LCACallback


class Net(pl.LightningModule):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, width), nn.Linear(width, 4)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.second(torch.tanh(self.first(batch[0]))), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Data(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.x = torch.randn(320, 12, generator=draw)
        self.y = (self.x @ torch.randn(12, 4, generator=draw)).argmax(1)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(self.x[:256], self.y[:256]), batch_size=32, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(self.x[256:], self.y[256:]), batch_size=32)


def main() -> None:
    cli = LightningCLI(Net, Data)
    for lca in cli.trainer.callbacks:
        if isinstance(lca, LCACallback):
            for name, history in lca.histories.items():
                credit = zip(history.groups, history.allocated.sum(0), strict=True)
                told = ", ".join(f"{layer} {value:+.3f}" for layer, value in credit)
                print(f"probe {name}, {len(history)} segments: {told}")


if __name__ == "__main__":
    main()
