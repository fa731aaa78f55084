"""Two processes: DDP, or FSDP2, which cuts the weights.

    python examples/recipes/processes.py ddp
    python examples/recipes/processes.py fsdp2

Nothing changes for the callback. Under DDP ranks share the probe; ``probe_batches`` counts per
rank. Under FSDP2 (`ModelParallelStrategy`) each process measures its own part of the weights, and
only sums travel. Results are the same on all ranks.
"""

from __future__ import annotations

import argparse

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_lca import LCACallback


class Net(pl.LightningModule):
    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.cut = cut
        self.first, self.second = nn.Linear(12, 32), nn.Linear(32, 4)

    def configure_model(self) -> None:
        if self.cut:
            for part in (self.first, self.second, self):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description="LCA in two processes.")
    parser.add_argument("strategy", choices=["ddp", "fsdp2"])
    chosen = parser.parse_args().strategy

    torch.manual_seed(0)  # The same weights and data in both processes.
    x = torch.randn(512, 12)
    y = (x @ torch.randn(12, 4)).argmax(1)
    strategy: Strategy = (
        DDPStrategy(process_group_backend="gloo")
        if chosen == "ddp"
        else ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
        )
    )
    lca = LCACallback(probe_batches=2)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        callbacks=[lca],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Net(cut=chosen == "fsdp2"), DataLoader(TensorDataset(x, y), batch_size=32))
    if trainer.is_global_zero:
        history = lca.history
        for layer, credit in zip(history.groups, history.allocated.sum(0), strict=True):
            print(f"{layer}: {credit:+.3f}")
        print(f"residual: {history.residual.sum():+.5f}")


if __name__ == "__main__":
    main()
