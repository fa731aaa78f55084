"""Several probes, or several callbacks: one asks about other data, the other about other settings.

    python examples/recipes/probes.py

Several probes of one callback share its settings and its walk through training; each costs
gradients of its own. Several callbacks may differ in everything, and each has its own record.
"""

from __future__ import annotations

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_lca import LCACallback, per_class


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.second(F.relu(self.first(x))), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main() -> None:
    pl.seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    train, val = random_split(data, [0.8, 0.2])

    # One callback, four probes: training data, held-out data, and two classes of the latter.
    held_out = DataLoader(val, batch_size=64)
    classes = per_class(val, examples=24, classes=[1, 8])
    by_data = LCACallback(probe={"train": "train", "val": held_out, **classes}, probe_batches=4)
    # A second callback: the same data as "train", another rule, and finer groups.
    by_rule = LCACallback(
        quadrature="trapezoid", group_by="parameter", probe_batches=4, figures=False
    )

    trainer = pl.Trainer(
        max_epochs=3,
        callbacks=[by_data, by_rule],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Net(), DataLoader(train, batch_size=64, shuffle=True))
    for name, history in by_data.histories.items():
        credit = zip(history.groups, history.allocated.sum(0), strict=True)
        print(f"probe {name}: " + ", ".join(f"{layer} {value:+.3f}" for layer, value in credit))
    for group, value in zip(by_rule.history.groups, by_rule.history.allocated.sum(0), strict=True):
        print(f"trapezoid, {group}: {value:+.3f}")
    print(f"records: {by_data.log_dir.name}, {by_rule.log_dir.parent.name}/{by_rule.log_dir.name}")


if __name__ == "__main__":
    main()
