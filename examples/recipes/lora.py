"""LoRA: the two matrices of an adapter are one row, and frozen weights cost nothing.

    python examples/recipes/lora.py

The adapter is written out here. Those of PEFT have the same names, ``lora_A`` and ``lora_B``, and
are shown the same way: ``hidden.lora``.
"""

from __future__ import annotations

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_lca import LCACallback


class Adapted(nn.Module):
    """A frozen linear layer, and beside it a trained product of two narrow matrices."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(64, 64), nn.Linear(64, 10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.output(F.relu(self.hidden(x))), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.Adam(trained, lr=0.003)


def main() -> None:
    pl.seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    old, new = ([i for i, y in enumerate(labels) if (y < 5) == low] for low in (True, False))

    def fit(net: Net, which: list[int], *callbacks: pl.Callback) -> None:
        trainer = pl.Trainer(
            max_epochs=4,
            callbacks=list(callbacks),
            accelerator="cpu",
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(net, DataLoader(Subset(data, which), batch_size=32, shuffle=True))

    net = Net()  # Trained on the digits 0 to 4, then adapted to 5 to 9.
    fit(net, old)
    net.hidden, net.output = Adapted(net.hidden, rank=4), Adapted(net.output, rank=4)
    lca = LCACallback(probe_batches=4, include="*lora*")
    fit(net, new, lca)
    history = lca.history
    print(f"measured: {history.sizes.sum():,} of {sum(p.numel() for p in net.parameters()):,}")
    for layer, credit in zip(history.groups, history.allocated.sum(0), strict=True):
        print(f"{layer}: {credit:+.3f}")


if __name__ == "__main__":
    main()
