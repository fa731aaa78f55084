"""Fine-tuning: a backbone that is frozen at first, and thawed later.

    python examples/recipes/fine_tuning.py

A frozen layer has a row, and a credit of zero. Once `BackboneFinetuning` thaws it, it is measured
from the next step on; nothing has to be told to the callback.
"""

from __future__ import annotations

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import BackboneFinetuning
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_lca import LCACallback

THAW = 2  # The epoch.


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU())
        self.head = nn.Linear(32, 10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.head(self.backbone(x)), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.Adam(trained, lr=0.003)


def main() -> None:
    pl.seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    old, new = ([i for i, y in enumerate(labels) if (y < 5) == low] for low in (True, False))

    def trainer(epochs: int, *callbacks: pl.Callback) -> pl.Trainer:
        return pl.Trainer(
            max_epochs=epochs,
            callbacks=list(callbacks),
            accelerator="cpu",
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )

    net = Net()  # Trained on the digits 0 to 4, then tuned on 5 to 9.
    trainer(6).fit(net, DataLoader(Subset(data, old), batch_size=32, shuffle=True))
    lca = LCACallback(probe_batches=4)
    thaw = BackboneFinetuning(THAW, lambda epoch: 1.0, backbone_initial_ratio_lr=0.1)
    loader = DataLoader(Subset(data, new), batch_size=32, shuffle=True)
    trainer(2 * THAW, thaw, lca).fit(net, loader)

    history = lca.history
    thawed = THAW * len(loader)
    for layer, credit in zip(history.groups, history.allocated.T, strict=True):
        before, after = credit[:thawed].sum(), credit[thawed:].sum()
        print(f"{layer}: {before:+.3f} while the backbone is frozen, {after:+.3f} from then on")


if __name__ == "__main__":
    main()
