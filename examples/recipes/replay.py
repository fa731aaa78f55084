"""After the fact: LCA between the checkpoints of a training that had no callback.

    python examples/recipes/replay.py

The same from a shell, for models and data that can be imported:

    lightning-lca replay checkpoints --model recipes.Net --data recipes.data
"""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lca.replay import replay


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 32), nn.Linear(32, 4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.second(torch.tanh(self.first(x))), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def data() -> DataLoader[tuple[Tensor, ...]]:
    """Makes the training data: the same at every call."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(256, 12, generator=draw)
    y = (x @ torch.randn(12, 4, generator=draw)).argmax(1)
    return DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)


def main() -> None:
    pl.seed_everything(0, verbose=False)
    save = ModelCheckpoint("checkpoints", every_n_train_steps=8, save_top_k=-1)
    trainer = pl.Trainer(
        max_epochs=6,
        callbacks=[save],
        logger=False,
        accelerator="cpu",
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Net(), data())

    histories = replay("checkpoints", Net, data, probe_batches=4, figures=False, progress=False)
    for record, history in histories.items():
        print(
            f"{len(list(Path('checkpoints').glob('*.ckpt')))} checkpoints, record in {record.name}"
        )
        print(f"segments end at steps {', '.join(map(str, history.steps))}")
        for layer, credit in zip(history.groups, history.allocated.sum(0), strict=True):
            print(f"{layer}: {credit:+.3f}")
        print(f"residual: {history.residual.sum():+.4f}")


if __name__ == "__main__":
    main()
